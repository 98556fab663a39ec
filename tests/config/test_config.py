"""The configuration: where values come from, which of them wins, and how mistakes are reported."""

import json
import re
import subprocess
import sys

import pytest
from easydict import EasyDict

from config import rules
from config.load import ROOT, load_config, parse_arguments, read_file
from tests.commands import LIMIT, environment
from tests.warm_python import python
from utils.errors import InputError

DEFAULTS = ROOT / "config" / "config.py"
SPECIFIED = """
    dataset embedding_size momentum weight_decay batch_size lr output pretrained_teacher_path
    pretrained_teacher_header_path teacher_repo_id teacher_cache global_step s m h t_alpha
    adaptive_alpha alpha use_geom_margin geom_margin_w geom_margin_k geom_margin_warmup_epoch loss
    network teacher SE rec val_rec data_path db_file_format sample num_classes num_image
    num_epoch warmup_epoch val_targets eval_step val_eval_every_n_epoch eval_every_n_epoch
    run_eval_at_start eval_ijb ijb_root ijb_targets ijb_batch_size ijb_num_workers ijb_flip
    eval_tinyface tinyface_root tinyface_targets tinyface_batch_size tinyface_num_workers
    tinyface_flip milestones precision channels_last compile num_workers seed grad_clip
    accumulate shuffle flip augment pretrained_backbone_path pretrained_header_path rec_backend
    log_every state_every keep_states max_bad_records device sample_rate teacher_embeddings
    color_space cuda_graphs header_precision
""".split()


def write(folder, text, name="mine.py"):
    path = folder / name
    path.write_text(text)
    return path


def partial(folder, **values):
    return write(folder, f"from easydict import EasyDict\nconfig = EasyDict({values!r})\n")


def copy_of_defaults(folder, **changes):
    """config/config.py with some lines edited, as people do."""
    text = DEFAULTS.read_text()
    for key, value in changes.items():
        text, count = re.subn(rf"(?m)^config\.{key} = .*$", f"config.{key} = {value!r}", text)
        assert count == 1, key
    return write(folder, text)


def refused(message, path=DEFAULTS, *overrides):
    with pytest.raises(InputError, match=message) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)


# --- defaults
# --------------------------------------------------


def test_every_specified_key_has_a_default():
    cfg = load_config(DEFAULTS)
    assert isinstance(cfg, EasyDict) and set(cfg) == set(rules.types_of(*read_file(DEFAULTS)))
    assert set(SPECIFIED) <= set(cfg)
    expected = dict(
        s=64.0,
        m=None,
        h=0.333,
        t_alpha=0.01,
        momentum=0.9,
        weight_decay=5e-4,
        grad_clip=5.0,
        log_every=50,
        state_every=2000,
        keep_states=2,
        max_bad_records=100,
        geom_margin_k=3.0,
        geom_margin_w=1.0,
        geom_margin_warmup_epoch=1.0,
        device="auto",
        precision="auto",
    )
    assert {key: cfg[key] for key in expected} == expected


@pytest.mark.parametrize(
    "name, num_classes, num_image, num_epoch, milestones, file_format",
    [
        ("emoreIresNet", 85742, 5822653, 26, [8, 14, 20, 25], "rec"),
        ("CASIA_WebFace", 10572, 501195, 60, [40, 48, 52], "rec"),
        ("Idifface", 10049, 502450, 60, [40, 48, 52], "folder"),
        ("MS1MV3", 93431, 5179510, 20, [8, 12, 15, 18], "rec"),
        ("Glint360K", 360232, 17091657, 20, [8, 12, 15, 18], "rec"),
        ("WebFace4M", 205990, 4235242, 20, [8, 12, 15, 18], "rec"),
        ("WebFace12M", 617970, 12720066, 20, [8, 12, 15, 18], "rec"),
        ("WebFace42M", 2059906, 42474557, 20, [8, 12, 15, 18], "rec"),
        ("synthetic", 0, 0, 10, [7, 9], "rec"),
    ],
)
def test_presets(name, num_classes, num_image, num_epoch, milestones, file_format):
    cfg = load_config(DEFAULTS, [f"dataset={name}"])
    assert (cfg.num_classes, cfg.num_image, cfg.num_epoch, cfg.milestones, cfg.db_file_format) == (
        num_classes,
        num_image,
        num_epoch,
        milestones,
        file_format,
    )
    assert (cfg.sample == 50) == (name == "Idifface") and cfg.val_targets
    assert name != "CASIA_WebFace" or cfg.rec == str(ROOT / "data" / "faces_webface_112x112")


