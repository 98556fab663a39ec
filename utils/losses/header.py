"""Header = where the class centres come from (centers.py) x what the margin does (margins.py)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from utils import distributed
from utils.errors import InputError
from utils.losses.centers import cosine_to_own_center
from utils.losses.softmax import margin_softmax


class Header(nn.Module):
    """Cross-entropy over s * margin(cos(features, centres)), on any number of ranks.

    header(features, labels, features_t=None, epoch=0.0) -> (loss, stats)
        features (b, D) raw student features and labels (b,) of this rank; features_t (b, D) raw
        teacher features, which AdaDistill, the geometry margin and a feature_weight need; epoch:
        fractional, for the geometry margin's warm-up. loss: 0-d float32, the mean over the global
        batch, the same on all ranks. stats: 0-d tensors, means over the global batch: alpha, lam,
        cos_st (AdaDistill); margin_scaler (AdaFace); geom (geometry margin); feature
        (feature_weight).
    loss = header_weight * cross-entropy + feature_weight * mean(1 - cos(features, features_t)); a
    part of weight 0 is not computed, and centres and statistics do not move without the first.
    Everything here is float32, under autocast too: a cosine rounded to bf16 moves a logit by 0.1.
    Only a GPU's products with the centres are tf32 if that is asked for.
    Feature gradients come times the world size, so that DistributedDataParallel's average is the
    gradient of that mean.
    """

    def __init__(self, centers, margin, s, geometry, sample_rate, header_weight, feature_weight):
        super().__init__()
        self.centers = centers
        self.margin = margin
        self.s = s
        self.geometry = geometry
        self.sample_rate = sample_rate
        self.header_weight = header_weight
        self.feature_weight = feature_weight
        self.follows_teacher = bool(centers.follows_teacher or geometry)
        self.needs_teacher = self.follows_teacher or feature_weight > 0

    def forward(self, features, labels, features_t=None, epoch=0.0):
        if features_t is None and self.needs_teacher:
            raise ValueError(
                "AdaDistill, the geometry margin and feature_weight need the teacher's features: "
                "header(features, labels, features_t)"
            )
        with torch.autocast(features.device.type, enabled=False):
            features = distributed.gather_features(features.float())
            labels = distributed.all_gather(labels)
            check_labels(labels, self.centers.num_classes)
            norms = features.norm(dim=1)
            features = F.normalize(features)
            teacher = None
            if features_t is not None:
                teacher = F.normalize(distributed.all_gather(features_t.detach().float()))

            loss, stats = 0.0, {}
            if self.header_weight:
                entropy, stats = self.cross_entropy(features, norms, labels, teacher, epoch)
                loss = self.header_weight * entropy
            if self.feature_weight:
                stats["feature"] = feature_loss(features, teacher)
                loss = loss + self.feature_weight * stats["feature"]
        return loss, {name: value.detach().mean() for name, value in stats.items()}

    def cross_entropy(self, features, norms, labels, teacher, epoch):
        """(loss, stats) of the global batch, for which AdaDistill's centres move first.

        features and teacher (B, D) normalised, teacher None if there is none; norms (B,).
        """
        place = self.centers.locate(labels)
        stats, geom = {}, None
        if self.follows_teacher:
            cos_st = (features.detach() * teacher).sum(1).clamp(-1, 1)
            # of the centres before they move
            lam = cosine_to_own_center(teacher, self.centers, place).clamp(1e-6, 1)
            if self.geometry:
                geom = stats["geom"] = self.geometry(lam, cos_st, epoch)
            stats |= self.centers.follow(teacher, cos_st, lam, place)

        chosen, place = self.centers.sample(place, self.sample_rate)
        margin = partial(self.margin, norms=norms, geom=geom)
        loss, margin_stats = margin_softmax(
            features, self.centers, chosen, place, margin, self.s, self.margin.clip
        )
        return loss, stats | margin_stats

    def state_dict(self, *, destination=None, prefix="", keep_vars=False) -> dict:
        """{"kernel": (D, C) float32 on the CPU, and AdaFace's batch_mean and batch_std}.

        A collective, called on all ranks.
        """
        state = {} if destination is None else destination
        state[prefix + "kernel"] = self.centers.whole(self.centers.weight).float()
        return self.margin.state_dict(destination=state, prefix=prefix, keep_vars=keep_vars)

    def load_state_dict(self, state: dict, strict: bool = True):
        """Take back what ``state_dict`` gives, whole, on any number of ranks.

        strict=False passes over missing statistics and over keys of other headers. Returns
        (missing_keys, unexpected_keys). Raises InputError naming keys or shapes that differ.
        """
        expected = ["kernel", *self.margin.state_dict()]
        missing = [key for key in expected if key not in state]
        unexpected = [key for key in state if key not in expected]
        if "kernel" in missing or strict and (missing or unexpected):
            raise InputError(
                f"a header with keys {sorted(expected)} was expected, this one has {sorted(state)}"
            )
        self.load_kernel(state["kernel"])
        for key, buffer in self.margin.named_buffers():
            if key not in state:
                continue
            if state[key].numel() != 1:
                shape = tuple(state[key].shape)
                raise InputError(f"the header's {key} is {shape}, but it is one number")
            buffer.copy_(state[key].reshape(1))
        return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)

    @torch.no_grad()
    def load_kernel(self, kernel: torch.Tensor) -> None:
        """Set the centres from a whole (D, C) kernel. Raises InputError if its shape differs."""
        expected = (self.centers.weight.shape[1], self.centers.num_classes)
        if tuple(kernel.shape) != expected:
            raise InputError(
                f"the header's kernel is {tuple(kernel.shape)}, "
                f"but (embedding_size, num_classes) is {expected}"
            )
        self.centers.weight.copy_(self.centers.shard(kernel))


def feature_loss(features: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """mean(1 - cos(f, t)) of the global batch (B, D), both normalised.

    Every rank sees all of it, and gives the gradient of its own images: the ranks' are summed.
    """
    cosine = (features * teacher).sum(1)
    own = distributed.is_own_row(len(cosine), cosine.device)
    return 1 - torch.where(own, cosine, cosine.detach()).mean()


class GeometryMargin:
    """g = w_eff k max(lam - cos_st, 0) lam.

    More margin where the teacher is sure of the class and the student does not follow it yet.
    """

    def __init__(self, w, k, warmup_epoch):
        self.w = w
        self.k = k
        self.warmup_epoch = warmup_epoch

    def __call__(self, lam, cos_st, epoch):
        warm = 1.0
        if self.warmup_epoch > 0:
            warm = min(max(epoch / self.warmup_epoch, 0.0), 1.0)
        return self.w * warm * self.k * (lam - cos_st).clamp_min(0) * lam


def check_labels(labels: torch.Tensor, num_classes: int) -> None:
    """Refuse labels without a class, which no rank would own.

    On CPUs only: the data sets check them as well, and a GPU would have to stop and look.
    """
    if labels.device.type != "cpu":
        return
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_classes:
        raise InputError(
            f"label {lowest if lowest < 0 else highest} is outside 0..{num_classes - 1}: "
            "num_classes is too small for this data set"
        )
