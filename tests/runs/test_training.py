"""Whole runs in real processes: interrupted equals uninterrupted, 2 ranks equal 1, and one line for
everything that can be wrong.
"""

import json
import pickle
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from easydict import EasyDict

from backbones import build_backbone
from config.load import load_config
from tests import rounding
from tests.commands import LIMIT, ROOT, command, environment, run, run_until
from tests.runs.outputs import draw_faces, everything, losses, rows
from train import build
from train.build import input_dtype
from train.run_state import check_settled
from train.start_up import Run
from utils.dataset.order import EpochBatches, mirrored
from utils.dataset.records import MXFaceDataset
from utils.errors import InputError
from utils.run.folder import RunFolder

STANDALONE, AMLDISTILL, ADADISTILL = (
    ROOT / "train" / f"train_{name}.py" for name in ("standalone", "AMLDistill", "AdaDistill")
)
INTERFERE = ROOT / "tests" / "runs" / "interfere.py"
SMALL = [
    "dataset=synthetic",
    "embedding_size=64",
    "batch_size=8",
    "num_epoch=2",
    "num_workers=1",
    "log_every=1",
    "lr=0.5",
    "val_batch_size=16",
]


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """72 images of 9 people and two pair sets of 20 pairs."""
    return draw_faces(tmp_path_factory.mktemp("faces"), 9, pair_sets=("frontal", "pose"))


@pytest.fixture(scope="module")
def teacher(faces, tmp_path_factory):
    """A run of three steps: a teacher's backbone and header."""
    output = tmp_path_factory.mktemp("teacher") / "run"
    run(
        STANDALONE,
        *SMALL,
        f"rec={faces}",
        f"val_rec={faces}",
        "batch_size=24",
        "num_epoch=1",
        "val_targets=[]",
        f"output={output}",
    )
    return output / "3backbone.pth", output / "3header.pth"


def options(faces, output, *more):
    return [*SMALL, f"rec={faces}", f"val_rec={faces}", f"output={output}", *more]


METHODS = {
    "standalone": (STANDALONE, ["loss=ArcFace"]),
    "AdaDistill": (ADADISTILL, ["loss=AdaFace", "use_geom_margin=True", "teacher=mobilefacenet"]),
}


@pytest.mark.processes
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_interrupted_run_equals_uninterrupted(method, ranks, faces, teacher, tmp_path):
    """SIGKILL in the middle of an epoch, SIGTERM, SIGKILL in the middle of saving: each time
    --resume, and in the end the same bits.
    """
    script, method_options = METHODS[method]
    common = [
        *method_options,
        f"batch_size={8 // ranks}",
        "state_every=4",
        "val_targets=frontal",
        "eval_step=7",
        "augment=True",
    ]
    if method == "AdaDistill":
        common.append(f"pretrained_teacher_path={teacher[0]}")
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run(script, *options(faces, straight, *common), ranks=ranks)

    arguments, log = options(faces, broken, *common), broken / "training.log"
    assert (
        run_until(script, *arguments, ranks=ranks, log=log, text="Global Step: 6 ")
        == -signal.SIGKILL
    )
    status = run_until(
        script,
        "--resume",
        *arguments,
        ranks=ranks,
        log=log,
        text="Global Step: 10 ",
        send=signal.SIGTERM,
    )
    assert ranks > 1 or status == 0  # torchrun itself reports the signal it was sent
    assert (
        "Stopped by a signal at step 1" in log.read_text()
        and "Resumed at step 4" in log.read_text()
    )
    run(INTERFERE, "kill:16state.pth", script, "--resume", *arguments, ranks=ranks, expect="error")
    assert not (broken / "16state.pth").exists() and list(broken.glob("16state.pth.tmp-*"))
    run(script, "--resume", *arguments, ranks=ranks)

    expected, ours = everything(straight, 18), everything(broken, 18)
    assert expected.keys() == ours.keys()
    assert [key for key in expected if not torch.equal(expected[key], ours[key])] == []
    assert losses(straight) == losses(broken) and sorted(losses(straight)) == list(range(1, 19))
    assert [row for row in rows(straight) if "validation" in row] == [
        row for row in rows(broken) if "validation" in row
    ]
    assert not list(broken.glob("*.tmp*"))


