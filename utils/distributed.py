"""Ranks, devices and the few collectives this project uses; a world of one needs no process group.

Under torchrun the environment names the rank (RANK, LOCAL_RANK, WORLD_SIZE). Without it, or with
one process, every function here is the identity, so the code above never asks how many ranks there
are.
"""

import atexit
import os
import pickle
import sys
import time
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from utils.errors import InputError

_alone = False
# collectives and batches that this rank has begun: what utils/run/hang_watch.py compares
begun = 0
# the slowest wait of a rank: another one writing checkpoints or loading sets
TIMEOUT = timedelta(minutes=30)
# seconds in which gloo's thread has long let go of a collective's tensors
LET_GO = 1.0
# where every rank does work of its own
PATIENCE = timedelta(days=30)


def init(device: str = "auto", timeout: timedelta = TIMEOUT) -> torch.device:
    """Choose this process's device and join the other ranks (nccl on CUDA, gloo on CPUs).

    timeout: the longest wait of a collective, after which the waiting ranks die without a word;
    utils/run/hang_watch.py speaks earlier.
    device: "auto" (a CUDA GPU if there is one), "cpu", "cuda", "cuda:N" or "mps". Under torchrun
    each rank takes cuda:LOCAL_RANK.
    Raises InputError if a GPU is asked for and there is none, or fewer than ranks on this machine,
    and for several ranks on MPS.
    """
    if device == "mps":
        check_mps()
        return torch.device("mps")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            f"device={device} asks for a GPU, but PyTorch sees none here; set "
            "device=cpu or install a CUDA driver"
        )
    if device == "cpu" or not torch.cuda.is_available():
        chosen = torch.device("cpu")
    else:
        if ":" in device and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
            raise InputError(
                f"device={device} names one GPU for several processes: set "
                "device=cuda, each takes its own, or NPROC_PER_NODE=1"
            )
        index = int(device.split(":")[1]) if ":" in device else local_rank
        if index >= torch.cuda.device_count():
            raise InputError(
                f"rank {os.environ.get('RANK', 0)} needs cuda:{index}, but this "
                f"machine has {torch.cuda.device_count()} GPUs; "
                "start at most one process per GPU (NPROC_PER_NODE)"
            )
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # gloo beside nccl: flags and strings travel between the hosts without touching the GPU's
        # queue
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
            timeout=timeout,
            device_id=chosen if chosen.type == "cuda" else None,
            **meeting_place(),
        )
    return chosen


