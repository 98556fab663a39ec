#!/usr/bin/env bash
# Train on several machines under SLURM. From the repository's folder:
#   sbatch --nodes=2 launch/slurm.sh run_AdaDistill.sh loss=CosFace output=output/cos
# To go on with a run that was ended for good:
#   sbatch launch/slurm.sh run_AdaDistill.sh --resume output=output/cos
# Options of sbatch override the lines below; edit them to your cluster. The repository, the data
# and output must be on a file system that all machines share.
#
# Five minutes before the time limit, or as long before a pre-emption as the cluster allows, SLURM
# sends USR1: the run finishes its step, saves a state and ends with 0, and the job is put back into
# the queue, under the same number. When it starts again it goes on by --resume from that state.
# Exit status: 0 when the training has reached its last epoch or was put back into the queue, else
# that of the run scripts.
# At `scancel JOB` (TERM) the run saves a state, too, if the cluster's KillWait is long enough, and
# the job is not queued again.
#
# One run script a machine; torchrun starts a process for each of its GPUs.
#SBATCH --job-name=distill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

fail() { echo "error: $*" >&2; exit 1; }

usage="sbatch launch/slurm.sh run_AdaDistill.sh key=value ..."
[ -n "${SLURM_JOB_ID:-}" ] || fail "this is a batch script: $usage"
# SLURM runs a copy of this file from a folder of its own
cd "${SLURM_SUBMIT_DIR:?}"
script=${1:-}
if [[ $script != run_*.sh || ! -x $script ]]; then
    fail "no run script '$script' in $PWD: $usage, from the repository's folder"
fi
shift

# a job that was queued again goes on from its newest state; one that never saved any begins anew
output=""
for argument in "$@"; do
    case $argument in output=*) output=${argument#output=} ;; esac
done
[ -n "$output" ] ||
    fail "name the run's folder, output=..., so that the job finds its states when it starts again"
resume=()
if [ "${SLURM_RESTART_COUNT:-0}" != 0 ] && compgen -G "$output/*state.pth" > /dev/null; then
    resume=(--resume)
fi

export NNODES=$SLURM_JOB_NUM_NODES MASTER_ADDR MASTER_PORT RDZV_ID
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts[0]:?scontrol names no machine of this job}
# two jobs may share a machine
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
# a name of its own for every start, the same on all machines
RDZV_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}

stopping=""
# --wait: when one machine's script has ended, the others get ten minutes; at once would be too soon
# for the one that still saves. --cpus-per-task: srun no longer takes it over from sbatch
srun --kill-on-bad-exit=0 --wait=600 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    bash -c 'export NODE_RANK=$SLURM_NODEID; exec "$0" "$@"' \
    "./$script" ${resume[@]+"${resume[@]}"} "$@" &
step=$!
# srun hands USR1 on to the run scripts, which finish their step and save; at TERM it would end them
trap 'stopping=requeue; kill -USR1 "$step" 2>/dev/null' USR1
trap 'stopping=end; kill -USR1 "$step" 2>/dev/null' TERM
status=0
wait "$step" || status=$?
while [ "$status" -gt 128 ] && kill -0 "$step" 2>/dev/null; do
    status=0
    wait "$step" || status=$?
done

if [ "$stopping" = requeue ]; then
    # 128 + USR1 or TERM: torchrun, too, had the signal, from srun or from its run script, and says
    # so when its processes have saved and ended
    if [ "$status" = 0 ] || [ "$status" = 138 ] || [ "$status" = 143 ]; then
        echo "saved; job $SLURM_JOB_ID goes back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    echo "error: the run ended with status $status when it was asked to save;" \
        "it is not queued again" >&2
fi
exit "$status"
