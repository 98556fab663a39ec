"""Tests run from any directory: the repository root comes first on the path, as in the entry
scripts.
"""

import logging
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """Unless OMP_NUM_THREADS says otherwise: threads that compete with other processes for the
    cores are many times slower.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def in_this_process(monkeypatch):
    """A training script may run in the tests' process: their signals and log stay their own."""
    monkeypatch.setattr(signal, "signal", lambda *_arguments: None)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="module")
def images():
    """(2, 3, 112, 112), of which golden/backbones.npz holds the outputs."""
    return torch.from_numpy(
        np.random.default_rng(5).uniform(-1, 1, (2, 3, 112, 112)).astype(np.float32)
    )


@pytest.fixture(scope="module")
def outputs():
    """{network: its golden output for ``images``}."""
    with np.load(ROOT / "tests" / "golden" / "backbones.npz") as archive:
        return dict(archive)