@pytest.mark.processes
def test_resume_on_another_number_of_ranks_goes_on_from_the_same_image(faces, tmp_path):
    arguments = options(faces, tmp_path / "run", "val_targets=[]", "state_every=4", "loss=AdaFace")
    run_until(
        STANDALONE,
        *arguments,
        "batch_size=4",
        ranks=2,
        log=tmp_path / "run" / "training.log",
        text="Global Step: 6 ",
    )
    output = run(STANDALONE, "--resume", *arguments, "batch_size=8", "weight_decay=0.001")
    assert (
        "Resumed at step 4, epoch 0, 32 of its images done" in output
        and ("another batch_size: 8 instead of 4") in output
    )
    assert "another weight_decay: 0.001 instead of 0.0005" in output
    state = torch.load(tmp_path / "run" / "18state.pth", weights_only=True)
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.001
    assert sorted(losses(tmp_path / "run")) == list(range(1, 19))


@pytest.mark.processes
def test_resume_with_a_batch_larger_than_the_rest_of_the_epoch(faces, tmp_path):
    arguments = options(faces, tmp_path, "val_targets=[]", "num_epoch=1", "state_every=8")
    run_until(STANDALONE, *arguments, log=tmp_path / "training.log", text="Global Step: 9 ")
    (tmp_path / "9state.pth").unlink(missing_ok=True)
    run(STANDALONE, "--resume", *arguments, "batch_size=16", "num_epoch=2")
    assert max(losses(tmp_path)) == 8 + 4


@pytest.mark.processes
def test_going_back_to_an_earlier_step_forgets_the_later_ones(faces, tmp_path):
    arguments = options(
        faces, tmp_path, "val_targets=[]", "state_every=4", "num_epoch=1", "keep_states=3"
    )
    run(STANDALONE, *arguments)
    before = everything(tmp_path, 9)
    text = run(STANDALONE, *arguments, "global_step=4")
    assert "the states of steps 8, 9 are removed" in text and "Resumed at step 4" in text
    after = everything(tmp_path, 9)
    assert all(torch.equal(before[key], after[key]) for key in before) and list(
        losses(tmp_path)
    ) == list(range(1, 10))


@pytest.mark.processes
def test_torchrun_restart_resumes_by_itself(faces, tmp_path):
    """A worker that dies once is restarted by torchrun and goes on from the newest state."""
    output, flag = tmp_path / "run", tmp_path / "died"
    script = tmp_path / "dies_once.py"
    script.write_text(f"""
import os, pathlib, runpy, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from train.engine import Engine
step = Engine.train_step
def dying(self, source):
    if self.position.step == 6 and not pathlib.Path({str(flag)!r}).exists():
        pathlib.Path({str(flag)!r}).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, source)
Engine.train_step = dying
sys.argv[0] = {str(STANDALONE)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
""")
    arguments = command(
        script,
        *options(faces, output, "val_targets=[]", "state_every=4", "num_epoch=1"),
        torchrun=True,
        restarts=1,
    )
    done = subprocess.run(
        arguments, env=environment(), capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Resumed at step 4" in done.stdout and (output / "9state.pth").exists()
    again = subprocess.run(
        arguments, env=environment(), capture_output=True, text=True, timeout=LIMIT
    )
    assert again.returncode != 0 and "Resumed" not in again.stdout, (
        "a refused start must not resume the other run when it is restarted"
    )
    assert again.stderr.count("already holds checkpoints") == 2


@pytest.mark.processes
def test_files_and_figures_of_a_run(faces, tmp_path):
    """What section "A run" promises is there; the best backbone is the one of the best
    verification.
    """
    output = tmp_path / "run"
    text = run(
        STANDALONE,
        *options(
            faces,
            output,
            "val_targets=frontal,pose",
            "eval_step=5",
            "run_eval_at_start=True",
            "state_every=4",
            "loss=AdaFace",
        ),
    )
    assert (
        "Speed" in text
        and "Global Step: 18" in text
        and "Required:" in text
        and "margin_scaler:" in text
    )
    assert "-rank_id: 0\n" in text and "-Total Step is: 18\n" in text
    names = {path.name for path in output.iterdir()}
    assert names == {
        "training.log",
        "metrics.jsonl",
        "tb",
        "config.json",
        "best_backbone.pth",
        "9backbone.pth",
        "9header.pth",
        "16backbone.pth",
        "16header.pth",
        "16state.pth",
        "18backbone.pth",
        "18header.pth",
        "18state.pth",
    }
    validations = {row["step"]: row["validation"] for row in rows(output) if "validation" in row}
    assert list(validations) == [0, 5, 9, 10, 15, 18]
    highest = {}
    for figures in validations.values():
        for name, values in figures.items():
            highest[name] = max(highest.get(name, 0), values["Accuracy-Flip"])
            assert values["Accuracy-Highest"] == highest[name] and values["XNorm"] > 0
    means = {
        step: np.mean([figures[name]["Accuracy-Flip"] for name in figures])
        for step, figures in validations.items()
    }
    best = max(means, key=means.get)
    if best in (9, 18):
        weights = torch.load(output / f"{best}backbone.pth", weights_only=True)
        assert all(
            torch.equal(value, weights[key])
            for key, value in torch.load(output / "best_backbone.pth", weights_only=True).items()
        )
    config = json.loads((output / "config.json").read_text())
    assert config["loss"] == "AdaFace" and config["num_classes"] == 9
    assert config["method"] == "standalone"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(output / "tb"))
    board.Reload()
    assert {
        "train/loss",
        "train/learning_rate",
        "train/margin_scaler",
        "train/samples_per_sec",
        "train/speed_samples_per_sec",
        "train/epoch",
        "val/frontal/Accuracy_Flip",
        "val/frontal/Accuracy_Highest",
        "val/pose/XNorm",
    } <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("val/frontal/Accuracy_Flip")] == [
        0,
        5,
        9,
        10,
        15,
        18,
    ]
    again = run(STANDALONE, *options(faces, output), expect=1)
    assert "already holds checkpoints" in again


