#!/usr/bin/env bash
# Memory and time of a million classes on two ranks of this machine's CPU: ./bench/large_header.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
set_up requirement.txt
half=$(($(nproc) / 2))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((half > 0 ? half : 1))}
# freed memory must not count as held
export MALLOC_TOP_PAD_=0 MALLOC_TRIM_THRESHOLD_=0
exec "$PYTHON" "$root/launch/torchrun.py" --standalone --nproc_per_node 2 \
    "$root/bench/large_header.py"
