#!/usr/bin/env bash
# Train with train/train_AdaDistill.py: one process per GPU of this machine, or one on the CPU.
# Arguments are passed on:
#   ./run_AdaDistill.sh loss=CosFace m=0.35 output=output/cos
#   ./run_AdaDistill.sh --resume output=output/cos
# Several machines: set NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and NPROC_PER_NODE. Restarts
# after a failure: MAX_RESTARTS. SLURM: launch/slurm.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch/environment.sh"
launch train/train_AdaDistill.py "$@"
