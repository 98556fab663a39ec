"""What a loss does to the cosine between a feature and its own class centre: B values, never the
(B, C) matrix.

A margin is called as ``margin(cosine, norms, geom)``: cosine (B,) float32 to the own centre, norms
(B,) of the raw features, geom (B,) the geometry margin's term or None. It returns the cosine with
the margin and a dict of named statistics (B,). ``clip`` bounds all cosines of the logits, or is
None.
"""

import math

import torch
from torch import nn

# float32 resolves 1 - cos^2 no better; it keeps d(sin)/d(cos) finite where a student meets its
# centre
SMALLEST_SIN_SQUARED = 1e-7


class MLLoss(nn.Module):
    """Plain normalised softmax: cos(theta)."""

    default_m = 0.0
    clip = None

    def __init__(self, m: float):
        super().__init__()
        self.m = m

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

    default_m = 0.45  # as AdaDistill trains; InsightFace takes 0.5

    def forward(self, cosine, norms, geom):
        # made on the device: a copy from the host would wait for it
        m = torch.full_like(cosine, self.m) if geom is None else widened(self.m, geom)
        sine = ((1 - cosine) * (1 + cosine)).clamp_min(SMALLEST_SIN_SQUARED).sqrt()
        return cosine * m.cos() - sine * m.sin(), {}


class AdaFace(MLLoss):
    """Image-quality adaptive margin (Kim et al., CVPR 2022): the feature norm against its running
    statistics scales the margin.

    The statistics are those of the global batch, because every rank sees the norms of all.
    """

    default_m = 0.4
    clip = 1 - 1e-3

    def __init__(self, m: float, h: float, t_alpha: float):
        super().__init__(m)
        self.h = h
        self.t_alpha = t_alpha
        self.register_buffer("batch_mean", torch.tensor([20.0]))
        self.register_buffer("batch_std", torch.tensor([100.0]))

    def forward(self, cosine, norms, geom):
        norms = norms.detach().clamp(0.001, 100)
        if self.training:
            self.follow(norms)
        scaler = self.h * (norms - self.batch_mean) / (self.batch_std + 1e-3)
        scaler = (scaler if geom is None else scaler + geom).clamp(-1, 1)
        theta = cosine.clamp(-self.clip, self.clip).acos()
        theta = (theta - self.m * scaler).clamp(1e-3, math.pi - 1e-3)
        return theta.cos() - (self.m + self.m * scaler), {"margin_scaler": scaler}

    def follow(self, norms):
        """Move the running mean and unbiased standard deviation towards this batch; one sample
        alone has no deviation.
        """
        self.batch_mean.lerp_(norms.mean(), self.t_alpha)
        if norms.numel() > 1:
            self.batch_std.lerp_(norms.std(), self.t_alpha)


def widened(m, geom):
    """m, or m (1 + min(g, 1)) per sample."""
    return m if geom is None else m * (1 + geom.clamp_max(1))


MARGINS = {"MLLoss": MLLoss, "CosFace": CosFace, "ArcFace": ArcFace, "AdaFace": AdaFace}
