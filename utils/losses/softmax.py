"""Cross-entropy over class centres that are shared out over the ranks, with a margin on the target cosine.

In plain words, for one rank (f, w normalised):

    cosine = f @ w.T;  cosine[i, y_i] = margin(cosine[i, y_i]);  loss = cross_entropy(s * cosine, y)

The Function below computes the same with one (B, classes of this rank) buffer, which holds in turn the cosines, the
probabilities and their gradient. The centres are never copied: their lengths divide the columns of that buffer instead. A gradient for
them is made only where somebody asks for one.
"""

import torch

from utils import distributed

BLOCK = 2048        # centres whose gradient is projected at a time, while it is in the processor's cache


class Buffer:
    """Memory for one matrix that lives on from step to step: on a CPU fresh pages cost as much as the arithmetic on them."""

    def __init__(self):
        self.spare = None

    def take(self, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """An uninitialised (rows, columns) float32 matrix; the spare memory if it is large enough and not in use."""
        spare, self.spare = self.spare, None
        if spare is None or spare.device != device or spare.numel() < rows * columns:
            spare = torch.empty(rows * columns, device=device)
        return spare[:rows * columns].view(rows, columns)

    def give_back(self, matrix: torch.Tensor) -> None:
        self.spare = matrix._base


class MarginSoftmaxLoss(torch.autograd.Function):
    """loss = apply(features, weight, per_length, rows, columns, margin, scale, clip, buffer), the mean over the global batch, the same on all ranks.

    features (B, D) of the global batch, normalised, and weight (C of this rank, D), of any length, float32; per_length (C,) = 1 / length;
    rows, columns: the samples whose class is here; margin: (B,) own cosines -> (B,) differentiable; clip: bound of all cosines, or None. Backward may run once.
    """

    @staticmethod
    def forward(ctx, features, weight, per_length, rows, columns, margin, scale, clip, buffer):
        cosine = buffer.take(len(features), len(weight), features.device)
        torch.mm(features, weight.t(), out=cosine)
        cosine.mul_(per_length)
        own = cosine.new_zeros(cosine.shape[0])
        own[rows] = cosine[rows, columns]
        own = distributed.all_reduce(own)
        with torch.enable_grad():
            own.requires_grad_(True)
            target = margin(own)
            slope, = torch.autograd.grad(target.sum(), own)
        target = target.detach()

        outside = None
        if clip is not None:
            outside = (cosine > clip).logical_or_(cosine < -clip)
            cosine.clamp_(-clip, clip)
        cosine[rows, columns] = target[rows]
        logits = cosine.mul_(scale)
        largest = distributed.all_reduce(logits.amax(1), "max")
        exponentials = logits.sub_(largest[:, None]).exp_()
        total = distributed.all_reduce(exponentials.sum(1))
        target_logit = scale * target - largest
        loss = (total.log() - target_logit).mean()

        ctx.exponentials, ctx.buffer = exponentials, buffer
        ctx.outside, ctx.scale = outside, scale
        ctx.own_grad = (target_logit.exp() / total - 1) * slope
        ctx.save_for_backward(features, weight, rows, columns, total, per_length)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        if ctx.exponentials is None:
            raise RuntimeError("the margin softmax reuses its buffer and can be differentiated once per forward")
        features, weight, rows, columns, total, per_length = ctx.saved_tensors
        grad, ctx.exponentials = ctx.exponentials, None
        factor = grad_loss * ctx.scale / len(features)
        grad.mul_((factor / total)[:, None])        # of the cosines: probabilities, but for the targets
        if ctx.outside is not None:
            grad.masked_fill_(ctx.outside, 0)
        grad[rows, columns] = (factor * ctx.own_grad)[rows]
        grad.mul_(per_length)                       # of the products with centres of any length
        grad_features = grad @ weight if ctx.needs_input_grad[0] else None
        grad_weight = centers_gradient(grad, features, weight, per_length) if ctx.needs_input_grad[1] else None
        ctx.buffer.give_back(grad)
        return grad_features, grad_weight, None, None, None, None, None, None, None


def centers_gradient(grad: torch.Tensor, features: torch.Tensor, weight: torch.Tensor, per_length: torch.Tensor) -> torch.Tensor:
    """The gradient of ``weight`` (C, D), without its part along the centre itself, whose length changes no cosine.

    grad (B, C) of the products of features with centres, already divided by their lengths; per_length (C,) = 1 / length.
    """
    gradient = torch.empty_like(weight)
    for first in range(0, len(weight), BLOCK):
        block = slice(first, first + BLOCK)
        part, direction = gradient[block], weight[block] * per_length[block, None]
        torch.mm(grad[:, block].t(), features, out=part)
        part.sub_(direction.mul_((part * direction).sum(1, keepdim=True)))
    return gradient