def check_mps() -> None:
    """Raises InputError if this process cannot have an Apple GPU for itself."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(
            "device=mps: an Apple GPU is used by one process; set NPROC_PER_NODE=1 "
            "(and accumulate for larger steps), or device=cpu"
        )
    if not torch.backends.mps.is_available():
        reason = "PyTorch finds no Apple GPU here"
        if not torch.backends.mps.is_built():
            reason = f"this PyTorch ({torch.__version__}) was built without it"
        raise InputError(
            f"device=mps asks for an Apple GPU, but {reason}; set device=cpu, or "
            "device=cuda for an NVIDIA GPU"
        )


def meeting_place() -> dict:
    """Where the ranks meet after torchrun has restarted them.

    Nothing (its usual store), or a fresh part of that store: torchrun keeps one store for all
    restarts of a launch (pytorch issue 135712), in which the addresses of the ranks that have died
    are still found. On several machines, which may have restarted differently often,
    launch/environment.sh has it make a new store each time instead.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if (
        restarts == "0"
        or os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]
        or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    ):
        return {}
    return dict(
        store=dist.PrefixStore(f"restart {restarts}", join_store(TIMEOUT)),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def join_store(timeout: timedelta) -> dist.TCPStore:
    """The store that torchrun keeps for a launch."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=timeout)


def shutdown() -> None:
    """Leave the other ranks; with several of them, end this process with exit status 0.

    The last call of a command that has done all its work. The interpreter would still take down
    DistributedDataParallel and gloo's threads, and PyTorch aborts now and then while it does
    ("terminate called without an active exception"): torchrun would report a finished run as
    failed, or start it again. So what the interpreter does for others is done here: what is
    registered with atexit (temporary folders, logs, child processes), and the streams are flushed.
    """
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        # whoever read it has gone: there is nobody left to tell
        with suppress(BrokenPipeError):
            stream.flush()
    os._exit(0)


@contextmanager
def alone():
    """Within, this process is the only rank to itself: work of its own, and no collective runs."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def begin() -> None:
    """Count a collective or another step of the work, for the watch."""
    global begun
    begun += 1


@contextmanager
def settled(*tensors: torch.Tensor):
    """Around a collective: wait until gloo's thread has let go of the tensors, too.

    It does so a moment after the collective has ended, and takes Python's interpreter lock for it.
    A process that is forked in this moment (a DataLoader's worker) would wait for ever, in Python
    before 3.13, for a lock that the thread holds: that thread does not exist there.
    """
    if tensors[0].device.type != "cpu":
        yield
        return

    def count_references() -> list[int]:
        return [sys.getrefcount(tensor) for tensor in tensors]

    def is_held() -> bool:
        # counted as before: whatever else looks at a tensor refers to it, too
        return any(now > alone for now, alone in zip(count_references(), before, strict=True))

    before = count_references()
    yield
    last = time.monotonic() + LET_GO
    while is_held() and time.monotonic() < last:
        # the other threads' turn
        time.sleep(0)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def is_main() -> bool:
    return rank() == 0


def place_on_node() -> tuple[int, int]:
    """(number of this rank among those of its machine, number of these)."""
    if world_size() == 1:
        return 0, 1
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def once_per_node(function):
    """The value of ``function()``, a small picklable one, of the first rank of each machine, on all
    its ranks; an InputError of any is raised on all.

    The others wait as long as it takes.
    """
    group = patient_group()
    local_rank, _ = place_on_node()
    value = all_succeed(lambda: function() if local_rank == 0 else None, group)
    # torchrun counts the ranks of a machine one after the other
    return all_gather_object(value, group)[rank() - local_rank]


def barrier() -> None:
    """Wait for every rank, on the host."""
    all_reduce(torch.zeros(1))


def all_reduce(tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
    """Reduce in place over all ranks ("sum" or "max") and return the tensor."""
    if world_size() > 1:
        begin()
        with settled(tensor):
            dist.all_reduce(tensor, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
    return tensor


def all_reduce_async(tensor: torch.Tensor):
    """Start a sum over all ranks; returns a handle with ``wait()``, or None in a world of one."""
    return dist.all_reduce(tensor, async_op=True) if world_size() > 1 else None


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Overwrite the tensor with rank 0's and return it."""
    if world_size() > 1:
        begin()
        with settled(tensor):
            dist.broadcast(tensor, 0)
    return tensor


def all_gather_object(value, group=None) -> list:
    """Every rank's small picklable value, in rank order. group: None, or a ``patient_group()``.

    As torch.distributed.all_gather_object, which pickles between the processes of a launch, too,
    but by tensors that can be ``settled``.
    """
    if world_size() == 1:
        return [value]
    begin()
    content = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    sizes = gather_equal(torch.tensor([len(content)]), group).tolist()
    padded = content.new_zeros(max(sizes))
    padded[: len(content)] = content
    parts = gather_equal(padded, group).split(len(padded))
    return [
        pickle.loads(part[:size].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)
    ]


def patient_group():
    """All ranks, who may wait for each other for days; all call it together.

    None in a world of one.
    """
    return dist.new_group(backend="gloo", timeout=PATIENCE) if world_size() > 1 else None


def all_succeed(function, group=None):
    """Call ``function()`` on every rank and return its value; an InputError of any rank is raised
    on all of them, so that none waits for another.

    ``group``: None, or a ``patient_group()``.
    """
    value, error = None, None
    try:
        value = function()
    except InputError as caught:
        error = caught
    errors = all_gather_object(None if error is None else str(error), group)
    if any(errors):
        raise error or InputError(next(filter(None, errors)))
    return value


def main_computes(function):
    """Rank 0's value of ``function()``, a small picklable one, or its InputError, on every rank."""
    return all_gather_object(all_succeed(lambda: function() if is_main() else None))[0]


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate along the first axis, in rank order; every rank gives the same shape."""
    if world_size() == 1:
        return tensor
    begin()
    return gather_equal(tensor.contiguous())


def gather_equal(tensor: torch.Tensor, group=None) -> torch.Tensor:
    gathered = tensor.new_empty((world_size() * tensor.shape[0], *tensor.shape[1:]))
    with settled(tensor, gathered):
        dist.all_gather_into_tensor(gathered, tensor, group)
    return gathered


def all_gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate along the first axis, in rank order; a rank gives any number of rows, or none."""
    if world_size() == 1:
        return tensor
    counts = all_gather(torch.tensor([tensor.shape[0]], device=tensor.device)).tolist()
    padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    parts = all_gather(padded).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _GatherFeatures(torch.autograd.Function):
    """All-gather forward; backward sums every rank's gradient of my rows and multiplies by the
    world size.

    Each rank sees the loss through its own class shard only, so the sum over ranks is the whole
    gradient of the global mean; the factor undoes DistributedDataParallel's division by the world
    size.
    """

    @staticmethod
    def forward(ctx, tensor):
        ctx.rows = tensor.shape[0]
        return all_gather(tensor)

    @staticmethod
    def backward(ctx, grad):
        begin()
        own_rows = grad.new_empty((ctx.rows, *grad.shape[1:]))
        grad = grad.contiguous()
        with settled(own_rows, grad):
            dist.reduce_scatter_tensor(own_rows, grad)
        return own_rows * world_size()


def gather_features(tensor: torch.Tensor) -> torch.Tensor:
    """(b, D) of this rank -> (b * world, D) of all ranks, differentiable (``_GatherFeatures``)."""
    return tensor if world_size() == 1 else _GatherFeatures.apply(tensor)


def is_own_row(rows: int, device: torch.device) -> torch.Tensor:
    """(rows,) bool: of what was gathered from all ranks in equal parts, those of this rank."""
    return torch.arange(rows, device=device) // (rows // world_size()) == rank()


def sync_buffers(module: torch.nn.Module) -> None:
    """Give all ranks rank 0's buffers (BatchNorm statistics), so that all evaluate one network."""
    if world_size() > 1:
        for buffer in module.buffers():
            broadcast(buffer)
