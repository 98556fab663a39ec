"""AdaDistill's launch lines, configuration files and output folders: runs go on as they are."""

import json
import shutil
import subprocess

import cv2
import numpy as np
import pytest
import torch

from tests.adadistill import PLAIN, write
from tests.commands import LIMIT, ROOT, environment, run
from tests.runs.outputs import draw_faces, losses, rows
from tests.warm_python import python
from train.start_up import where_to_resume
from utils.run.folder import RunFolder

PARTS = "backbone", "header", "state"
STANDALONE, AMLDISTILL, ADADISTILL = (
    ROOT / "train" / f"train_{name}.py" for name in ("standalone", "AMLDistill", "AdaDistill")
)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A configuration of theirs, cut down to 72 images of 9 people: three steps an epoch."""
    folder = tmp_path_factory.mktemp("theirs")
    faces = draw_faces(folder / "faces", 9)
    return [
        "--config",
        write(folder, PLAIN),
        f"rec={faces}",
        "num_classes=9",
        "num_image=72",
        "num_epoch=2",
        "val_targets=[]",
        "embedding_size=64",
        "num_workers=0",
        "log_every=1",
        "teacher=mobilefacenet",
    ]


@pytest.fixture(scope="module")
def straight(options, tmp_path_factory):
    """Two epochs on two ranks by torch.distributed.launch, and its output."""
    output = tmp_path_factory.mktemp("straight") / "run"
    command = [python(), "-m", "torch.distributed.launch", "--nproc_per_node=2"]
    done = subprocess.run(
        [
            *command,
            STANDALONE,
            "--resume",
            "0",
            *options,
            "batch_size=12",
            f"output={output}",
            "geom_margin_mask=0.8",
        ],
        env=environment(2),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return output, done.stdout + done.stderr


def weights_of(straight, folder, *parts):
    """A folder with nothing but weights of step 3, as AdaDistill leaves it."""
    folder.mkdir()
    for part in parts:
        shutil.copy(straight[0] / f"3{part}.pth", folder)
    return folder


@pytest.mark.processes
def test_their_launch_line_trains_by_their_file(straight):
    output, text = straight
    assert text.count("geom_margin_mask does nothing") == 1
    assert "2 processes on cpu" in text and "Total Step is: 6\n" in text and "rank_id: 0\n" in text
    assert [row["lr"] for row in rows(output) if "lr" in row] == [0.1 / 512 * 12 * 2] * 6
    assert json.loads((output / "config.json").read_text())["lr_func"] == [1.0, 1.0]


@pytest.mark.processes
def test_a_folder_of_large_images_by_their_block_for_it(options, tmp_path):
    """Four of each person's images, one of them already 112x112."""
    for person in ("a", "b"):
        (tmp_path / "faces" / person).mkdir(parents=True)
        for size in (256, 112, 128, 200):
            image = np.full((size, size, 3), size % 251, np.uint8)
            assert cv2.imwrite(str(tmp_path / "faces" / person / f"{size}.png"), image)
    text = run(
        STANDALONE,
        "--config",
        write(tmp_path, PLAIN, "Idifface"),
        *[option for option in options[2:] if not option.startswith("rec=")],
        f"data_path={tmp_path / 'faces'}",
        "sample=4",
        "num_classes=2",
        "num_image=8",
        "num_workers=2",
        "batch_size=4",
        f"output={tmp_path / 'run'}",
    )
    assert text.count("6 of the 8 images are not 112x112 and were resized") == 1
    assert len(losses(tmp_path / "run")) == 4


@pytest.mark.processes
def test_weights_alone_go_on_with_the_first_image_of_the_epoch(straight, options, tmp_path):
    """The next loss, before the optimizer's momentum counts, is that of the run they are from; only
    the number of ranks is the same, so that sums are added in one order. An average of the weights
    goes on, too.
    """
    output = weights_of(straight, tmp_path / "run", "backbone", "header")
    weights = torch.load(output / "3backbone.pth", weights_only=True)
    torch.save({key: value + 800 for key, value in weights.items()}, output / "3ema.pth")
    here = [*options, f"output={output}", "batch_size=12", "global_step=3", "ema=0.5"]
    text = run(STANDALONE, *here, ranks=2)
    assert "no average of the weights" not in text
    # three steps halve what it was off by; weights are below 10
    average = torch.load(output / "6ema.pth", weights_only=True)["conv1.conv.weight"]
    assert (average - 100).abs().max() < 10
    assert text.count("without the optimizer's momentum, with the first image of epoch 1") == 1
    ours, theirs = losses(output), losses(straight[0])
    assert sorted(ours) == [4, 5, 6] and ours[4] == theirs[4] and ours[6] != theirs[6]
    assert (output / "6state.pth").is_file()


@pytest.mark.processes
def test_a_backbone_alone_goes_on_where_centres_can_come_from_elsewhere(
    straight, options, tmp_path
):
    header = straight[0] / "3header.pth"
    for script, source, message in (
        (ADADISTILL, f"pretrained_teacher_path={straight[0] / '3backbone.pth'}", "start anew"),
        (AMLDISTILL, f"pretrained_teacher_header_path={header}", "Class centres from"),
    ):
        output = weights_of(straight, tmp_path / script.stem, "backbone")
        here = [*options, f"output={output}", "batch_size=24", "global_step=3", source]
        text = run(script, *here)
        assert message in text and ("3header.pth: the class centres" in text) == (
            script == ADADISTILL
        )
        assert sorted(losses(output)) == [4, 5, 6]
    assert torch.equal(
        *(
            torch.load(file, weights_only=True)["kernel"]
            for file in (header, output / "6header.pth")
        )
    )
    output = weights_of(straight, tmp_path / "refused", "backbone")
    here = [*options, f"output={output}", "batch_size=24"]
    text = run(STANDALONE, *here, "global_step=3", expect=1)
    assert f"error: global_step=3: no {output}/3header.pth, whose class centres standalone" in text
    assert {path.name for path in output.iterdir()} == {"3backbone.pth", "training.log"}


@pytest.mark.parametrize("older", [False, True])
def test_a_restarted_launch_goes_on_from_the_weights_it_began_with(older, tmp_path, monkeypatch):
    """Before its first state: not from the start, and not from a state of an earlier run."""
    monkeypatch.setattr("train.start_up.was_restarted", lambda log: True)
    for name in ["3backbone.pth"] + [f"2{part}.pth" for part in PARTS if older]:
        (tmp_path / name).touch()
    assert where_to_resume(RunFolder(tmp_path), 3, resume=False) == (3, [])
