"""Runs mxnet_interop.py inside .venv-mxnet, where the real MXNet lives.

Skipped where that cannot be made, except in CI.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils.dataset.records import MXFaceDataset
from utils.errors import InputError
from utils.recordio.writer import write_insightface

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def mxnet_python():
    made = subprocess.run(
        ["bash", ROOT / "tests" / "recordio" / "setup_mxnet.sh"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
    )
    if made.returncode and "CI" not in os.environ:
        pytest.skip(f"no environment for MXNet: {made.stderr.strip()[-300:]}")
    assert made.returncode == 0, made.stderr
    return ROOT / ".venv-mxnet" / "bin" / "python"


@pytest.mark.processes
@pytest.mark.timeout(900)  # the first call downloads MXNet
def test_both_directions_with_the_real_mxnet(mxnet_python, tmp_path):
    result = subprocess.run(
        [mxnet_python, ROOT / "tests" / "recordio" / "mxnet_interop.py", tmp_path],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all equal" in result.stdout


def test_mxnet_backend_says_how_to_get_mxnet(tmp_path):
    write_insightface(tmp_path, [[b"image"]])
    with pytest.raises(InputError, match="requirements/mxnet.txt"):
        MXFaceDataset(tmp_path, backend="mxnet")
