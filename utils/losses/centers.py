"""Where the class centres come from: learned by SGD, the teacher's frozen header, or a moving average of teacher features.

Every rank holds a contiguous share of the classes as rows of ``weight`` (classes of this rank, D). Checkpoints speak of the whole
published kernel (D, C) and are gathered from, or cut for, any number of ranks.
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils import distributed

INIT_STD = 0.01
SHORTEST = 1e-12       # as F.normalize
INIT_CHUNK = 4096      # classes drawn from one seed, so that a rank draws its own share only and every world size draws the same


class ClassCenters(nn.Module):
    """(C, D) class centres of which this rank holds rows ``start`` to ``stop``, drawn from N(0, 0.01)."""

    learned = False

    def __init__(self, num_classes: int, embedding_size: int):
        super().__init__()
        self.num_classes = num_classes
        self.start, self.stop = (num_classes * number // distributed.world_size() for number in (distributed.rank(), distributed.rank() + 1))
        weight = draw_rows(self.start, self.stop, embedding_size)
        if self.learned:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)
        self.measured = None

    @torch.no_grad()
    def per_length(self) -> torch.Tensor:
        """(classes of this rank,) 1 / length of every centre. Kept while ``weight`` stays as it is, which learned centres never do: reading them all costs a tenth of a step."""
        if self.learned or self.measured is None or self.measured[0] != state_of(self.weight):
            self.measured = state_of(self.weight), one_over_length(self.weight)
        return self.measured[1]

    def owned(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """labels (B,) of the global batch -> (rows of the batch, rows of ``weight``) of the samples whose class lives here."""
        rows = ((labels >= self.start) & (labels < self.stop)).nonzero(as_tuple=True)[0]
        return rows, labels[rows] - self.start

    def whole(self, shard: torch.Tensor) -> torch.Tensor:
        """Any (classes of this rank, D) tensor -> the whole (D, C) on every rank. A collective: call it on all ranks."""
        return distributed.all_gather_rows(shard.detach()).t().contiguous()

    def shard(self, whole: torch.Tensor) -> torch.Tensor:
        """The whole (D, C) -> this rank's (classes, D)."""
        return whole[:, self.start:self.stop].t().contiguous()


class LearnedCenters(ClassCenters):
    """Moved by SGD together with the backbone (standalone training)."""

    learned = True


class FrozenCenters(ClassCenters):
    """The teacher's trained header, moved by nothing (AMLDistill)."""


class AdaptiveCenters(ClassCenters):
    """w_y <- alpha w_y + (1 - alpha) t/|t|: the teacher's features, faster the less the student follows (AdaDistill, ECCV 2024)."""

    @torch.no_grad()
    def update(self, teacher: torch.Tensor, alpha: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> None:
        """Move the centres of this rank's classes.

        teacher (B, D) normalised and alpha (B,) of the global batch; rows and columns as ``owned`` gives them. Several images of one class
        start from the same old centre and their results are averaged, in float64, so that their order cannot be seen.
        """
        weight = alpha[rows, None]
        moved = weight * self.weight[columns] + (1 - weight) * teacher[rows]
        classes, member = columns.unique(return_inverse=True)
        total = moved.new_zeros((len(classes), moved.shape[1]), dtype=torch.float64).index_add_(0, member, moved.double())
        per_length = self.per_length()
        self.weight[classes] = (total / member.bincount(minlength=len(classes))[:, None]).float()
        per_length[classes] = one_over_length(self.weight[classes])
        self.measured = state_of(self.weight), per_length


def state_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Changes whenever the tensor's values do: where they lie, and how often they were written in place."""
    return tensor.data_ptr(), tensor._version


def one_over_length(rows: torch.Tensor) -> torch.Tensor:
    """(n, D) -> (n,), bounded as F.normalize bounds it."""
    return torch.linalg.vector_norm(rows, dim=1).clamp_min_(SHORTEST).reciprocal_()


def draw_rows(start: int, stop: int, embedding_size: int) -> torch.Tensor:
    """Rows start..stop of one N(0, 0.01) matrix that depends on rank 0's random state only, not on how many ranks share it."""
    seed = int(distributed.broadcast(torch.randint(2**62, (1,))))
    rows = torch.empty(stop - start, embedding_size)
    for chunk in range(start // INIT_CHUNK, -(-stop // INIT_CHUNK)):
        drawn = torch.empty(INIT_CHUNK, embedding_size).normal_(0, INIT_STD, generator=torch.Generator().manual_seed(seed + chunk))
        first, last = max(start, chunk * INIT_CHUNK), min(stop, (chunk + 1) * INIT_CHUNK)
        rows[first - start:last - start] = drawn[first - chunk * INIT_CHUNK:last - chunk * INIT_CHUNK]
    return rows


def cosine_to_own_center(features: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """cos(feature, own centre) (B,) on every rank, no gradient; features (B, D) normalised, each value known to one rank and summed."""
    cosine = features.new_zeros(features.shape[0])
    cosine[rows] = (F.normalize(weight[columns]) * features[rows]).sum(1)
    return distributed.all_reduce(cosine)


CENTERS = {"standalone": LearnedCenters, "AMLDistill": FrozenCenters, "AdaDistill": AdaptiveCenters}
