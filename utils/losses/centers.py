"""Where the class centres come from: the one thing in which the methods differ.

    standalone    learned by SGD, together with the network
    AMLDistill    the teacher's trained header, frozen
    AdaDistill    a moving average of the teacher's features

How they lie in memory and on the ranks (``CenterStorage``) and how SGD moves them (``FactoredSGD``)
matters to none of this.
"""

import torch
import torch.nn.functional as F

from utils import distributed
from utils.losses.center_storage import CenterStorage, Place
from utils.losses.factored_sgd import FactoredSGD
from utils.precision import float64_device


class LearnedCenters(FactoredSGD):
    """Moved by SGD (standalone training)."""


class FrozenCenters(CenterStorage):
    """The teacher's trained header, moved by nothing (AMLDistill)."""

    moves = False


class AdaptiveCenters(CenterStorage):
    """AdaDistill (Boutros et al., ECCV 2024): centres follow the teacher, never by gradient.

        cos_st = cos(f, t)                the student's feature f to the teacher's t
        lam    = cos(w_y, t)              the teacher's to the class centre as it was
        alpha  = cos_st * lam             (weighted; plain: cos_st; or a constant)
        w_y   <- alpha w_y + (1 - alpha) t / |t|

    The better the student follows, the slower the centre moves. A constant alpha is the paper's
    ablation (ACosFace in its code). Of several images of one class in the global batch, each alpha
    is computed from the old centre, and w_y becomes the mean of their updated values: neither order
    nor rank can be seen in it.
    """

    follows_teacher = True

    @torch.no_grad()
    def follow(self, teacher, cos_st, lam, place: Place) -> dict:
        """Move the centres (in training) and return the statistics alpha, lam and cos_st (B,).

        teacher (B, D) normalised, cos_st and lam (B,): of the global batch.
        """
        alpha = cos_st * lam if self.adaptive_alpha else cos_st
        alpha = alpha.clamp(1e-6, 1)
        if self.constant_alpha:
            alpha = torch.full_like(alpha, self.constant_alpha)
        if self.training and len(self.weight):
            old = self.take(place.local_row)
            moved = alpha[:, None] * old + (1 - alpha[:, None]) * teacher
            self.put(*mean_of_each_class(old, moved, place))
        return dict(alpha=alpha, lam=lam, cos_st=cos_st)


def mean_of_each_class(old, moved, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (B,) of this rank's centres and their new values (B, D).

    old, moved (B, D): the centre of each image's class before, and as that image moves it. The mean
    over images of one class is taken in float64, so that their order cannot be seen. B rows always,
    and writes to one row all say the same: images of one class repeat its first, those of other
    ranks this rank's first.
    """
    is_local, row = place
    same = (row[:, None] == row) & is_local & is_local[:, None]
    mean = mean_of_same(moved, same)
    first_local = is_local.int().argmax(0, keepdim=True)
    source = torch.where(is_local, same.int().argmax(1), first_local)
    values = torch.where(is_local[first_local][:, None], mean[source], old[source])
    return row[source], values


def mean_of_same(moved: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """moved (B, D), same (B, B) bool -> (B, D): of each row the mean over its same ones."""
    # copied first and converted then: an MPS tensor cannot become float64 on its way
    device = float64_device(moved.device)
    members = same.to(device).double()
    mean = members @ moved.to(device).double() / members.sum(1, keepdim=True).clamp_min(1)
    return mean.float().to(moved.device)


def cosine_to_own_center(features, centers: CenterStorage, place: Place) -> torch.Tensor:
    """cos(feature, own centre) (B,) on every rank, without gradient.

    features (B, D) normalised, of the global batch; each cosine is known to one rank, and summed.
    """
    cosine = (F.normalize(centers.take(place.local_row)) * features).sum(1)
    return distributed.all_reduce(torch.where(place.is_local, cosine, 0.0))


CENTERS = {
    "standalone": LearnedCenters,
    "AMLDistill": FrozenCenters,
    "AdaDistill": AdaptiveCenters,
}
