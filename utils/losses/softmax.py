"""Cross-entropy over class centres that are shared out over the ranks, margin on the target cosine.

In plain words, for one rank (f, w normalised):

    cosine = f @ w.T
    cosine[i, y_i] = margin(cosine[i, y_i])
    loss = cross_entropy(s * cosine, y)

``margin_softmax`` computes the same with one (B, classes of this rank) matrix, which holds in turn
the cosines, the probabilities and their gradient. The centres are never copied: their lengths
divide the columns of that matrix instead. A gradient for them is made only where somebody asks for
one. Nothing waits for the GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from utils import distributed
from utils.losses.center_products import cosines, features_gradient
from utils.losses.center_storage import CenterStorage, Place
from utils.losses.factored_sgd import FactoredGradient


@dataclass
class Step:
    """A forward pass, as the autograd function needs it.

    matrix (B, n): cosines of the features with the n chosen centres, then their probabilities, then
    their gradient; None once that is used. per_length (n,): 1 / the centres' lengths. target and
    slope (B,): the own cosines with margin, and the margin's derivative there.
    """

    centers: CenterStorage
    chosen: torch.Tensor | None
    place: Place
    matrix: torch.Tensor | None
    per_length: torch.Tensor
    target: torch.Tensor
    slope: torch.Tensor
    scale: float
    clip: float | None


def margin_softmax(
    features: torch.Tensor,
    centers: CenterStorage,
    chosen: torch.Tensor | None,
    place: Place,
    margin: Callable[[torch.Tensor], tuple[torch.Tensor, dict]],
    scale: float,
    clip: float | None,
) -> tuple[torch.Tensor, dict]:
    """(loss, statistics of the margin): the mean over the global batch, the same on all ranks.

    features (B, D) of the global batch, normalised float32; chosen: the rows of the centres that
    take part, None: all; place: of the batch's classes among them; margin: own cosines (B,) ->
    (B,) differentiable, and statistics; clip: bound of all cosines, or None. Backward may run once.
    """
    with torch.no_grad():
        matrix, per_length = cosines(features, centers, chosen)
        own = distributed.all_reduce(torch.where(place.is_local, own_column(matrix, place), 0.0))
    with torch.enable_grad():
        own.requires_grad_(True)
        target, stats = margin(own)
        (slope,) = torch.autograd.grad(target.sum(), own)
    step = Step(centers, chosen, place, matrix, per_length, target.detach(), slope, scale, clip)
    return MarginSoftmax.apply(features, centers.weight, step), stats


class MarginSoftmax(torch.autograd.Function):
    """loss = apply(features, weight, step); weight: step.centers.weight, for autograd."""

    @staticmethod
    def forward(ctx, features, weight, step):
        cosine, clip = step.matrix, step.clip
        ctx.outside = None
        if clip is not None:
            ctx.outside = (cosine > clip).logical_or_(cosine < -clip)
            cosine.clamp_(-clip, clip)
        set_own_column(cosine, step.place, step.target)
        logits = cosine.mul_(step.scale)
        largest = distributed.all_reduce(largest_of_rows(logits), "max")
        exponentials = logits.sub_(largest[:, None]).exp_()
        ctx.total = distributed.all_reduce(exponentials.sum(1))
        target_logit = step.scale * step.target - largest
        ctx.own_grad = (target_logit.exp() / ctx.total - 1) * step.slope
        ctx.step = step
        ctx.save_for_backward(features)
        return (ctx.total.log() - target_logit).mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        step = ctx.step
        grad, step.matrix = step.matrix, None
        if grad is None:
            raise RuntimeError(
                "the margin softmax reuses its matrix and can be differentiated once per forward"
            )
        (features,) = ctx.saved_tensors
        factor = grad_loss * step.scale / len(features)
        # of the cosines: probabilities, but for the targets
        grad.mul_((factor / ctx.total)[:, None])
        if ctx.outside is not None:
            grad.masked_fill_(ctx.outside, 0)
        set_own_column(grad, step.place, factor * ctx.own_grad)
        # of the products with centres of any length
        grad.mul_(step.per_length)
        grad_features = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_features = features_gradient(grad, step.centers, step.chosen)
        if ctx.needs_input_grad[1]:
            factors = FactoredGradient(grad, features.detach(), step.chosen)
            grad_weight = step.centers.take_gradient(factors)
        else:
            step.centers.matrix.give_back(grad)
        return grad_features, grad_weight, None


def own_column(matrix: torch.Tensor, place: Place) -> torch.Tensor:
    """(B,) of each row the entry of its own class; a rank without classes has no columns: zeros."""
    if not matrix.shape[1]:
        return matrix.new_zeros(len(matrix))
    return matrix[torch.arange(len(matrix), device=matrix.device), place.local_row]


def set_own_column(matrix: torch.Tensor, place: Place, values: torch.Tensor) -> None:
    """Set each row's entry of its own class to values (B,), where that class is this rank's."""
    if matrix.shape[1]:
        rows = torch.arange(len(matrix), device=matrix.device)
        before = matrix[rows, place.local_row]
        matrix[rows, place.local_row] = torch.where(place.is_local, values, before)


def largest_of_rows(matrix: torch.Tensor) -> torch.Tensor:
    if not matrix.shape[1]:
        return matrix.new_full((len(matrix),), -torch.inf)
    return matrix.amax(1)