def test_every_default_stands_once_and_is_explained():
    lines = [line for line in DEFAULTS.read_text().splitlines() if line.startswith("config.")]
    keys = [line.split(" = ")[0].removeprefix("config.") for line in lines]
    assert len(keys) == len(set(keys))


# --- files
# --------------------------------------------------


def test_partial_file_keeps_the_other_defaults(tmp_path):
    cfg = load_config(partial(tmp_path, loss="CosFace", lr=1))
    assert (cfg.loss, cfg.lr, type(cfg.lr)) == ("CosFace", 1.0, float)
    assert {**cfg, "loss": "ArcFace", "lr": 0.1} == load_config(DEFAULTS)


def test_edited_copy(tmp_path):
    cfg = load_config(copy_of_defaults(tmp_path, loss="CosFace", m=0.35, dataset="synthetic"))
    assert (cfg.loss, cfg.m, cfg.dataset, cfg.num_epoch) == ("CosFace", 0.35, "synthetic", 10)


def test_copy_with_a_dataset_of_its_own(tmp_path):
    text = copy_of_defaults(tmp_path, dataset="mine").read_text()
    entry = dict(
        db_file_format="folder",
        rec="",
        data_path="faces",
        sample=0,
        num_classes=7,
        num_image=70,
        num_epoch=3,
        warmup_epoch=1,
        milestones=[2],
        val_rec="",
        val_targets=[],
    )
    cfg = load_config(
        write(tmp_path, text + f"DATASETS['mine'] = {entry!r}\nassert config.num_classes == 7\n")
    )
    assert (cfg.num_classes, cfg.milestones, cfg.data_path) == (7, [2], str(ROOT / "faces"))
    del entry["sample"]
    refused(
        "the configuration has no sample: .*'mine'",
        write(tmp_path, text + f"DATASETS['mine'] = {entry!r}\n"),
    )
    refused(
        "unknown configuration key 'milestone', did you mean 'milestones'",
        write(tmp_path, text + f"DATASETS['mine'] = {entry | dict(milestone=[1])!r}\n"),
    )


def test_file_that_imports_the_defaults_and_edits_them(tmp_path):
    text = (
        "from config.config import DATASETS, config\nconfig.loss = 'AdaFace'\nconfig.dataset = "
        "'small'\nDATASETS['small'] = dict(DATASETS['synthetic'], num_epoch=2)\n"
    )
    cfg = load_config(write(tmp_path, text))
    assert (cfg.loss, cfg.num_epoch) == ("AdaFace", 2)
    again = load_config(
        write(tmp_path, "from config.config import config\nconfig.lr = 0.2\n", "other.py")
    )
    assert (again.loss, again.lr, again.dataset) == ("ArcFace", 0.2, "emoreIresNet"), (
        "edits of one file must not reach another"
    )


def test_config_json_of_a_run_gives_the_same_again(tmp_path):
    cfg = load_config(
        copy_of_defaults(tmp_path, loss="CosFace"),
        ["dataset=synthetic", "m=0.3", "num_classes=5", f"output={tmp_path}"],
    )
    assert load_config(write(tmp_path, json.dumps(cfg), "config.json")) == cfg
    assert load_config(tmp_path / "config.json", ["m=None"]).m is None
    own = dict(cfg, dataset="a set of another file")
    written = own | {"method": "AdaDistill"}
    assert load_config(write(tmp_path, json.dumps(written), "config.json")) == own


# --- which value wins
# --------------------------------------------------


def test_values_beat_the_table_of_the_dataset(tmp_path):
    assert load_config(partial(tmp_path, num_epoch=3)).num_epoch == 3
    copy = write(
        tmp_path,
        copy_of_defaults(tmp_path)
        .read_text()
        .replace("LFW_AND_CO =", "config.num_epoch = 4\nLFW_AND_CO ="),
    )
    assert load_config(copy).num_epoch == 4
    assert load_config(copy, ["dataset=synthetic"]).num_epoch == 4
    cfg = load_config(copy, ["num_epoch=5", "dataset=synthetic"])
    assert (cfg.num_epoch, cfg.milestones, cfg.val_targets) == (
        5,
        [7, 9],
        ["frontal", "pose", "lowres"],
    )


def test_the_last_override_wins():
    assert load_config(DEFAULTS, ["m=0.1", "m=0.2"]).m == 0.2