@pytest.mark.processes
def test_two_ranks_verify_as_one_and_only_rank_0_writes(faces, teacher, tmp_path):
    """run_eval_at_start of the same weights gives the same figures; 20 pairs are 40 images, in
    batches of 16 over 2 ranks.
    """
    common = [
        "val_targets=frontal,pose",
        "run_eval_at_start=True",
        "num_epoch=1",
        f"pretrained_teacher_header_path={teacher[1]}",
        "loss=CosFace",
        "precision=fp32",
    ]
    run(AMLDISTILL, *options(faces, tmp_path / "one", *common, "batch_size=24"))
    run(
        INTERFERE,
        f"nowrite:{tmp_path}",
        AMLDISTILL,
        *options(faces, tmp_path / "two", *common, "batch_size=12"),
        ranks=2,
    )
    first, second = (
        next(row["validation"] for row in rows(tmp_path / name) if "validation" in row)
        for name in ("one", "two")
    )
    for name in first:
        assert first[name] == pytest.approx(second[name], rel=2 * rounding.network(50))
    kernel = torch.load(teacher[1], weights_only=True)["kernel"]
    assert torch.equal(
        torch.load(tmp_path / "two" / "3header.pth", weights_only=True)["kernel"], kernel
    )


@pytest.mark.processes
@pytest.mark.parametrize("step", [0, 3])
def test_an_error_on_one_rank_ends_all_with_its_message(step, faces, tmp_path):
    text = run(
        INTERFERE,
        f"fail:{step}",
        STANDALONE,
        *options(faces, tmp_path / "run", "val_targets=[]"),
        ranks=2,
        expect="error",
    )
    assert "error: rank 1 cannot go on" in text


@pytest.fixture(scope="module")
def folder(faces, tmp_path_factory):
    """The same people as a folder of identities."""
    root = tmp_path_factory.mktemp("folder")
    dataset = MXFaceDataset(faces)
    for index in range(len(dataset)):
        image, label = dataset[index]
        (root / str(label)).mkdir(exist_ok=True)
        assert cv2.imwrite(
            str(root / str(label) / f"{index:03d}.png"), cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        )
    return root


@pytest.mark.processes
@pytest.mark.parametrize("precision, ranks", [("fp16", 2), ("bf16", 1)])
def test_precisions_accumulation_workers_and_folders(precision, ranks, folder, tmp_path):
    """Two images of each identity; a step of 2 accumulated batches takes the images of both; fp16
    with its loss scaler, whose skipped steps do no harm.
    """
    arguments = options(
        folder,
        tmp_path / "run",
        "db_file_format=folder",
        f"data_path={folder}",
        "sample=2",
        f"precision={precision}",
        "accumulate=2",
        f"batch_size={4 // ranks}",
        "num_workers=2",
        "num_epoch=1",
        "val_targets=[]",
        "channels_last=False",
    )
    assert "18 images of 9 classes" in run(STANDALONE, *arguments, ranks=ranks)
    steps = losses(tmp_path / "run")
    assert list(steps) == [1, 2] and all(np.isfinite(loss) for loss in steps.values())
    run(STANDALONE, "--resume", *arguments, "num_epoch=2", ranks=ranks)
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4]


