"""Tests run from any directory: the repository root comes first on the path, as in the entry scripts."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """As the commands have in tests: threads that compete with other processes for the cores are many times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