@pytest.mark.parametrize(
    "text, key, value",
    [
        ("m=0.35", "m", 0.35),
        ("m=None", "m", None),
        ("m=none", "m", None),
        ("lr=1", "lr", 1.0),
        ("weight_decay=5e-4", "weight_decay", 5e-4),
        ("SE=false", "SE", False),
        ("channels_last=False", "channels_last", False),
        ("milestones=3,5", "milestones", [3, 5]),
        ("milestones=[3, 5]", "milestones", [3, 5]),
        ("milestones=", "milestones", []),
        ("schedule=poly", "schedule", "poly"),
        ("lr_func=None", "lr_func", None),
        ("val_targets=lfw, cfp_fp", "val_targets", ["lfw", "cfp_fp"]),
        ("val_targets=['lfw']", "val_targets", ["lfw"]),
        ("network=iresnet50", "network", "iresnet50"),
        ("loss=MLLoss", "loss", "MLLoss"),
        ("device=cuda:1", "device", "cuda:1"),
        ("seed=0", "seed", 0),
    ],
)
def test_command_line_words(text, key, value):
    parsed = load_config(DEFAULTS, [text])[key]
    assert parsed == value and type(parsed) is type(value)


def test_paths_start_at_the_root_in_files_and_at_the_current_directory_on_the_command_line(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    cfg = load_config(
        partial(tmp_path, rec="data/mine", pretrained_teacher_path="~/t.pth"),
        ["output=runs/a", "val_rec=/abs/val", "data_path=~/faces"],
    )
    assert (cfg.rec, cfg.output, cfg.val_rec) == (
        str(ROOT / "data/mine"),
        str(tmp_path / "runs/a"),
        "/abs/val",
    )
    assert (
        load_config(ROOT / "config" / "config.py", ["teacher=onnx:models/r50.onnx"]).teacher
        == f"onnx:{tmp_path / 'models/r50.onnx'}"
    )
    assert (cfg.pretrained_teacher_path, cfg.data_path, cfg.pretrained_header_path) == (
        "/home/me/t.pth",
        "/home/me/faces",
        "",
    )


# --- mistakes
# --------------------------------------------------


def test_unknown_keys_name_the_nearest(tmp_path):
    for path, overrides in (
        (partial(tmp_path, batchsize=64), []),
        (write(tmp_path, '{"batchsize": 64}', "config.json"), []),
        (DEFAULTS, ["batchsize=64"]),
        (
            write(
                tmp_path, "from config.config import config\nconfig.batchsize = 64\n", "import.py"
            ),
            [],
        ),
    ):
        refused(
            "unknown configuration key 'batchsize', did you mean 'batch_size'", path, *overrides
        )
    refused("unknown configuration key 'qqqqqqq'$", DEFAULTS, "qqqqqqq=1")
    refused("unknown configuration key 7$", write(tmp_path, "config = {7: 1}"))
    refused("'lr' is not key=value", DEFAULTS, "lr")


@pytest.mark.parametrize(
    "override, message",
    [
        ("lr=fast", "lr='fast' has the wrong type or value: expected float of at least 0"),
        ("lr=nan", "lr"),
        ("lr=1e999", "lr"),
        ("lr=-1", "lr"),
        ("lr=True", "lr"),
        ("batch_size=1e3", "batch_size=1000.0 .*expected int"),
        ("batch_size=0", "batch_size"),
        ("batch_size=true", "batch_size"),
        ("batch_size=", "batch_size=''"),
        ("SE=1", "SE=1 .*expected bool"),
        ("SE=yes", "SE"),
        (
            "milestones=3,x",
            r"milestones=.*expected "
            r"a list of int",
        ),
        ("milestones=3.5", "milestones"),
        ("milestones=None", "milestones=None .*expected a list of int"),
        ("schedule=polynomial", "schedule='polynomial' is unknown, did you mean 'poly'?"),
        ("schedule_power=-1", "schedule_power=-1.* expected float of at least 0"),
        ("lr_func=0.1", "lr_func has the factors of 1 epochs, but num_epoch=26"),
        ("lr_func=1,fast", "lr_func='fast' .*expected float"),
        ("num_epoch=None", "num_epoch=None"),
        ("m=[]", "m="),
        ("m={[]: 1}", "m="),
        ("output=", "output is empty"),
        (
            "loss=Arcface",
            "loss='Arcface' is unknown, did you mean 'ArcFace'.*allowed: MLLoss, CosFace, "
            "ArcFace, AdaFace",
        ),
        ("precision=fp8", "did you mean 'fp16'|did you mean"),
        ("dataset=emore", "unknown dataset 'emore'.*has: emoreIresNet, CASIA_WebFace"),
        ("dataset=syntetic", "did you mean 'synthetic'"),
        ("color_space=rgb", "color_space='rgb' is unknown.*allowed: auto, RGB, BGR"),
        ("device=gpu", "device='gpu' is unknown: auto, cpu, cuda, cuda:N or mps"),
    ],
)
def test_wrong_values(override, message):
    refused(message, DEFAULTS, override)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(lr="0.1"), "lr='0.1' has the wrong type"),
        (dict(seed=1.5), "seed=1.5"),
        (dict(val_targets="lfw"), "val_targets='lfw' .*a list of str"),
        (dict(milestones=[1, True]), "milestones"),
        (dict(rec=None), "rec=None .*expected a path"),
        (dict(loss=["ArcFace"]), "loss=.*is unknown"),
        (dict(dataset=3), "dataset=3"),
    ],
)
def test_wrong_types_in_a_file(tmp_path, values, message):
    refused(message, partial(tmp_path, **values))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["SE=True"], "SE=True needs an iresnet, not network=mobilefacenet"),
        (["db_file_format=folder"], "needs data_path"),
        (["db_file_format=rec", "rec="], "needs rec"),
        (["dataset=Idifface", "rec_backend=mxnet"], "rec_backend='mxnet' reads records"),
        (["num_epoch=2", "warmup_epoch=2"], "warmup_epoch=2 leaves nothing of num_epoch=2"),
        (["num_epoch=2", "freeze=2"], "freeze=2 leaves the network nothing of num_epoch=2"),
        (["ema=1"], "ema=1.0: the average must move; set it below 1"),
        (["header_weight=0"], "header_weight=0 and feature_weight=0 leave nothing to learn from"),
        (["sample_rate=0"], "sample_rate=0.0 must be above 0"),
        (["sample_rate=1.5"], "at most 1"),
        (["val_rec="], "val_targets need val_rec"),
        (
            ["eval_ijb=True", "ijb_root="],
            "eval_ijb=True needs ijb_root, the folder of the sets, and ijb_targets, their names",
        ),
        (
            ["eval_tinyface=True", "tinyface_targets=[]"],
            "eval_tinyface=True needs tinyface_root, the folder of the sets, and tinyface_targets",
        ),
        (
            ["teacher_embeddings=cache", "augment=True"],
            "teacher_embeddings hold the features of the "
            "images as they are and mirrored: set augment=False",
        ),
        (["teacher=cvlface_ir5"], "teacher='cvlface_ir5' is unknown, did you mean 'cvlface_ir50'?"),
    ],
)
def test_bad_combinations(overrides, message):
    refused(message, DEFAULTS, *overrides)
    assert load_config(DEFAULTS, ["val_rec=", "val_targets="]).val_targets == []