@pytest.mark.processes
def test_non_finite_loss_stops_the_run(faces, tmp_path):
    text = run(STANDALONE, *options(faces, tmp_path / "run", "lr=1e30", "val_targets=[]"), expect=1)
    assert "not finite at step" in text and "learning rate" in text and "try a lower lr" in text
    assert not list((tmp_path / "run").glob("*.pth"))


@pytest.mark.processes
def test_damaged_records_are_replaced_until_there_are_too_many(faces, tmp_path):
    from utils.recordio.indexed import IndexedRecordIO

    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("train.idx", "property"):
        (broken / name).write_bytes((faces / name).read_bytes())
    data = bytearray((faces / "train.rec").read_bytes())
    with IndexedRecordIO(faces / "train.idx", faces / "train.rec", "r") as records:
        for key in (3, 10, 20):
            start = records.offset(key) + 8 + 24
            data[start : start + 40] = bytes(40)
    (broken / "train.rec").write_bytes(data)
    text = run(STANDALONE, *options(broken, tmp_path / "run", "val_targets=[]", "num_epoch=1"))
    assert all(f"damaged record {key}, another one takes its place" in text for key in (3, 10, 20))
    # each counts once, whoever meets it
    run(
        STANDALONE,
        *options(broken, tmp_path / "both", "val_targets=[]", "max_bad_records=3", "batch_size=4"),
        ranks=2,
    )
    for ranks in (1, 2):
        text = run(
            STANDALONE,
            *options(
                broken,
                tmp_path / f"refused{ranks}",
                "val_targets=[]",
                "num_epoch=1",
                "max_bad_records=2",
                f"batch_size={8 // ranks}",
            ),
            ranks=ranks,
            expect="error",
        )
        assert "3 damaged records are more than max_bad_records=2: 10, 20, 3" in text


def refused(script, *arguments, message, **more):
    text = run(script, *arguments, expect=1, **more)
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0], text[-3000:]
    assert "Traceback" not in text


@pytest.mark.processes
def test_missing_and_wrong_input_gives_one_line(faces, teacher, tmp_path):
    here = options(faces, tmp_path / "run", "val_targets=[]")
    header = tmp_path / "header.pth"
    torch.save({"kernel": torch.zeros(64, 10)}, header)
    (tmp_path / "file").write_text("not a folder")
    images, issame = pickle.loads((faces / "frontal.bin").read_bytes())
    (tmp_path / "few.bin").write_bytes(pickle.dumps((images[:10], issame[:5])))
    for script, extra, message in [
        (STANDALONE, [f"rec={tmp_path}/none"], f"{tmp_path}/none"),
        (STANDALONE, ["batch_size=73"], "lower batch_size"),
        (STANDALONE, ["num_classes=8"], "num_classes=8 is smaller than the 9 classes"),
        (STANDALONE, [f"output={tmp_path}/file/run"], "cannot write to"),
        (STANDALONE, ["--resume"], "--resume: no complete state"),
        (STANDALONE, ["global_step=5"], "global_step=5: no complete state"),
        (STANDALONE, ["device=cuda"], "device=cuda asks for a GPU"),
        (STANDALONE, ["val_targets=lfw"], "lfw.bin"),
        (
            STANDALONE,
            ["val_targets=few", f"val_rec={tmp_path}"],
            "few.bin has 5 pairs, fewer than the 10 folds",
        ),
        (STANDALONE, ["use_geom_margin=True"], "use_geom_margin needs a teacher"),
        (STANDALONE, ["network=resnet"], "network='resnet' is an unknown network"),
        (ADADISTILL, [], "teacher: no path is set"),
        (
            ADADISTILL,
            [f"pretrained_teacher_path={tmp_path}/none.pth"],
            f"teacher: no file at {tmp_path}/none.pth",
        ),
        (
            ADADISTILL,
            [f"pretrained_teacher_path={teacher[0]}", "teacher=iresnet18"],
            "it looks like mobilefacenet, embedding_size=64",
        ),
        (AMLDISTILL, [f"pretrained_teacher_header_path={header}"], "(64, 10)"),
    ]:
        refused(script, *here, *extra, message=message)
    assert not list(tmp_path.rglob("*backbone.pth"))


