"""Cross-entropy over class centres that are shared out over the ranks, with a margin on the target
cosine.

In plain words, for one rank (f, w normalised):

    cosine = f @ w.T;  cosine[i, y_i] = margin(cosine[i, y_i]);  loss = cross_entropy(s * cosine, y)

The Function below computes the same with one (B, classes of this rank) buffer, which holds in turn
the cosines, the probabilities and their gradient. The centres are never copied: their lengths
divide the columns of that buffer instead. A gradient for them is made only where somebody asks for
one. Nothing waits for the GPU.
"""

import torch

from utils import distributed
from utils.losses.centers import Pending, one_over_length

LARGE_SHARE = 1024  # classes


class MarginSoftmaxLoss(torch.autograd.Function):
    """loss = apply(features, weight, centers, chosen, mine, columns, margin, scale, clip), the mean
    over the global batch, the same on all ranks.

    features (B, D) of the global batch, normalised float32; weight: centers.weight, so that
    autograd knows of it; chosen: its rows that take part, None: all; mine (B,) bool, columns (B,):
    whether a sample's class is here and where among the chosen; margin: (B,) own cosines -> (B,)
    differentiable; clip: bound of all cosines, or None. Backward may run once.
    """

    @staticmethod
    def forward(ctx, features, weight, centers, chosen, mine, columns, margin, scale, clip):
        rows = torch.arange(len(features), device=features.device)
        cosine, per_length = cosines(features, centers, chosen)
        # a rank without classes takes part in every sum, with a matrix of no columns
        any_classes = cosine.shape[1] > 0
        picked = cosine[rows, columns] if any_classes else cosine.new_zeros(len(rows))
        own = distributed.all_reduce(torch.where(mine, picked, 0.0))
        with torch.enable_grad():
            own.requires_grad_(True)
            target = margin(own)
            (slope,) = torch.autograd.grad(target.sum(), own)
        target = target.detach()

        outside = None
        if clip is not None:
            outside = (cosine > clip).logical_or_(cosine < -clip)
            cosine.clamp_(-clip, clip)
        if any_classes:
            cosine[rows, columns] = torch.where(mine, target, cosine[rows, columns])
        logits = cosine.mul_(scale)
        largest = logits.amax(1) if any_classes else torch.full_like(own, -torch.inf)
        distributed.all_reduce(largest, "max")
        exponentials = logits.sub_(largest[:, None]).exp_()
        total = distributed.all_reduce(exponentials.sum(1))
        target_logit = scale * target - largest
        loss = (total.log() - target_logit).mean()

        ctx.exponentials = exponentials
        ctx.centers = centers
        ctx.chosen = chosen
        ctx.outside = outside
        ctx.scale = scale
        ctx.own_grad = (target_logit.exp() / total - 1) * slope
        ctx.save_for_backward(features, mine, columns, total, per_length)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        if ctx.exponentials is None:
            raise RuntimeError(
                "the margin softmax reuses its buffer and can be differentiated once per forward"
            )
        features, mine, columns, total, per_length = ctx.saved_tensors
        centers, rows = ctx.centers, torch.arange(len(features), device=features.device)
        grad, ctx.exponentials = ctx.exponentials, None
        factor = grad_loss * ctx.scale / len(features)
        # of the cosines: probabilities, but for the targets
        grad.mul_((factor / total)[:, None])
        if ctx.outside is not None:
            grad.masked_fill_(ctx.outside, 0)
        if grad.shape[1]:
            grad[rows, columns] = torch.where(mine, factor * ctx.own_grad, grad[rows, columns])
        grad.mul_(per_length)  # of the products with centres of any length
        grad_features = (
            features_gradient(grad, centers, ctx.chosen) if ctx.needs_input_grad[0] else None
        )
        grad_weight, pending = None, Pending(grad, features.detach(), ctx.chosen)
        if ctx.needs_input_grad[1] and centers.defer:
            centers.pending.append(pending)
            return grad_features, *[None] * 8
        if ctx.needs_input_grad[1]:
            grad_weight = centers.dense_gradient(pending)
        centers.buffer.give_back(grad)
        return grad_features, grad_weight, *[None] * 7


def cosines(features, centers, chosen) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, n) cosines of normalised features with the chosen centres, in memory of
    ``centers.buffer``, and 1 / the lengths (n,) of these.
    """
    cosine = centers.buffer.take(
        len(features), len(centers.weight) if chosen is None else len(chosen), features.device
    )
    lengths = []
    for part, block in centers.blocks(chosen, features.device):
        torch.mm(features, block.t(), out=cosine[:, part])
        if centers.learned:
            lengths.append(one_over_length(block))
    if centers.learned:
        per_length = torch.cat(lengths)
    else:
        per_length = (centers.per_length() if chosen is None else centers.per_length()[chosen]).to(
            features.device
        )
    return cosine.mul_(per_length), per_length


def features_gradient(grad, centers, chosen) -> torch.Tensor:
    """grad (B, n) of the products with the chosen centres -> (B, D)."""
    total = None
    for part, block in centers.blocks(chosen, grad.device):
        total = (
            product(grad[:, part], block) if total is None else total.addmm_(grad[:, part], block)
        )
    return total


def product(grad: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """grad (B, n) @ block (n, D).

    Where n is large, each thread of a CPU takes a share of the n and the results are added: a fifth
    faster than sharing out the B rows.
    """
    threads = torch.get_num_threads() if grad.device.type == "cpu" else 1
    share = len(block) // threads
    if threads == 1 or share < LARGE_SHARE:
        return grad @ block
    even = threads * share
    total = torch.bmm(
        grad[:, :even].unflatten(1, (threads, share)).transpose(0, 1),
        block[:even].unflatten(0, (threads, share)),
    ).sum(0)
    return total.addmm_(grad[:, even:], block[even:])
