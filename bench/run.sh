#!/usr/bin/env bash
# How much faster than the plain way, as ratios measured in one run; a few minutes, a table at the
# end.
#   ./bench/run.sh                     on CPU cores
#   ./bench/run.sh --cuda              on a GPU
#   ./bench/run.sh --only header       one part: data, augmentation, header, training, evaluation
#   ./bench/run.sh --full              evaluation at the full sizes of IJB-C and TinyFace
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
set_up test.txt "sklearn, datasets"
"$PYTHON" "$root/bench/run.py" "$@"