@pytest.mark.processes
def test_resume_with_another_loss_or_other_centres_gives_one_line(faces, teacher, tmp_path):
    run_ = teacher[0].parent
    here = [*SMALL, f"rec={faces}", "val_targets=[]", "num_epoch=2", "--resume"]
    before = {path: path.read_bytes() for path in run_.glob("*.pth")}
    refused(
        STANDALONE,
        *here,
        f"output={run_}",
        "loss=AdaFace",
        message=f"resume: {teacher[1]} is of a run with loss=ArcFace, this one has "
        "loss=AdaFace: start a new run (another output=) with "
        f"pretrained_backbone_path={teacher[0]} and pretrained_header_path={teacher[1]}",
    )
    output, other = tmp_path / "distilled", tmp_path / "other.pth"
    run(
        AMLDISTILL,
        *[word for word in here if word != "--resume"],
        "num_epoch=1",
        f"output={output}",
        f"pretrained_teacher_header_path={teacher[1]}",
    )
    torch.save({"kernel": torch.load(teacher[1], weights_only=True)["kernel"].flip(1)}, other)
    refused(
        AMLDISTILL,
        *here,
        f"output={output}",
        f"pretrained_teacher_header_path={other}",
        message=f"resume: {output / '9header.pth'} holds other class centres than {other}, and "
        "nothing moves these",
    )
    assert {path: path.read_bytes() for path in run_.glob("*.pth")} == before


@pytest.mark.parametrize("told_by", ["state", "config.json"])
def test_what_a_run_cannot_change_when_it_goes_on(told_by, tmp_path):
    settings = dict(
        network="mobilefacenet", SE=False, embedding_size=64, num_classes=9, loss="AdaFace"
    )
    state = (
        dict(method="AdaDistill", settings=settings)
        if told_by == "state"
        else dict(method="AdaDistill")
    )
    if told_by == "config.json":
        (tmp_path / "config.json").write_text(json.dumps(settings))
    folder = RunFolder(tmp_path)

    def messages(method="AdaDistill", **changes):
        with pytest.raises(InputError) as caught:
            check_settled(EasyDict(settings | changes), method, folder, 9, state)
        assert (
            str(caught.value).startswith("resume: ")
            and "another output=" in str(caught.value)
            and "\n" not in str(caught.value)
        )
        return str(caught.value)

    check_settled(EasyDict(settings), "AdaDistill", folder, 9, state)
    assert (
        "9backbone.pth is of a run with network=mobilefacenet, this one has network=mbf"
        in messages(network="mbf")
    )
    assert (
        "a run with network=mobilefacenet, SE=False, this one has network=iresnet18, SE=True"
        in messages(network="iresnet18", SE=True)
    )
    assert (
        "9backbone.pth is of a run with embedding_size=64, this one has embedding_size=128"
        in messages(embedding_size=128)
    )
    assert (
        "9header.pth is of a run with num_classes=9, this one has num_classes=10: go on with "
        "the training set of that run"
    ) in messages(num_classes=10)
    assert "9header.pth is of a run with loss=AdaFace, this one has loss=CosFace" in messages(
        loss="CosFace"
    )
    assert "holds a run of AdaDistill, this script trains standalone" in messages("standalone")
    (tmp_path / "9header").mkdir()
    assert "9header is of a run" in messages(
        loss="CosFace"
    ) and "train/export_header.py" in messages(loss="CosFace")
    settings["loss"] = "MLLoss"
    if told_by == "state":
        check_settled(EasyDict(settings | dict(loss="ArcFace")), "AdaDistill", folder, 9, state)


@pytest.mark.processes
def test_resume_with_a_smaller_set_goes_on_with_the_next_epoch(faces, folder, tmp_path):
    """More images of the epoch were seen than the set now has."""
    arguments = options(
        faces,
        tmp_path / "run",
        "val_targets=[]",
        "num_epoch=1",
        "state_every=4",
        "db_file_format=folder",
        f"data_path={folder}",
    )
    run(INTERFERE, "kill:8state.pth", STANDALONE, *arguments, expect=-signal.SIGKILL)
    text = run(STANDALONE, "--resume", *arguments, "num_epoch=2", "sample=2")
    assert (
        "the set has 18 images, it had 72 when step 4 was saved" in text
        and ("Resumed at step 4, epoch 1, 0 of its images done") in text
    )
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]


