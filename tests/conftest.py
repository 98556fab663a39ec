"""Tests run from any directory: the repository root comes first on the path, as in the entry
scripts.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

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
