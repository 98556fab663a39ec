#!/usr/bin/env bash
# Memory and time of a million classes on two ranks of this machine's CPU: ./bench/large_header.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
set_up requirement.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / 2 > 0 ? $(nproc) / 2 : 1))} MALLOC_TOP_PAD_=0 MALLOC_TRIM_THRESHOLD_=0      # freed memory must not count as held
exec "$PYTHON" "$root/launch/torchrun.py" --standalone --nproc_per_node 2 "$root/bench/large_header.py"
