"""How the class centres lie in memory: shared out over the ranks, float32 or bf16, GPU or host.

Every rank holds a contiguous share of the classes as rows of ``weight`` (classes of this rank, D),
in float32 or bf16, beside the network or in the host's memory: ceil(C / ranks) of them, the last
ranks fewer or none where that does not come out even (four classes on three ranks: 2, 2, 0).
Nothing here copies all of them: they are read, and learned ones moved, block by block. Checkpoints
speak of the whole published kernel (D, C), or of rows of the whole (C, D) that any number of ranks
can share out anew (utils/run/header_shards.py).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from utils import distributed

INIT_STD = 0.01
# Classes drawn from one seed, so that a rank draws its own share only and every world size draws
# the same.
INIT_CHUNK = 4096
# The shortest length that a vector is divided by, as in F.normalize.
NORM_EPS = 1e-12
# Centres at a time: on a CPU what stays in its cache, on a GPU what keeps it busy. MPS gets all at
# once: PyTorch has written wrong products there into a part of a matrix (out=).
BLOCK_ROWS = {"cpu": 512, "cuda": 32768, "mps": 1 << 20}


class Place(NamedTuple):
    """Where the classes of a batch lie, seen from one rank.

    is_local (B,) bool: the class is this rank's; local_row (B,): its row there, and some row where
    it is another rank's. All B, whoever owns them: to pick out its own, a rank would have to wait
    for its GPU and count them.
    """

    is_local: torch.Tensor
    local_row: torch.Tensor


class ReusableMatrix:
    """Memory of one matrix, kept from step to step.

    On a CPU fresh pages cost as much as the arithmetic on them.
    """

    def __init__(self):
        self.spare = None

    def take(self, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """An uninitialised (rows, columns) float32 matrix, in the spare memory if that suffices."""
        spare, self.spare = self.spare, None
        if spare is None or spare.device != device or spare.numel() < rows * columns:
            spare = torch.empty(rows * columns, device=device)
        return spare[: rows * columns].view(rows, columns)

    def give_back(self, matrix: torch.Tensor) -> None:
        self.spare = matrix._base


class CenterStorage(nn.Module):
    """(C, D) class centres, of which this rank holds rows ``start`` to ``stop``, from N(0, 0.01).

    dtype: float32 or bf16. on_host: they stay in the host's memory wherever the module is moved.
    """

    # Whether anything moves them: SGD, or the teacher's features.
    moves = True
    learned = False
    follows_teacher = False
    # Of SGD, (classes of this rank, D); None: not moved yet, or not by SGD.
    momentum = None

    def __init__(
        self,
        num_classes,
        embedding_size,
        dtype=torch.float32,
        on_host=False,
        adaptive_alpha=True,
        constant_alpha=0.0,
    ):
        super().__init__()
        self.adaptive_alpha = adaptive_alpha
        self.constant_alpha = constant_alpha
        share = -(-num_classes // distributed.world_size())
        self.num_classes = num_classes
        self.on_host = on_host
        self.start = min(share * distributed.rank(), num_classes)
        self.stop = min(self.start + share, num_classes)
        weight = draw_rows(self.start, self.stop, embedding_size, dtype)
        if self.learned:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)
        self.matrix = ReusableMatrix()
        # (state of weight, 1 / the centres' lengths then)
        self.measured = None

    def _apply(self, fn, recurse=True):
        return self if self.on_host else super()._apply(fn, recurse)

    def follow(self, teacher, cos_st, lam, place: Place) -> dict:
        """Move towards the teacher's features: AdaDistill's alone; returns its statistics."""
        return {}

    def locate(self, labels: torch.Tensor) -> Place:
        """labels: (B,) of the global batch."""
        is_local = (labels >= self.start) & (labels < self.stop)
        last_row = max(self.stop - self.start - 1, 0)
        return Place(is_local, (labels - self.start).clamp(0, last_row))

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of ``weight`` (n, D) float32 on the device of ``rows``, without gradient.

        Zeros on a rank without classes.
        """
        if not len(self.weight):
            return torch.zeros(len(rows), self.weight.shape[1], device=rows.device)
        return self.weight.detach()[rows.to(self.weight.device)].to(rows.device, torch.float32)

    def put(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Set rows of ``weight`` to values (n, D) float32; bf16 is rounded to nearest."""
        per_length = self.per_length()
        rows = rows.to(self.weight.device)
        values = values.to(self.weight)
        self.weight[rows] = values
        per_length[rows] = one_over_length(values.float())
        self.measured = state_of(self.weight), per_length

    def blocks(
        self, chosen: torch.Tensor | None, device: torch.device, size: int = 0
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield (their places in ``chosen``, those centres (n, D) float32 on ``device``).

        chosen: row numbers, None: all. size: centres at a time; 0: all at once if they already lie
        there like that, else BLOCK_ROWS. A rank without classes gets one block of no rows, so that
        its sums have a shape.
        """
        weight = self.weight.detach()
        in_place = chosen is None and weight.device == device and weight.dtype == torch.float32
        count = len(weight) if chosen is None else len(chosen)
        size = size or (max(count, 1) if in_place else BLOCK_ROWS[device.type])
        for first in range(0, max(count, 1), size):
            part = slice(first, min(first + size, count))
            rows = part if chosen is None else chosen[part]
            yield part, weight[rows].to(device, torch.float32)

    @torch.no_grad()
    def per_length(self) -> torch.Tensor:
        """(classes of this rank,) 1 / length of every centre.

        Kept while ``weight`` stays as it is: reading all of it again costs a tenth of a step.
        """
        state = state_of(self.weight)
        if self.measured is None or self.measured[0] != state:
            blocks = self.blocks(None, self.weight.device)
            self.measured = state, torch.cat([one_over_length(block) for _, block in blocks])
        return self.measured[1]

    def whole(self, shard: torch.Tensor) -> torch.Tensor:
        """Any (classes of this rank, D) -> the whole (D, C) on every rank, in the host's memory.

        A collective: call it on all ranks.
        """
        return distributed.all_gather_rows(shard.detach().cpu()).t().contiguous()

    def shard(self, whole: torch.Tensor) -> torch.Tensor:
        """The whole (D, C) -> this rank's (classes, D)."""
        return whole[:, self.start : self.stop].t().contiguous()

    def sample(self, place: Place, rate: float) -> tuple[torch.Tensor | None, Place]:
        """That share of this rank's centres: those of the batch and others drawn at random.

        Partial FC (An et al., CVPR 2022). Returns (the chosen rows of ``weight`` ascending, None:
        all; the batch's places among them). A share smaller than the global batch has the batch's
        size: how many classes a batch really has here is known to the GPU alone.
        """
        count, device = len(self.weight), self.weight.device
        rows = place.local_row
        share = classes_sampled(rate, count, len(rows))
        if rate == 1 or share == count:
            return None, place
        # the centres of the batch always come along
        of_batch = torch.where(place.is_local, 2.0, 0.0).to(device)
        chance = torch.rand(count, device=device)
        chance.scatter_reduce_(0, rows.to(device), of_batch, "amax")
        chosen = chance.topk(share, sorted=False).indices.sort().values
        among = torch.searchsorted(chosen, rows.to(device)).clamp_(max=share - 1)
        return chosen, Place(place.is_local, among.to(rows.device))


def classes_sampled(rate: float, count: int, batch: int) -> int:
    """Of ``count`` classes of a rank, those that take part for a global batch of ``batch``."""
    return max(round(rate * count), min(batch, count))


def store(tensor: torch.Tensor, rows, values: torch.Tensor) -> None:
    """Write float32 values into rows of a float32 or bf16 tensor.

    bf16 is rounded up or down at random, so that steps smaller than its resolution still count.
    """
    if tensor.dtype == torch.bfloat16:
        bits = values.view(torch.int32)
        noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device)
        values = ((bits + noise) & ~0xFFFF).view(torch.float32)
    tensor.detach()[rows] = values.to(tensor)


def state_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Changes whenever the tensor's values do: where they lie, and how often they were written."""
    return tensor.data_ptr(), tensor._version


def one_over_length(rows: torch.Tensor) -> torch.Tensor:
    """(n, D) -> (n,), bounded as F.normalize bounds it."""
    return torch.linalg.vector_norm(rows, dim=1).clamp_min_(NORM_EPS).reciprocal_()


def draw_rows(start: int, stop: int, embedding_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows start..stop of one N(0, 0.01) matrix.

    It depends on rank 0's random state only, not on how many ranks share it.
    """
    seed = int(distributed.broadcast(torch.randint(2**62, (1,))))
    rows = torch.empty(stop - start, embedding_size, dtype=dtype)
    for chunk in range(start // INIT_CHUNK, -(-stop // INIT_CHUNK)):
        generator = torch.Generator().manual_seed(seed + chunk)
        drawn = torch.empty(INIT_CHUNK, embedding_size).normal_(0, INIT_STD, generator=generator)
        offset = chunk * INIT_CHUNK
        first, last = max(start, offset), min(stop, offset + INIT_CHUNK)
        rows[first - start : last - start] = drawn[first - offset : last - offset]
    return rows