def test_lr_func_takes_the_place_of_the_schedule(tmp_path):
    """Its factors beat what the files say of a schedule; the command line may not say both."""
    config = partial(tmp_path, lr_func=[1, 0.5], num_epoch=2, milestones=[1], schedule="poly")
    cfg = load_config(config)
    assert cfg.lr_func == [1.0, 0.5] and type(cfg.lr_func[0]) is float
    assert load_config(DEFAULTS, ["lr_func=1, 0.5", "num_epoch=2"]).lr_func == [1.0, 0.5]
    for override in ("schedule=step", "milestones=1", "warmup_epoch=0"):
        refused(f"{override.split('=')[0]}=.* does nothing beside lr_func", config, override)
        assert load_config(config, ["lr_func=None", override]).lr_func is None
    run = write(tmp_path, json.dumps(cfg), "config.json")
    assert load_config(run) == cfg
    refused("lr_func has the factors of 2 epochs, but num_epoch=3", run, "num_epoch=3")
    # nothing of a schedule holds: a short trial of a file with a long warm-up
    trial = partial(tmp_path, lr_func=[1, 0.5], num_epoch=2, warmup_epoch=3)
    assert load_config(trial, ["num_epoch=1", "lr_func=1"]).num_epoch == 1
    refused("lr_func=-1.0 .*expected float of at least 0", partial(tmp_path, lr_func=[-1.0]))
    refused("lr_func=0.1 .*expected a list of float", partial(tmp_path, lr_func=0.1))


