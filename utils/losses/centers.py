"""Where the class centres come from: learned by SGD, the teacher's frozen header, or a moving
average of teacher features.

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
import torch.nn.functional as F
from torch import nn

from utils import distributed
from utils.precision import float64_device

INIT_STD = 0.01
# classes drawn from one seed, so that a rank draws its own share only and every world size draws
# the same
INIT_CHUNK = 4096
SHORTEST = 1e-12  # as F.normalize
# Centres at a time: on a CPU what stays in its cache, on a GPU what keeps it busy. MPS gets all at
# once: PyTorch has written wrong products there into a part of a matrix (out=).
BLOCK_ROWS = {"cpu": 512, "cuda": 32768, "mps": 1 << 20}


class Pending(NamedTuple):
    """A gradient in the form of its two factors: ``grad`` (B, n) of the products of features and
    centres, and ``features`` (B, D); chosen: the n rows, None: all.
    """

    grad: torch.Tensor
    features: torch.Tensor
    chosen: torch.Tensor | None


class Buffer:
    """Memory for one matrix that lives on from step to step: on a CPU fresh pages cost as much as
    the arithmetic on them.
    """

    def __init__(self):
        self.spare = None

    def take(self, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """An uninitialised (rows, columns) float32 matrix; the spare memory if it is large enough
        and not in use.
        """
        spare, self.spare = self.spare, None
        if spare is None or spare.device != device or spare.numel() < rows * columns:
            spare = torch.empty(rows * columns, device=device)
        return spare[: rows * columns].view(rows, columns)

    def give_back(self, matrix: torch.Tensor) -> None:
        self.spare = matrix._base


class ClassCenters(nn.Module):
    """(C, D) class centres of which this rank holds rows ``start`` to ``stop``, drawn from N(0,
    0.01).

    dtype: float32 or bf16. on_host: they stay in the host's memory wherever the module is moved.
    """

    learned = False  # by gradients
    moved = True  # by whatever it is

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        dtype: torch.dtype = torch.float32,
        on_host: bool = False,
    ):
        super().__init__()
        share = -(-num_classes // distributed.world_size())
        self.num_classes = num_classes
        self.on_host = on_host
        self.start, self.stop = (
            min(share * number, num_classes)
            for number in (distributed.rank(), distributed.rank() + 1)
        )
        weight = draw_rows(self.start, self.stop, embedding_size, dtype)
        if self.learned:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)
        self.measured = None
        self.buffer = Buffer()

    def _apply(self, fn, recurse=True):
        return self if self.on_host else super()._apply(fn, recurse)

    def locate(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """labels (B,) of the global batch -> (mine (B,) bool: the class lives here; columns (B,):
        its row of ``weight``, some row where it does not).

        All B, whoever owns them: to pick out its own, a rank would have to wait for its GPU and
        count them.
        """
        mine = (labels >= self.start) & (labels < self.stop)
        return mine, (labels - self.start).clamp(0, max(self.stop - self.start - 1, 0))

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of ``weight`` (n, D), float32, on the device of ``rows``; no gradient.

        Zeros on a rank without classes.
        """
        if not len(self.weight):
            return torch.zeros(len(rows), self.weight.shape[1], device=rows.device)
        return self.weight.detach()[rows.to(self.weight.device)].to(rows.device, torch.float32)

    def blocks(
        self, chosen: torch.Tensor | None, device: torch.device, size: int = 0
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield (their places in the order of ``chosen``, those centres (n, D) float32 on
        ``device``), ``size`` at a time.

        chosen: row numbers, None: all. size 0: all at once if they already lie there like that,
        else BLOCK_ROWS. A rank without classes gets one block of no rows, so that its sums have a
        shape.
        """
        in_place = (
            chosen is None and self.weight.device == device and self.weight.dtype == torch.float32
        )
        count = len(self.weight) if chosen is None else len(chosen)
        size = size or (max(count, 1) if in_place else BLOCK_ROWS[device.type])
        for first in range(0, max(count, 1), size):
            part = slice(first, min(first + size, count))
            yield (
                part,
                self.weight.detach()[part if chosen is None else chosen[part]].to(
                    device, torch.float32
                ),
            )

    @torch.no_grad()
    def per_length(self) -> torch.Tensor:
        """(classes of this rank,) 1 / length of every centre.

        Kept while ``weight`` stays as it is: reading all of it again costs a tenth of a step.
        """
        if self.measured is None or self.measured[0] != state_of(self.weight):
            self.measured = (
                state_of(self.weight),
                torch.cat(
                    [one_over_length(block) for _, block in self.blocks(None, self.weight.device)]
                ),
            )
        return self.measured[1]

    def whole(self, shard: torch.Tensor) -> torch.Tensor:
        """Any (classes of this rank, D) tensor -> the whole (D, C) on every rank, in the host's
        memory. A collective: call it on all ranks.
        """
        return distributed.all_gather_rows(shard.detach().cpu()).t().contiguous()

    def shard(self, whole: torch.Tensor) -> torch.Tensor:
        """The whole (D, C) -> this rank's (classes, D)."""
        return whole[:, self.start : self.stop].t().contiguous()


class LearnedCenters(ClassCenters):
    """Moved by SGD together with the backbone (standalone training).

    Autograd gives ``weight`` a gradient as usual. With ``defer`` it stays in its two factors, which
    are B / D of its size, until ``step`` moves the centres; those of every forward pass of a step,
    if there are several.
    """

    learned = True

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.defer = False
        self.pending = []
        self.momentum = None

    def gradient(
        self, pending: list[Pending], chosen: torch.Tensor | None, part: slice, block: torch.Tensor
    ) -> torch.Tensor:
        """The gradient of the centres ``block``, which lie at ``part`` of ``chosen``: without its
        share along the centre itself, whose length changes no cosine.
        """
        gradient = torch.zeros_like(block)
        for grad, features, columns in pending:
            gradient.addmm_(
                (grad[:, part] if columns is chosen else picked(grad, columns, chosen[part])).t(),
                features,
            )
        direction = block * one_over_length(block)[:, None]
        return gradient.sub_(direction.mul_((gradient * direction).sum(1, keepdim=True)))

    def dense_gradient(self, pending: Pending) -> torch.Tensor:
        """The gradient of all of ``weight``, for autograd."""
        dense = torch.zeros_like(self.weight)
        for part, block in self.blocks(
            pending.chosen, pending.grad.device, BLOCK_ROWS[pending.grad.device.type]
        ):
            dense[part if pending.chosen is None else pending.chosen[part]] = self.gradient(
                [pending], pending.chosen, part, block
            ).to(dense)
        return dense

    @torch.no_grad()
    def step(self, lr: float, momentum: float, weight_decay: float, scale: float = 1.0) -> None:
        """One step of SGD with the gradients that ``defer`` has kept, which are ``scale`` times too
        large; they are forgotten.

        Classes that were not sampled stay as they are, their momentum too, as in Partial FC (An et
        al. 2022).
        """
        pending = self.pending
        if self.momentum is None:
            self.momentum = torch.zeros_like(self.weight)
        chosen = pending[0].chosen
        if chosen is not None and len(pending) > 1:
            chosen = torch.cat([one.chosen for one in pending]).unique()
        device = pending[0].grad.device
        for part, block in self.blocks(chosen, device, BLOCK_ROWS[device.type]):
            rows = part if chosen is None else chosen[part]
            gradient = (
                self.gradient(pending, chosen, part, block)
                .div_(scale)
                .add_(block, alpha=weight_decay)
            )
            velocity = self.momentum[rows].to(device, torch.float32).mul_(momentum).add_(gradient)
            store(self.momentum, rows, velocity)
            store(self.weight, rows, block.sub_(velocity, alpha=lr))
        self.forget()

    def forget(self) -> None:
        """Drop the gradients that ``defer`` has kept, and give their memory back to the header."""
        for grad, _, _ in self.pending:
            self.buffer.give_back(grad)
        self.pending = []


class FrozenCenters(ClassCenters):
    """The teacher's trained header, moved by nothing (AMLDistill)."""

    moved = False


class AdaptiveCenters(ClassCenters):
    """w_y <- alpha w_y + (1 - alpha) t/|t|: the teacher's features, faster the less the student
    follows (AdaDistill, ECCV 2024).
    """

    @torch.no_grad()
    def update(
        self, teacher: torch.Tensor, alpha: torch.Tensor, mine: torch.Tensor, columns: torch.Tensor
    ) -> None:
        """Move the centres of this rank's classes.

        teacher (B, D) normalised and alpha (B,) of the global batch; mine and columns as ``locate``
        gives them. Several images of one class start from the same old centre and their results are
        averaged, in float64, so that their order cannot be seen.
        """
        if not len(self.weight):
            return
        old = self.take(columns)
        moved = alpha[:, None] * old + (1 - alpha[:, None]) * teacher
        same = (columns[:, None] == columns) & mine & mine[:, None]
        mean = self.mean_of_same(moved, same)
        # every write to a row must say the same: images of one class repeat its first, those of
        # other ranks the first of this rank
        first = mine.int().argmax(0, keepdim=True)
        source = torch.where(mine, same.int().argmax(1), first)
        rows, moved = columns[source], torch.where(mine[first][:, None], mean[source], old[source])
        per_length = self.per_length()
        rows, moved = rows.to(self.weight.device), moved.to(self.weight)
        self.weight[rows] = moved
        per_length[rows] = one_over_length(moved.float())
        self.measured = state_of(self.weight), per_length

    @staticmethod
    def mean_of_same(moved: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
        """moved (B, D), same (B, B) bool -> (B, D): for each row the mean of those that are the
        same as it.
        """
        # copied first and converted then: an MPS tensor cannot become float64 on its way
        device = float64_device(moved.device)
        same, exact = same.to(device), moved.to(device).double()
        mean = same.double() @ exact / same.sum(1, keepdim=True).clamp_min(1)
        return mean.float().to(moved.device)


def picked(grad: torch.Tensor, columns: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Columns of ``grad`` (B, n), which are those of the classes ``columns`` (n,) ascending: of
    ``wanted`` (k,), zero for the others.
    """
    at = torch.searchsorted(columns, wanted).clamp_(max=len(columns) - 1)
    return grad[:, at.to(grad.device)] * (columns[at] == wanted).to(grad.device)


def store(tensor: torch.Tensor, rows, values: torch.Tensor) -> None:
    """Write float32 values into rows of a float32 or bf16 tensor; bf16 is rounded up or down at
    random, so that steps smaller than its resolution still count.
    """
    if tensor.dtype == torch.bfloat16:
        bits = values.view(torch.int32)
        noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device)
        values = ((bits + noise) & ~0xFFFF).view(torch.float32)
    tensor.detach()[rows] = values.to(tensor)


def state_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Changes whenever the tensor's values do: where they lie, and how often they were written in
    place.
    """
    return tensor.data_ptr(), tensor._version


def one_over_length(rows: torch.Tensor) -> torch.Tensor:
    """(n, D) -> (n,), bounded as F.normalize bounds it."""
    return torch.linalg.vector_norm(rows, dim=1).clamp_min_(SHORTEST).reciprocal_()


def draw_rows(start: int, stop: int, embedding_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows start..stop of one N(0, 0.01) matrix that depends on rank 0's random state only, not on
    how many ranks share it.
    """
    seed = int(distributed.broadcast(torch.randint(2**62, (1,))))
    rows = torch.empty(stop - start, embedding_size, dtype=dtype)
    for chunk in range(start // INIT_CHUNK, -(-stop // INIT_CHUNK)):
        drawn = torch.empty(INIT_CHUNK, embedding_size).normal_(
            0, INIT_STD, generator=torch.Generator().manual_seed(seed + chunk)
        )
        first, last = max(start, chunk * INIT_CHUNK), min(stop, (chunk + 1) * INIT_CHUNK)
        rows[first - start : last - start] = drawn[
            first - chunk * INIT_CHUNK : last - chunk * INIT_CHUNK
        ]
    return rows


def cosine_to_own_center(
    features: torch.Tensor, centers: ClassCenters, mine: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """cos(feature, own centre) (B,) on every rank, no gradient; features (B, D) normalised, each
    value known to one rank and summed.
    """
    return distributed.all_reduce(
        torch.where(mine, (F.normalize(centers.take(columns)) * features).sum(1), 0.0)
    )


CENTERS = {"standalone": LearnedCenters, "AMLDistill": FrozenCenters, "AdaDistill": AdaptiveCenters}
