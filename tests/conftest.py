"""Tests run from any directory: the repository root comes first on the path, as in the entry scripts."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
