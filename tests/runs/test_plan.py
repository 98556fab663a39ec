"""train/plan.py: what it prints of a run is what the run does."""

import os
import re
import sys

import pytest

from config.load import DEFAULTS, load_config
from tests.commands import ROOT, run
from tests.runs.outputs import draw_faces, rows
from train import plan
from utils.errors import InputError
from utils.files import write_json


def planned(monkeypatch, capsys, *arguments) -> str:
    """What the command prints, in this process."""
    monkeypatch.setattr(sys, "argv", ["plan.py", "device=cpu", *map(str, arguments)])
    plan.main()
    return capsys.readouterr().out


def megabytes(text: str, what: str) -> float:
    """Of the file that ends with ``what``."""
    return float(re.search(rf"([\d.]+) MB <step>{re.escape(what)}", text)[1])


@pytest.mark.processes
def test_the_run_is_as_planned(tmp_path):
    """Sizes to 5 %: torch.save writes names and shapes beside the numbers."""
    draw_faces(tmp_path / "faces", 4)
    output = tmp_path / "run"
    arguments = [
        "dataset=synthetic",
        f"rec={tmp_path / 'faces'}",
        f"output={output}",
        "device=cpu",
        "embedding_size=256",
        "batch_size=4",
        "accumulate=2",
        "num_epoch=2",
        "num_workers=0",
        "log_every=1",
        "warmup_epoch=1",
        "schedule=cosine",
        "ema=0.9",
        "val_targets=[]",
        "keep_states=1",
    ]
    text = run(ROOT / "train" / "plan.py", "--method", "standalone", "--measure", *arguments)
    assert not output.exists()
    run(ROOT / "train" / "train_standalone.py", *arguments)
    assert "32 of 4 people" in text and "2 epochs, 8 steps" in text
    assert re.search(r"\ntime .*hours at [\d,]+ images a second", text)
    at_epochs = [row["lr"] for row in rows(output) if row["step"] in (1, 5)]
    shown = re.findall(r"from \d +([\d.e-]+)", text)
    assert [float(rate) for rate in shown] == pytest.approx(at_epochs, rel=1e-3)
    for part in ("backbone", "ema", "state"):
        size = (output / f"8{part}.pth").stat().st_size / 1e6
        assert megabytes(text, f"{part}.pth") == pytest.approx(size, rel=0.05), part
    # ours, not the log, TensorBoard's and the configuration; a hundredth of a MB is what it shows
    total = sum(file.stat().st_size for file in output.glob("*.pth")) / 1e6
    in_the_end = float(re.search(r"disk +([\d.]+) MB in the end", text)[1])
    assert in_the_end == pytest.approx(total, rel=0.05)


def test_before_the_set_is_there(monkeypatch, capsys, tmp_path):
    """Eight processes: 1,024 images a step; centres and logits of an eighth of the classes."""
    monkeypatch.setenv("NPROC_PER_NODE", "8")
    recipe = ROOT / "config" / "recipes" / "arcface_mbf.py"
    common = ["--config", recipe, f"rec={tmp_path}", "--method", "standalone"]
    text = planned(monkeypatch, capsys, *common)
    assert f"num_image and num_classes say so; no set at {tmp_path}" in text
    assert "5,822,653 of 85,742 people" in text and "5,686 steps" in text
    assert "mbf: 2,059,520 parameters, 438 M multiply-adds" in text
    # 10,718 centres of 512 numbers, 1,024 x 10,718 logits, 4 bytes each
    assert "22.0 MB of centres, as much of their momentum, 43.9 MB of logits" in text
    # of accumulated passes all wait; a tenth of the classes; in half of the bytes
    changes = ["accumulate=2", "sample_rate=0.1", "centers_precision=bf16"]
    text = planned(monkeypatch, capsys, *common, *changes)
    assert "11.0 MB of centres, as much of their momentum, 8.8 MB of logits" in text
    with pytest.raises(InputError, match="no record file"):
        planned(monkeypatch, capsys, *common, "num_image=0")


def test_a_set_that_is_there_is_planned_with_as_it_is(monkeypatch, capsys, tmp_path):
    """Nothing is copied, and what a run would refuse is no plan, whatever num_image says."""
    draw_faces(tmp_path / "faces", 4)
    common = ["dataset=synthetic", f"rec={tmp_path / 'faces'}", "batch_size=4"]
    known = ["num_image=5000", "num_classes=90"]
    text = planned(monkeypatch, capsys, *common, *known, f"stage_to={tmp_path / 'copy'}")
    assert "32 of 90 people" in text and not (tmp_path / "copy").exists()
    with pytest.raises(InputError, match="num_classes=3 is smaller than the 4 classes"):
        planned(monkeypatch, capsys, *common, "num_image=5000", "num_classes=3")
    os.truncate(tmp_path / "faces" / "train.rec", 1000)
    with pytest.raises(InputError, match="train.rec"):
        planned(monkeypatch, capsys, *common, *known)


@pytest.mark.parametrize("name", ["NPROC_PER_NODE", "NNODES"])
@pytest.mark.parametrize("value", ["gpu", "1:2", "0"])
def test_the_number_of_processes_must_be_known(monkeypatch, capsys, tmp_path, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{name}={value}: a plan is for a number of processes"):
        planned(monkeypatch, capsys, f"rec={tmp_path}")


def test_the_highest_rate_is_shown(monkeypatch, capsys, tmp_path):
    """40 rates, of which every second has a line."""
    recipe = ROOT / "config" / "recipes" / "arcface_mbf.py"
    common = ["--config", recipe, f"rec={tmp_path}", "--method", "standalone"]
    text = planned(monkeypatch, capsys, *common, "warmup_epoch=5")
    lines = re.findall(r"from (\d+) +([\d.e-]+)", text)
    assert ("5", "0.0125") in lines and lines[-1][0] == "39"


def test_the_method_is_that_of_the_run(monkeypatch, capsys, tmp_path):
    cfg = load_config(DEFAULTS, [f"output={tmp_path}", f"rec={tmp_path}"])
    write_json(tmp_path / "config.json", dict(cfg, method="standalone"))
    text = planned(monkeypatch, capsys, "--config", tmp_path / "config.json")
    assert text.startswith("standalone, ")
    text = planned(monkeypatch, capsys, "--config", tmp_path / "config.json", "--method=AMLDistill")
    assert text.startswith("AMLDistill, ")


def test_what_runs_of_a_teacher(monkeypatch, capsys, tmp_path):
    common = ["--config", ROOT / "config" / "recipes" / "adadistill_paper.py", f"rec={tmp_path}"]
    text = planned(monkeypatch, capsys, *common, "teacher=iresnet18")
    assert "teacher        iresnet18: 24,025,600 parameters" in text and "momentum" not in text
    text = planned(monkeypatch, capsys, *common, "teacher_embeddings=cache")
    assert "teacher        its features are in" in text
    text = planned(monkeypatch, capsys, *common, "--method", "AMLDistill")
    assert "teacher        none is run" in text
    weights = ["header_weight=0", "feature_weight=1", "teacher_embeddings=cache"]
    assert "logits" not in planned(monkeypatch, capsys, *common, *weights)
