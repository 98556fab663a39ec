# Sourced by the run scripts: finds or makes the Python environment, and starts torchrun.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# activations of a network on a CPU are tens of MB: keep them in the heap instead of asking the
# kernel for zeroed pages every time (a tenth of a step)
export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-17179869184}
export MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-268435456}

fail() { echo "error: $*" >&2; exit 1; }

packages="torch, torchvision, numpy, cv2, PIL, easydict, safetensors, tensorboard, tqdm"
packages="$packages, matplotlib, jinja2"
# what tests need beside them
test_packages="pytest, pytest_timeout, xdist, datasets, huggingface_hub, yaml, sklearn, skimage"
test_packages="$test_packages, webdataset, onnx, onnxruntime"

# has_packages PYTHON [MODULES]: whether they are installed and new enough; importing them would
# take seconds at every start of a run script
has_packages() {
    "$1" -c "import sys
from importlib.metadata import version
from importlib.util import find_spec
names = '$packages${2:+, $2}'.split(', ')
if sys.version_info < (3, 10) or None in map(find_spec, names):
    sys.exit(1)
sys.exit(tuple(map(int, version('torch').split('.')[:2])) < (2, 11))" 2>/dev/null
}

# can_import [MODULES]: whether PYTHON loads them, too; says why not
can_import() { "$PYTHON" -c "import $packages${1:+, $1}"; }

# find_python [MODULES]: PYTHON = .venv's or the caller's python, whichever has the packages (and
# MODULES)
find_python() {
    local candidate
    for candidate in "$root/.venv/bin/python" python3 python; do
        if command -v "$candidate" >/dev/null && has_packages "$candidate" "${1:-}"; then
            PYTHON=$(command -v "$candidate")
            return 0
        fi
    done
    return 1
}

# can_make_venv PYTHON
can_make_venv() {
    command -v "$1" >/dev/null || return 1
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

# set_up FILE [MODULES]: make .venv from requirements/FILE unless some python has the packages
# already
set_up() {
    find_python "${2:-}" && can_import "${2:-}" 2>/dev/null && return
    local candidate chosen=""
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if can_make_venv "$candidate"; then
            chosen=$candidate
            break
        fi
    done
    [ -n "$chosen" ] ||
        fail "Python 3.10 or newer with the venv module is needed" \
            "(Debian: apt install python3-venv)"
    echo "Setting up $root/.venv from requirements/$1 (several GB, a few minutes)"
    local python=$root/.venv/bin/python
    # a .venv that an interrupted set-up left behind is completed, not trusted
    [ -x "$python" ] || "$chosen" -m venv "$root/.venv" || fail "cannot make $root/.venv"
    "$python" -m pip install --quiet --disable-pip-version-check -r "$root/requirements/$1" ||
        fail "installing requirements/$1 failed"
    find_python "${2:-}" ||
        fail "the packages of requirements/$1 are not all in $root/.venv after their installation"
    local reason
    reason=$(can_import "${2:-}" 2>&1) ||
        fail "the packages of requirements/$1 are installed, but $PYTHON does not import them:" \
            "$(tail -1 <<< "$reason")"
}

# several_machines: rendezvous = torchrun's arguments for NNODES machines that meet at
# MASTER_ADDR:MASTER_PORT, where the one with NODE_RANK=0 is the host
several_machines() {
    local port=${MASTER_PORT:-29500} id=${RDZV_ID:-} own=()
    : "${NODE_RANK:?set NODE_RANK: 0 on the first machine, 1, 2, ... on the others}"
    : "${MASTER_ADDR:?set MASTER_ADDR: the name or address of the first machine}"
    # processes that torchrun has restarted take up the run of their own launch: its name must be
    # new each time, and the same on all machines
    [ -n "$id" ] || [ "${MAX_RESTARTS:-0}" = 0 ] ||
        fail "MAX_RESTARTS=$MAX_RESTARTS on several machines needs RDZV_ID," \
            "a name for this launch, the same on all: RDZV_ID=run7"
    local address=("$MASTER_ADDR" "$port" ${NODE_ADDR:+"$NODE_ADDR"})
    mapfile -t own < <("$PYTHON" "$root/launch/node_address.py" "${address[@]}")
    [ -n "${own[0]:-}" ] || exit 1
    # a fresh store for every meeting: in a shared one, machines that come back would find the
    # addresses of processes that are gone
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    # gloo, which carries what the hosts agree on (all of it on CPUs), would ask the host's name for
    # its interface
    [ -z "${own[1]:-}" ] || export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-${own[1]}}
    local host=0
    [ "$NODE_RANK" != 0 ] || host=1
    rendezvous=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --rdzv_backend c10d
                --rdzv_endpoint "$MASTER_ADDR:$port" --rdzv_id "${id:-$MASTER_ADDR:$port}"
                --rdzv_conf "is_host=$host,read_timeout=600" --local_addr "${own[0]}")
}

# launch SCRIPT ARGUMENTS: torchrun on this machine's GPUs, or as NNODES, NODE_RANK, MASTER_ADDR,
# MASTER_PORT, NPROC_PER_NODE and MAX_RESTARTS say
launch() {
    find_python ||
        fail "the packages are not installed: pip install -r requirements/requirement.txt" \
            "(run_demo.sh does it)"
    local script=$1 processes=${NPROC_PER_NODE:-} rendezvous=(--standalone)
    shift
    # one device is named: one process
    case " $* " in
        *" device=cpu "* | *" device=cuda:"* | *" device=mps "*) processes=${processes:-1} ;;
    esac
    processes=${processes:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
    [ "${NNODES:-1}" = 1 ] || several_machines
    # all cores of the machine (Linux, macOS), shared out
    local cores
    cores=$(nproc 2>/dev/null || sysctl -n hw.ncpu)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / processes > 0 ? cores / processes : 1))}
    # signals that reach torchrun itself are passed on, and the processes get time to save
    local signals=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
    export TORCHELASTIC_SIGNALS_TO_HANDLE=${TORCHELASTIC_SIGNALS_TO_HANDLE:-$signals}
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
    "$PYTHON" "$root/launch/torchrun.py" "${rendezvous[@]}" --nproc_per_node "$processes" \
        --max_restarts "${MAX_RESTARTS:-0}" "$root/$script" "$@" &
    torchrun=$!
    trap 'kill -TERM $(children_of "$torchrun") 2>/dev/null' TERM USR1 INT
    local status=0
    wait "$torchrun" || status=$?
    while [ "$status" -gt 128 ] && kill -0 "$torchrun" 2>/dev/null; do
        status=0
        wait "$torchrun" || status=$?
    done
    exit "$status"
}

# children_of PID: the training processes of torchrun. A signal goes to them: they finish the step,
# save and exit with 0, and so does torchrun
children_of() {
    cat "/proc/$1/task/"*/children 2>/dev/null || pgrep -P "$1" 2>/dev/null
}
