"""bench/small_set.py: a row for each finished run, what is missing, and going on after a kill."""

import csv
import json

import numpy as np
import pytest

from bench import small_set
from bench.small_set import Job
from tests.commands import ROOT, run, run_until
from tests.runs.outputs import draw_faces
from utils.errors import InputError

SCRIPT = ROOT / "bench" / "small_set.py"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Of a training on 32 images of 4 people, in 6 steps."""
    faces = draw_faces(tmp_path_factory.mktemp("faces"), 4, pair_sets=("frontal",))
    features = np.random.default_rng(0).standard_normal((2, 32, 16)).astype(np.float32)
    np.savez(faces / "features.npz", emb=features[0], emb_flip=features[1])
    return [
        f"rec={faces}",
        f"val_rec={faces}",
        "val_targets=frontal",
        "embedding_size=16",
        "batch_size=16",
        "precision=fp32",
        "compile=False",
        "device=cpu",
        "--features",
        faces / "features.npz",
    ]


@pytest.mark.processes
def test_killed_in_a_run_it_goes_on(arguments, tmp_path, monkeypatch, capsys):
    def in_this_process(*more) -> str:
        monkeypatch.setattr("sys.argv", [*map(str, (*command, *more))])
        small_set.main()
        return capsys.readouterr().out

    name = "AMLDistill_mobilefacenet_3_epochs_seed7"
    log = tmp_path / "runs" / name / "training.log"
    command = [SCRIPT, *arguments, "--output", tmp_path]
    command += ["--methods", "AMLDistill", "--seeds", 7]
    run_until(*command, log=log, text="Epoch: 1")
    assert not (tmp_path / "results.csv").exists()
    assert f"missing: {name}" in in_this_process("--table")

    run(*command)
    assert "Resumed at step 2" in log.read_text()
    validation = json.loads(log.with_name("metrics.jsonl").read_text().splitlines()[-1])
    accuracy = 100 * validation["validation"]["frontal"]["Accuracy-Flip"]
    with (tmp_path / "results.csv").open() as file:
        [row] = csv.DictReader(file)
    assert row == {
        "method": "AMLDistill",
        "network": "mobilefacenet",
        "epochs": "3",
        "seed": "7",
        "frontal": f"{accuracy:.3f}",
    }
    before = log.stat().st_mtime_ns
    output = in_this_process()
    assert f"| 3 | mobilefacenet | AMLDistill | 1 | {accuracy:.2f} |" in output
    assert "missing: none" in output
    assert log.stat().st_mtime_ns == before
    command.insert(1, "lr=0.2")
    with pytest.raises(InputError, match="was begun with other values"):
        in_this_process()


def test_table():
    rows = {
        Job("AdaDistill_ArcFace", "mobilefacenet", 3, 1): {"lfw": 80.0, "pose": 50.0},
        Job("AdaDistill_ArcFace", "mobilefacenet", 3, 2): {"lfw": 90.0, "pose": 50.0},
        Job("standalone", "mobilefacenet", 8, 1): {"lfw": 70.0, "pose": 60.0},
        Job("standalone", "mobilefacenet", 3, 1): {"lfw": 70.0, "pose": 60.0},
    }
    # deviations of 5 each, by one degree of freedom: sqrt(50)
    assert small_set.table(rows).splitlines()[2:] == [
        "| 3 | mobilefacenet | standalone | 1 | 70.00 | 60.00 |",
        "| 3 | mobilefacenet | AdaDistill_ArcFace | 2 | 85.00 ± 7.07 | 50.00 ± 0.00 |",
        "| 8 | mobilefacenet | standalone | 1 | 70.00 | 60.00 |",
    ]
