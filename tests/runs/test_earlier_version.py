"""Runs, configurations and teacher caches that an earlier version wrote go on unchanged.

golden/runs_of_version_1.tar.xz holds a set of 24 drawn faces and what the version of November 2026
wrote for it: a standalone run, AdaDistill from a teacher cache, and a run of two ranks whose header
lies in shares. Large tensors are filled with constants, so that the file is small.
"""

import json
import tarfile

import numpy as np
import pytest
import torch

from config.load import load_config
from tests.commands import ROOT, run
from utils.dataset import MXFaceDataset
from utils.run.folder import RunFolder
from utils.teacher.cache import open_cache

SCRIPTS = {"run": "train_standalone", "ada": "train_AdaDistill", "shards": "train_standalone"}


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(ROOT / "tests" / "golden" / "runs_of_version_1.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_configuration_loads_with_every_value_it_had(before, name):
    written = json.loads((before / name / "config.json").read_text())
    cfg = load_config(before / name / "config.json")
    assert {key: cfg[key] for key in written} == written


def test_the_teacher_cache_is_that_of_the_set(before):
    dataset = MXFaceDataset(str(before / "set"))
    cache = open_cache(before / "cache", dataset)
    kept = np.load(before / "cache" / "features.npy")
    assert np.array_equal(cache.read(range(len(dataset))), kept) and kept.shape == (24, 2, 8)


@pytest.mark.processes
@pytest.mark.parametrize("name, ranks", [("run", 1), ("ada", 1), ("shards", 2)])
def test_the_run_goes_on(before, tmp_path, name, ranks):
    folder = before / name
    state = RunFolder(folder).load_state(3)
    output = run(
        ROOT / "train" / f"{SCRIPTS[name]}.py",
        "--config",
        folder / "config.json",
        "--resume",
        "device=cpu",
        "num_epoch=2",
        f"output={folder}",
        f"rec={before / 'set'}",
        f"teacher_embeddings={before / 'cache' if name == 'ada' else ''}",
        ranks=ranks,
    )
    assert "Resumed at step 3, epoch 1, 0 of its images done" in output
    assert "Finished at step 6" in output
    assert "begun by an earlier version, which had no " in output
    assert "instead of None" not in output
    after = RunFolder(folder).load_state(6)
    assert after.keys() >= state.keys() and after["step"] == 6
    for key, tensor in state["optimizer"]["state"][0].items():
        assert after["optimizer"]["state"][0][key].shape == tensor.shape
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert torch.isfinite(torch.tensor([row["loss"] for row in rows if "loss" in row])).all()
