"""Cross-entropy over class centres that are shared out over the ranks, with a margin on the target cosine.

In plain words, for one rank (f, w normalised):

    cosine = f @ w.T;  cosine[i, y_i] = margin(cosine[i, y_i]);  loss = cross_entropy(s * cosine, y)

The Function below computes the same with one (B, classes of this rank) buffer, which holds in turn the cosines, the
probabilities and their gradient, and makes a gradient for the centres only where somebody asks for one.
"""

import torch

from utils import distributed


class MarginSoftmaxLoss(torch.autograd.Function):
    """loss = apply(features, centers, rows, columns, margin, scale, clip), the mean over the global batch, the same on all ranks.

    features (B, D) of the global batch and centers (C of this rank, D), both normalised float32; rows, columns: the samples whose class is here;
    margin: (B,) own cosines -> (B,) differentiable; clip: bound of all cosines, or None. Backward may run once.
    """

    @staticmethod
    def forward(ctx, features, centers, rows, columns, margin, scale, clip):
        cosine = features @ centers.t()
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
            outside = cosine.abs() > clip
            cosine.clamp_(-clip, clip)
        cosine[rows, columns] = target[rows]
        logits = cosine.mul_(scale)
        largest = distributed.all_reduce(logits.amax(1), "max")
        exponentials = logits.sub_(largest[:, None]).exp_()
        total = distributed.all_reduce(exponentials.sum(1))
        target_logit = scale * target - largest
        loss = (total.log() - target_logit).mean()

        ctx.probabilities = exponentials.div_(total[:, None])
        ctx.outside, ctx.scale = outside, scale
        ctx.own_grad = (target_logit.exp() / total - 1) * slope
        ctx.save_for_backward(features, centers, rows, columns)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        if ctx.probabilities is None:
            raise RuntimeError("the margin softmax reuses its buffer and can be differentiated once per forward")
        features, centers, rows, columns = ctx.saved_tensors
        grad, ctx.probabilities = ctx.probabilities, None
        if ctx.outside is not None:
            grad.masked_fill_(ctx.outside, 0)
        grad[rows, columns] = ctx.own_grad[rows]
        grad.mul_(grad_loss * ctx.scale / len(features))
        grad_features = grad @ centers if ctx.needs_input_grad[0] else None
        grad_centers = grad.t() @ features if ctx.needs_input_grad[1] else None
        return grad_features, grad_centers, None, None, None, None, None
