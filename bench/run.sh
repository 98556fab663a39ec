#!/usr/bin/env bash
# How much faster than the plain way, as ratios measured in one run.
#   ./bench/run.sh             a few minutes
#   ./bench/run.sh --full      evaluation at the full sizes of IJB-C and TinyFace
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
set_up test.txt "sklearn, datasets"
"$PYTHON" "$root/bench/evaluation.py" "$@"