@pytest.mark.parametrize(
    "method, arguments, message",
    [
        ("AMLDistill", ["freeze=1"], "freeze=1: .*nothing moves them with AMLDistill"),
        ("AMLDistill", ["backbone_lr=0"], "backbone_lr=0: .*nothing moves them with AMLDistill"),
        (
            "AdaDistill",
            ["freeze=1", "header_weight=0", "feature_weight=1"],
            "nothing moves them with header_weight=0: set freeze=0",
        ),
        ("standalone", ["feature_weight=1"], "feature_weight needs a teacher"),
    ],
)
def test_what_a_method_cannot_do(method, arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(InputError, match=message):
        parse_arguments("", method)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["batch_size=1"],
            "batch_size=1: BatchNorm needs at least two images per process; "
            ".*accumulate makes larger steps",
        ),
        (["batch_size=1", "accumulate=8", "network=iresnet18"], "batch_size=1: BatchNorm"),
        (["--resume", "batch_size=1"], "batch_size=1: BatchNorm"),
        (
            ["device=mps", "precision=bf16"],
            "precision=bf16 cannot be used with device=mps: set precision=fp32, or another device",
        ),
        (["device=mps", "precision=fp16"], "precision=fp16 .*set precision=fp32"),
        (["device=mps", "centers_device=cpu"], "centers_device=cpu .*set centers_device=auto"),
        (
            ["device=mps", "centers_precision=bf16"],
            "centers_precision=bf16 .*set centers_precision=fp32",
        ),
        (["device=mps", "compile=True"], "compile=True .*set compile=False"),
        (["device=mps:1"], "device='mps:1' is unknown: auto, cpu, cuda, cuda:N or mps"),
    ],
)
def test_what_training_cannot_do(arguments, message, monkeypatch):
    """Other commands may: evaluation takes one image at a time, and the configuration of a run on
    another device.
    """
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(InputError, match=message):
        parse_arguments("", "AdaDistill")
    if "mps:1" not in arguments[0]:
        assert (
            load_config(
                DEFAULTS, ["val_batch_size=1", *(text for text in arguments if "=" in text)]
            ).val_batch_size
            == 1
        )


def test_mps_takes_the_defaults(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "device=mps"])
    cfg, _ = parse_arguments("", "AdaDistill")
    assert (cfg.device, cfg.precision, cfg.channels_last) == ("mps", "auto", False) and load_config(
        DEFAULTS
    ).channels_last


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "x = 1\nconfig = {'lr': lrate}\n",
            r"mine\.py, line 2: NameError: name 'lrate' is not defined",
        ),
        ("config = {\n", r"mine\.py, line 1: SyntaxError"),
        ("import nothing_of_this_name\n", r"mine\.py, line 1: ModuleNotFoundError"),
        (
            "from config.config import config\nconfig.lr = float('a\\nb')\n",
            r"mine\.py, line 2: "
            r"ValueError",
        ),
        (
            "from config.config import config\nconfig.lr = 0.1 / 0\n",
            r"mine\.py, line 2: "
            r"ZeroDivisionError",
        ),
        (
            "from config.config import config\nconfig.m = config.mm\n",
            r"mine\.py, line 2: "
            r"AttributeError: the configuration has no key 'mm'",
        ),
        ("config = 3\n", "defines no `config`"),
        ("settings = {}\n", "defines no `config`"),
        ("DATASETS = 3\nconfig = {}\n", "DATASETS"),
        ("DATASETS = {'synthetic': 3}\nconfig = {'dataset': 'synthetic'}\n", "DATASETS"),
        ("config = {}\0", r"mine\.py"),
    ],
)
def test_a_file_that_fails_is_one_line(tmp_path, text, message):
    refused(message, write(tmp_path, text))


def test_files_that_are_none(tmp_path):
    refused(r"no configuration file at /no/such\.py", "/no/such.py")
    refused("no configuration file", tmp_path)
    for content, message in (
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "holds a list, not a dict"),
    ):
        (tmp_path / "config.json").write_bytes(content)
        refused(message, tmp_path / "config.json")


@pytest.mark.parametrize(
    "name, text",
    [("mine.py", "config = dict(loss='CosFace')"), ("config.json", '{"loss": "CosFace"}')],
)
def test_a_file_with_a_byte_order_mark(tmp_path, name, text):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_config(tmp_path / name).loss == "CosFace"


@pytest.mark.processes
def test_a_script_shows_a_mistake_as_one_line(tmp_path):
    """From another directory; before the output folder is made."""
    done = subprocess.run(
        [python(), ROOT / "train" / "train_standalone.py", "los=ArcFace", "output=run"],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert (done.returncode, done.stderr) == (
        1,
        "error: unknown configuration key 'los', did you mean 'loss'?\n",
    )
    assert not any(tmp_path.iterdir())
