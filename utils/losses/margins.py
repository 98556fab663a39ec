"""What a loss does to the cosine between a feature and its own class centre.

A margin acts on B values, never on the (B, C) matrix. A new one is one class here: it is called as
``margin(cosine, norms, geom)`` with cosine (B,) float32 to the own centre, norms (B,) of the raw
features, geom (B,) the geometry margin's term or None, and returns the cosine with the margin and a
dict of named statistics (B,). ``default_m`` is what m=None means; ``clip`` bounds all cosines of
the logits, or is None. MARGINS at the end gives it the name that config.loss has.
"""

import math

import torch
from torch import nn

# float32 resolves 1 - cos^2 no better; it keeps d(sin)/d(cos) finite where a student meets its
# centre.
SMALLEST_SIN_SQUARED = 1e-7


class MLLoss(nn.Module):
    """Plain normalised softmax: cos(theta). m: the margin; h, t_alpha: see AdaFace."""

    default_m = 0.0
    clip = None

    def __init__(self, m: float | None = None, h: float = 0.333, t_alpha: float = 0.01):
        super().__init__()
        self.m = self.default_m if m is None else m

    def forward(self, cosine, norms, geom):
        return cosine, {}


class CosFace(MLLoss):
    """cos(theta) - m (Wang et al., CVPR 2018); with the geometry margin m (1 + min(g, 1))."""

    default_m = 0.35

    def forward(self, cosine, norms, geom):
        return cosine - widened(self.m, geom), {}


class ArcFace(MLLoss):
    """cos(theta + m) (Deng et al., CVPR 2019); with the geometry margin m (1 + min(g, 1)).

    Written as cos(theta) cos(m) - sin(theta) sin(m): acos has an infinite slope at +-1, the square
    root is bounded instead.
    """

    # as AdaDistill trains; InsightFace takes 0.5
    default_m = 0.45

    def forward(self, cosine, norms, geom):
        # made on the device: a copy from the host would wait for it
        m = torch.full_like(cosine, self.m) if geom is None else widened(self.m, geom)
        sine = ((1 - cosine) * (1 + cosine)).clamp_min(SMALLEST_SIN_SQUARED).sqrt()
        return cosine * m.cos() - sine * m.sin(), {}


class AdaFace(MLLoss):
    """Image-quality adaptive margin (Kim et al., CVPR 2022).

    The feature norm against its running statistics scales the margin. These are the statistics of
    the global batch, because every rank sees the norms of all. h: concentration; t_alpha: momentum
    of the statistics.
    """

    default_m = 0.4
    clip = 1 - 1e-3

    def __init__(self, m: float | None = None, h: float = 0.333, t_alpha: float = 0.01):
        super().__init__(m)
        self.h = h
        self.t_alpha = t_alpha
        self.register_buffer("batch_mean", torch.tensor([20.0]))
        self.register_buffer("batch_std", torch.tensor([100.0]))

    def forward(self, cosine, norms, geom):
        norms = norms.detach().clamp(0.001, 100)
        if self.training:
            self.update_statistics(norms)
        scaler = self.h * (norms - self.batch_mean) / (self.batch_std + 1e-3)
        scaler = (scaler if geom is None else scaler + geom).clamp(-1, 1)
        theta = cosine.clamp(-self.clip, self.clip).acos()
        theta = (theta - self.m * scaler).clamp(1e-3, math.pi - 1e-3)
        return theta.cos() - (self.m + self.m * scaler), {"margin_scaler": scaler}

    def update_statistics(self, norms):
        """Move the running mean and unbiased deviation towards this batch; one sample has none."""
        self.batch_mean.lerp_(norms.mean(), self.t_alpha)
        if norms.numel() > 1:
            self.batch_std.lerp_(norms.std(), self.t_alpha)


def widened(m, geom):
    """m, or m (1 + min(g, 1)) per sample."""
    return m if geom is None else m * (1 + geom.clamp_max(1))


MARGINS = {"MLLoss": MLLoss, "CosFace": CosFace, "ArcFace": ArcFace, "AdaFace": AdaFace}
