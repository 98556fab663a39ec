"""deploy/export_hub.py: folders that training takes back as a teacher, their card, and a hub on
this machine that they are pushed to.
"""

import json
import os
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from deploy import export_hub
from deploy.model_card import read_training, results_of
from tests.commands import ROOT, run
from tests.local_hub import child, hub_options, serve
from tests.teachers import IMAGES, SIZE, config, network, prefixed, save
from utils.errors import InputError
from utils.files import write_json
from utils.run.folder import save as save_checkpoint
from utils.teacher.load import load_teacher
from utils.teacher.names import TEACHERS
from utils.weights.cvlface import network_of, published_as
from utils.weights.read import sha256

COMMAND = ROOT / "deploy" / "export_hub.py"


def trained(name: str, path: Path):
    """One of our networks with statistics of its own in every BatchNorm, saved as training does."""
    spec = TEACHERS[name]
    student = network(spec.network, use_se=spec.use_se).train()
    student(IMAGES * 0.5 + 0.1)
    save_checkpoint(student.state_dict(), path)
    return student.eval()


def export(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["export_hub.py", *map(str, arguments)])
    export_hub.main()


def refused(monkeypatch, message: str, *arguments) -> None:
    with pytest.raises(InputError, match=message) as caught:
        export(monkeypatch, *arguments)
    assert "\n" not in str(caught.value)


def card_of(folder: Path) -> tuple[dict, str]:
    """(front matter, text) of a folder's card."""
    start, front, text = (folder / "README.md").read_text().split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front), text