@pytest.mark.processes
def test_more_ranks_than_shares_of_classes(folder, tmp_path):
    """Four people on three ranks, which hold 2, 2 and 0 classes; then on two."""
    few = tmp_path / "few"
    for label in range(4):
        shutil.copytree(folder / str(label), few / str(label))
    arguments = options(
        few,
        tmp_path / "run",
        "db_file_format=folder",
        f"data_path={few}",
        "val_targets=[]",
        "header_format=shards",
        "loss=AdaFace",
    )
    run(STANDALONE, *arguments, "num_epoch=1", "batch_size=4", ranks=3)
    run(STANDALONE, "--resume", *arguments, "num_epoch=2", "batch_size=4", "accumulate=2", ranks=2)
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4] and all(
        np.isfinite(loss) for loss in losses(tmp_path / "run").values()
    )


@pytest.mark.processes
def test_run_script_prints_one_line_for_bad_input_and_passes_signals_on(faces, tmp_path):
    """The shell script, torchrun and the training process together: no traceback under the message,
    and SIGUSR1 saves and exits with 0.
    """
    script = [str(ROOT / "run_standalone.sh")]
    done = subprocess.run(
        [*script, "losss=ArcFace"], env=environment(), capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 1 and done.stderr == (
        "error: unknown configuration key 'losss', did you mean 'loss'?\n"
    )
    process = subprocess.Popen(
        [*script, *options(faces, tmp_path / "run", "val_targets=[]", "num_epoch=50")],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    while (
        "Global Step: 3 " not in (tmp_path / "run" / "training.log").read_text()
        if (tmp_path / "run" / "training.log").exists()
        else True
    ):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    text, _ = process.communicate(timeout=LIMIT)
    assert (
        process.returncode == 0
        and "Stopped by a signal" in text
        and list((tmp_path / "run").glob("*state.pth"))
    )


@pytest.mark.processes
def test_full_disk_while_saving_keeps_the_previous_checkpoint(faces, tmp_path):
    """ulimit -f stands for the full disk: the second checkpoint does not fit, the first can be
    resumed from.
    """
    output = tmp_path / "run"
    arguments = options(faces, output, "val_targets=[]", "state_every=4", "num_epoch=1")
    run_until(
        INTERFERE,
        "hold:6",
        STANDALONE,
        *arguments,
        log=output / "training.log",
        text="Global Step: 6 ",
    )
    before = {path.name: path.read_bytes() for path in output.glob("4*.pth")}
    limited = " ".join(
        ["ulimit -f 1000; exec", *command(STANDALONE, "--resume", *arguments, fresh=True)]
    )
    done = subprocess.run(
        ["bash", "-c", limited], env=environment(), capture_output=True, text=True, timeout=LIMIT
    )
    assert (
        done.returncode == 1
        and "error: cannot save" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert {path.name: path.read_bytes() for path in output.glob("*.pth*")} == before
    run(STANDALONE, "--resume", *arguments)


# --- the pieces, without processes


@pytest.mark.processes
def test_images_are_bf16_only_where_all_who_read_them_round_them_to_it():
    def dtype(precision, augment=False, teacher="iresnet50", teacher_embeddings=""):
        run_ = Run(torch.device("cpu"), precision, None, 0)
        return input_dtype(
            SimpleNamespace(
                augment=augment, teacher=teacher, teacher_embeddings=teacher_embeddings
            ),
            run_,
        )

    assert (
        dtype("bf16")
        == dtype("bf16", teacher="onnx:w600k_r50.onnx", teacher_embeddings="cache")
        == torch.bfloat16
    )
    assert (
        dtype("fp32")
        == dtype("fp16")
        == dtype("bf16", augment=True)
        == dtype("bf16", teacher="onnx:w600k_r50.onnx")
        == torch.float32
    )


def test_ranks_share_one_order_and_one_set_of_mirrors():
    def global_batches(world, epoch, samples):
        samplers = [EpochBatches(103, 12 // world, rank, world, seed=5) for rank in range(world)]
        for sampler in samplers:
            sampler.seek(epoch, samples)
        return [sum(parts, []) for parts in zip(*samplers, strict=True)]

    assert global_batches(1, 3, 0) == global_batches(2, 3, 0) == global_batches(4, 3, 0)
    assert global_batches(2, 3, 24) == global_batches(1, 3, 0)[2:] and global_batches(
        1, 4, 0
    ) != global_batches(1, 3, 0)
    seen = sum(global_batches(1, 0, 0), [])
    assert len(seen) == len(set(seen)) == 96
    assert torch.equal(mirrored(5, 1, 24, 12), mirrored(5, 1, 24, 12)) and not torch.equal(
        mirrored(5, 1, 24, 64), mirrored(5, 2, 24, 64)
    )


def test_local_rank_chooses_the_gpu(monkeypatch):
    from utils import distributed

    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (
        distributed.init("auto") == distributed.init("cuda") == torch.device("cuda", 1)
        and chosen == [torch.device("cuda", 1)] * 2
    )
    assert distributed.init("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="2 GPUs"):
        distributed.init("cuda")


def test_mps_is_one_process_in_float32(monkeypatch):
    """As far as it can be tested without an Apple GPU."""
    from utils import distributed
    from utils.precision import choose_precision

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for built, reason in ((False, "built without it"), (True, "finds no Apple GPU here")):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_built", lambda built=built: built)
        with pytest.raises(
            InputError, match=f"device=mps asks for an Apple GPU, but .*{reason}; set device=cpu"
        ):
            distributed.init("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device = distributed.init("mps")
    assert (
        device == torch.device("mps")
        and choose_precision("auto", device) == choose_precision("fp32", device) == "fp32"
    )
    for precision in ("bf16", "fp16"):
        with pytest.raises(
            InputError,
            match=f"precision={precision}: device=mps computes in float32; set precision=fp32",
        ):
            choose_precision(precision, device)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process; set NPROC_PER_NODE=1"):
        distributed.init("mps")


def test_copies_to_mps_are_waited_for():
    """The memory they are made from is soon used for other images."""
    from utils.dataset.workers import to_device

    class Tensor:
        def to(self, device, non_blocking):
            return device.type, non_blocking

    assert [to_device(Tensor(), torch.device(name)) for name in ("cuda", "mps", "cpu")] == [
        ("cuda", True),
        ("mps", False),
        ("cpu", False),
    ]


def test_a_student_may_start_from_weights_of_either_colour_order(tmp_path, caplog):
    """AdaFace's file, one that does not say, and one of a run of ours, for which color_space, the
    teacher's, does not count.
    """
    torch.manual_seed(0)
    plain = build_backbone("ir18", 16).eval()
    images = torch.rand(2, 3, 112, 112)
    with torch.no_grad():
        features = {"RGB": plain(images), "BGR": plain(images.flip(1))}
    weights = {f"model.{key}": value for key, value in plain.state_dict().items()}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"network": "ir18", "embedding_size": 16}')
    for name, content in (
        ("adaface.ckpt", {"state_dict": weights, "pytorch-lightning_version": "1.4.0"}),
        ("whose.pth", weights),
        ("plain.pth", plain.state_dict()),
        ("run/5backbone.pth", plain.state_dict()),
    ):
        torch.save(content, tmp_path / name)

    def start(name, color_space="auto"):
        cfg = load_config(
            ROOT / "config" / "config.py",
            [
                "network=ir18",
                "embedding_size=16",
                f"pretrained_backbone_path={tmp_path / name}",
                f"color_space={color_space}",
            ],
        )
        with torch.no_grad():
            return build.build_student(cfg).eval()(images)

    caplog.set_level("INFO")
    for name, color_space, order in (
        ("adaface.ckpt", "auto", "BGR"),
        ("adaface.ckpt", "RGB", "RGB"),
        ("whose.pth", "RGB", "RGB"),
        ("whose.pth", "BGR", "BGR"),
        ("plain.pth", "auto", "RGB"),
        ("plain.pth", "BGR", "BGR"),
        ("run/5backbone.pth", "BGR", "RGB"),
    ):
        caplog.clear()
        actual, reference = start(name, color_space), features[order]
        torch.testing.assert_close(
            actual,
            reference,
            rtol=0,
            atol=2 * rounding.network(20, 9 * 512) * float(reference.abs().max()),
            msg=f"{name} {color_space}",
        )
        assert f"trained on {order} images" in caplog.text
    with pytest.raises(
        InputError,
        match=r"pretrained_backbone_path: .*whose.pth is an IR network "
        r"under model\.: .* set color_space=BGR or color_space=RGB",
    ):
        start("whose.pth")