@pytest.fixture
def a_run(tmp_path):
    """A run of AdaDistill from a cache of features: 3 steps, its config.json and its state."""
    with tarfile.open(ROOT / "tests" / "golden" / "runs_of_version_1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "ada"


# name of the network, its family and name in CVLFace's manner
FAMILIES = {
    "mobilefacenet": ("mobilefacenet", "mobilefacenet"),
    "mbf": ("mobilefacenet", "mbf"),
    "mbf_large": ("mobilefacenet", "mbf_large"),
    "iresnet18": ("iresnet_insightface", "ir18"),
    "iresnet18_se": ("iresnet_insightface", "ir18_se"),
    "ir18": ("iresnet", "ir18"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_student_becomes_a_teacher(tmp_path, monkeypatch, name):
    """Weights are the same bits, so features are; the files are laid out as CVLFace's."""
    checkpoint, folder = tmp_path / "run" / "600backbone.pth", tmp_path / "student"
    checkpoint.parent.mkdir()
    student = trained(name, checkpoint)
    export(monkeypatch, "--checkpoint", checkpoint, "--output", folder)

    teacher = load_teacher(config(name, folder), SIZE)
    assert teacher.color_space == "RGB"
    with torch.no_grad():
        assert torch.equal(teacher(IMAGES), student(IMAGES))

    family, own_name = FAMILIES[name]
    conf = yaml.safe_load((folder / "pretrained_model" / "model.yaml").read_text())
    assert conf == {
        "color_space": "RGB",
        "freeze": False,
        "input_size": [3, 112, 112],
        "name": own_name,
        "output_dim": SIZE,
        "start_from": "",
        "yaml_path": f"models/{family}/configs/v1_{own_name}.yaml",
    }
    content = json.loads((folder / "config.json").read_text())
    assert content["conf"] == conf
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {f"model.net.{key}" for key in student.state_dict()}
        about = file.metadata()
    assert about["format"] == "pt" and about["color_space"] == "RGB" and about["step"] == "600"
    assert about["network"] == name and about["normalisation"] == "(x / 255 - 0.5) / 0.5"
    assert about["features"].startswith("not normalised")
    assert about["checkpoint_sha256"] == sha256(checkpoint)

    # what CVLFace's own loader reads: only of networks that it has
    is_own = own_name == "ir18"
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    expected = {"README.md", "config.json", "model.safetensors", "pretrained_model/model.yaml"}
    assert files == expected | ({"pretrained_model/model.pt"} if is_own else set())
    assert ("architectures" in content) == is_own
    text = card_of(folder)[1]
    assert "CVLFace itself loads IR networks only" in text and ("not this one" in text) != is_own
    if is_own:
        weights = torch.load(folder / "pretrained_model" / "model.pt", weights_only=True)
        assert all(torch.equal(weights[f"net.{k}"], v) for k, v in student.state_dict().items())
        assert len(weights) == len(student.state_dict())


def test_every_network_has_a_name_there():
    names = {spec.full_name for spec in TEACHERS.values()}
    assert names == {network_of(published_as(name, SIZE), "") for name in names}


@pytest.mark.parametrize(
    "file, step", [("600backbone.pth", "600"), ("600ema.pth", "600"), ("best_backbone.pth", "")]
)
def test_kinds_of_checkpoints(tmp_path, monkeypatch, file, step):
    trained("mobilefacenet", tmp_path / file)
    export(monkeypatch, "--checkpoint", tmp_path / file, "--output", tmp_path / "deep" / "out")
    with safe_open(tmp_path / "deep" / "out" / "model.safetensors", "pt") as weights:
        assert weights.metadata()["step"] == step and weights.metadata()["checkpoint"] == file


def test_a_network_for_bgr_images_takes_rgb(tmp_path, monkeypatch):
    """AdaFace's file; the average that it keeps is exported where it is asked for."""
    plain, average = network("ir18"), network("ir18", seed=1)
    weights = prefixed(plain.state_dict(), "model.", **{"head.kernel": torch.zeros(SIZE, 3)})
    ema = {key: value for key, value in average.state_dict().items()}
    path = save({"state_dict": weights, "ema": ema}, tmp_path / "adaface_ir18.ckpt")
    for mark, original in (("", plain), ("#ema", average)):
        folder = tmp_path / f"out{mark}"
        # without AdaFace's head beside it, the average does not tell its order
        color_space = ("--color-space", "BGR")
        export(monkeypatch, "--checkpoint", f"{path}{mark}", "--output", folder, *color_space)
        teacher = load_teacher(config("ir18", folder))
        with torch.no_grad():
            # the first convolution adds the three colours in another order: some roundings
            expected = original(IMAGES.flip(1))
            limit = 1e-4 * float(expected.abs().max())
            torch.testing.assert_close(teacher(IMAGES), expected, rtol=0, atol=limit)
        assert teacher.color_space == "RGB"
        assert "trained on BGR images; its first layer has been turned around" in card_of(folder)[1]
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert file.metadata()["checkpoint_color_space"] == "BGR"


# --- the card


def test_the_card_of_a_run(a_run, monkeypatch):
    """Method, configuration and figures of the run, in the hub's front matter too; no path."""
    reports = a_run / "reports"
    reports.mkdir()
    (reports / "3backbone_metrics.csv").write_text(
        "metric,value\n"
        "ijb.IJBC.Norm:True_Det:True_tpr_at_fpr_0.0001,89.320000\n"
        "ijb.IJBC.Norm:True_Det:True_tpr_at_fpr_1e-05,70.000000\n"
        "ijb.IJBC.impostor_pairs,20000.000000\n"
        "tinyface.tinyface.rank-1,51.250000\n"
        "verification.lfw.Accuracy-Flip,0.987654\n"
        "verification.lfw.Accuracy-Std,0.004321\n"
        "verification.lfw.XNorm,21.500000\n"
    )
    export(monkeypatch, "--checkpoint", a_run / "3backbone.pth", "--output", a_run / "student")
    front, text = card_of(a_run / "student")
    assert front["license"] == "other" and "No licence was named: that of the weights" in text
    assert front["tags"] == [
        "face-recognition",
        "face-verification",
        "mobilefacenet",
        "knowledge-distillation",
    ]
    (index,) = front["model-index"]
    figures = {
        result["dataset"]["name"]: [(m["name"], m["value"]) for m in result["metrics"]]
        for result in index["results"]
    }
    assert index["name"] == "student"
    # 20,000 impostor pairs do not show a rate of 1e-5: it is marked in the table, no result
    assert figures == {
        "lfw": [("Accuracy-Flip (%)", 98.77)],
        "IJBC": [("Norm:True_Det:True_tpr_at_fpr_0.0001 (%)", 89.32)],
        "tinyface": [("rank-1 (%)", 51.25)],
    }
    for row in (
        '| method | "AdaDistill" |',
        '| loss | "AdaFace" |',
        '| dataset | "synthetic" |',
        '| teacher | "mobilefacenet" |',
        "| processes | 1 |",
        "| lfw | 98.77 ± 0.43 |",
        "| IJBC 1e-5 | 70.00† |",
    ):
        assert row in text
    assert "after 3 steps" in text and str(a_run) not in text and "/data/" not in text
    assert "## Intended use and limits" in text


@pytest.mark.parametrize("has_state", [True, False])
def test_the_card_says_how_the_weights_came_about(a_run, has_state):
    """The factors instead of a schedule, where it began, that it is an average; with and without
    the state beside it.
    """
    content = json.loads((a_run / "config.json").read_text())
    more = dict(lr_func=[1, 0.1], pretrained_backbone_path="/data/old/9backbone.pth", ema=0.9)
    write_json(a_run / "config.json", content | more | {"method": "AdaDistill"})
    if not has_state:
        (a_run / "3state.pth").unlink()
    for name, average in (
        ("3backbone.pth", False),
        ("3ema.pth", True),
        ("best_backbone.pth", True),
    ):
        method, training = read_training(a_run / name)
        assert method == "AdaDistill" and training["lr_func"] == [1, 0.1]
        assert not training.keys() & {"schedule", "milestones", "warmup_epoch"}
        assert training["started from"] == "weights: 9backbone.pth"
        assert ("weights" in training) == average and ("processes" in training) == has_state


def test_names_of_sets_as_the_hub_takes_them():
    (result,) = results_of({"verification.my set (1).Accuracy-Flip": 0.5})
    assert result["dataset"] == {"type": "my-set-1-", "name": "my set (1)"}
    assert not results_of({"verification.lfw.Accuracy-Flip": float("nan")})


def test_the_hub_library_reads_the_card(a_run, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    results = {"verification": {"lfw": {"Accuracy-Flip": 0.5, "XNorm": 1.0}}}
    (a_run / "results.json").write_text(json.dumps(results))
    export(
        monkeypatch,
        *("--checkpoint", a_run / "3backbone.pth", "--output", a_run / "out"),
        *("--report", a_run / "results.json", "--license", "cc-by-nc-4.0"),
    )
    data = hub.ModelCard.load(a_run / "out" / "README.md").data
    assert data.license == "cc-by-nc-4.0" and data.library_name == "pytorch"
    (result,) = data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == (
        "lfw",
        "accuracy",
        50.0,
    )


def test_what_is_not_known(tmp_path, monkeypatch, capsys):
    """No run beside the checkpoint; then reports of a folder of runs, one older than its
    checkpoint.
    """
    checkpoint = tmp_path / "run" / "600backbone.pth"
    checkpoint.parent.mkdir()
    trained("mobilefacenet", checkpoint)
    export(monkeypatch, "--checkpoint", checkpoint, "--output", tmp_path / "a")
    front, text = card_of(tmp_path / "a")
    assert "model-index" not in front and "knowledge-distillation" not in front["tags"]
    assert "It has not been evaluated." in text and "How it was trained is not known." in text

    report = tmp_path / "reports" / "run_600backbone_metrics.csv"
    report.parent.mkdir()
    report.write_text("metric,value\nverification.lfw.Accuracy-Flip,0.500000\n")
    os.utime(report, ns=(0, 0))
    export(monkeypatch, "--checkpoint", checkpoint, "--output", tmp_path / "b")
    assert "model-index" not in card_of(tmp_path / "b")[0]
    os.utime(report)
    export(monkeypatch, "--checkpoint", checkpoint, "--output", tmp_path / "c")
    assert "model-index" in card_of(tmp_path / "c")[0]
    assert f"figures of {report}" in capsys.readouterr().out


def test_a_card_names_no_paths_of_teachers(a_run):
    """A standalone run had no teacher, whatever its configuration says."""
    content = json.loads((a_run / "config.json").read_text())
    for teacher, shown in (
        ({"teacher": "onnx:w600k.onnx"}, "onnx:w600k.onnx"),
        ({"teacher": "onnx:/secret/w600k.onnx"}, "onnx:w600k.onnx"),
        ({"teacher": "ir50", "teacher_repo_id": "o/n"}, "ir50 of o/n"),
        ({"teacher": "ir50", "pretrained_teacher_path": "/secret/x.pth"}, "ir50"),
    ):
        (a_run / "config.json").write_text(json.dumps(content | teacher))
        assert read_training(a_run / "3backbone.pth")[1]["teacher"] == shown
    method, training = read_training(a_run.parent / "run" / "3backbone.pth")
    assert method == "standalone" and "teacher" not in training


# --- what is refused


def test_refused(tmp_path, monkeypatch):
    checkpoint = tmp_path / "600backbone.pth"
    trained("mobilefacenet", checkpoint)
    before = set(tmp_path.iterdir())
    output = ("--output", tmp_path / "out")
    named = ("--checkpoint", checkpoint)
    refused(
        monkeypatch, "no file at .*1backbone", "--checkpoint", tmp_path / "1backbone.pth", *output
    )
    refused(monkeypatch, "600backbone.pth is there: remove it", *named, "--output", checkpoint)
    refused(monkeypatch, "is there: remove it, or name another", *named, "--output", tmp_path)
    refused(monkeypatch, "--report: no file at", *named, *output, "--report", tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"a": 1}')
    refused(monkeypatch, "has no figure of", *named, *output, "--report", tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"milestones": [1, 2, 3]}')
    refused(
        monkeypatch,
        "x.json: milestones has 3 values, an interval of a figure has two",
        *(*named, *output, "--report", tmp_path / "x.json"),
    )
    (tmp_path / "x.json").unlink()
    monkeypatch.setattr(export_hub, "write_card", lambda *_: (tmp_path / "no" / "x").touch())
    with pytest.raises(FileNotFoundError):
        export(monkeypatch, *named, *output)
    assert set(tmp_path.iterdir()) == before, "nothing is left half written"


def test_names_of_repositories(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    named = ("--checkpoint", tmp_path / "x.pth", "--output", tmp_path / "out")
    refused(monkeypatch, "--push a/b/c: ", *named, "--push", "a/b/c")
    refused(
        monkeypatch, "--push student: name the repository with its", *named, "--push", "student"
    )


def test_without_huggingface_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    named = ("--checkpoint", tmp_path / "x.pth", "--output", tmp_path / "out")
    refused(monkeypatch, "--push needs huggingface_hub: pip install", *named, "--push", "o/s")


# --- the hub

UPLOAD_AND_READ = """
import json, os, sys, torch
import config.load
from easydict import EasyDict
from pathlib import Path
from utils.errors import InputError
from utils.teacher.hub import upload
from utils.teacher.load import load_teacher
folder, bad_card, work = map(Path, sys.argv[1:])
def refusal(folder):
    try:
        return upload(folder, "owner/student")
    except InputError as error:
        return str(error)
upload(folder, "owner/student")
cfg = EasyDict(
    teacher="mbf",
    pretrained_teacher_path="",
    teacher_repo_id="owner/student",
    teacher_cache=str(work / "cache"),
    color_space="auto",
)
torch.save(load_teacher(cfg).network.state_dict(), work / "read.pth")
refusals = [refusal(bad_card)]
os.environ["HF_TOKEN"] = "hf_other"
print(json.dumps([*refusals, refusal(folder)]))
"""


@pytest.mark.processes
def test_pushed_and_fetched(tmp_path, monkeypatch):
    """The weights that teacher_repo_id=owner/name gives are those of the checkpoint. A second push
    replaces the first; what the hub refuses is one line.
    """
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    trained("ir18", tmp_path / "ir18.pth")
    student = trained("mbf", tmp_path / "mbf.pth")
    for name, license in (("second", "cc-by-nc-4.0"), ("bad", "unknown")):
        arguments = ("--output", tmp_path / name, "--license", license)
        export(monkeypatch, "--checkpoint", tmp_path / "mbf.pth", *arguments)
    served = tmp_path / "served"
    with serve(served) as (address, _):
        options = hub_options(address) | {
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": "hf_test",
            # a proxy of the machine does not lead to this hub
            "NO_PROXY": "127.0.0.1",
        }
        arguments = ("--output", tmp_path / "first", "--push", "owner/student")
        output = run(COMMAND, "--checkpoint", tmp_path / "ir18.pth", *arguments, **options)
        assert f"pushed: {address}/owner/student/commit/1" in output
        assert contents(served / "owner" / "student") == contents(tmp_path / "first")
        assert "teacher_repo_id=owner/student" in card_of(tmp_path / "first")[1]

        folders = (tmp_path / "second", tmp_path / "bad")
        refusals = child(UPLOAD_AND_READ, *folders, tmp_path, **options)
    assert contents(served / "owner" / "student") == contents(tmp_path / "second")
    weights = torch.load(tmp_path / "read.pth", weights_only=True)
    assert all(torch.equal(weights[key], value) for key, value in student.state_dict().items())
    bad_card, no_access = refusals
    assert '"license" must be one of those that the hub knows' in bad_card
    assert no_access.startswith("--push: owner/student did not take the files (")
    assert f"try again by hf upload owner/student {tmp_path / 'second'}" in no_access
    assert not any("\n" in line for line in refusals)


def contents(folder: Path) -> dict[str, bytes]:
    """{path in the folder: bytes} of its files."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
