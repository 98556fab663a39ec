"""SGD of learned centres from the two factors of their gradient, which is never made as a whole."""

from typing import NamedTuple

import torch

from utils.losses.center_storage import BLOCK_ROWS, CenterStorage, one_over_length, store
from utils.precision import float32_products


class FactoredGradient(NamedTuple):
    """A gradient of centres as its two factors, grad.T @ features.

    grad (B, n): of the products of features and centres; features (B, D); chosen: the n rows of
    ``weight``, None: all.
    """

    grad: torch.Tensor
    features: torch.Tensor
    chosen: torch.Tensor | None


class FactoredSGD(CenterStorage):
    """Centres that SGD moves block by block.

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

    def take_gradient(self, factors: FactoredGradient) -> torch.Tensor | None:
        """The gradient of all of ``weight`` for autograd; None if it is deferred."""
        if self.defer:
            self.pending.append(factors)
            return None
        dense = torch.zeros_like(self.weight)
        device = factors.grad.device
        for part, block in self.blocks(factors.chosen, device, BLOCK_ROWS[device.type]):
            rows = part if factors.chosen is None else factors.chosen[part]
            dense[rows] = self.gradient([factors], factors.chosen, part, block).to(dense)
        self.matrix.give_back(factors.grad)
        return dense

    def gradient(self, pending, chosen, part: slice, block: torch.Tensor) -> torch.Tensor:
        """The gradient (n, D) of the centres ``block``, which lie at ``part`` of ``chosen``.

        Without its share along the centre itself, whose length changes no cosine.
        """
        gradient = torch.zeros_like(block)
        for grad, features, columns in pending:
            own = grad[:, part] if columns is chosen else columns_of(grad, columns, chosen[part])
            with float32_products(self.precision):
                gradient.addmm_(own.t(), features)
        direction = block * one_over_length(block)[:, None]
        return gradient.sub_(direction.mul_((gradient * direction).sum(1, keepdim=True)))

    @torch.no_grad()
    def step(self, lr: float, momentum: float, weight_decay: float, scale: float = 1.0) -> None:
        """One step of SGD with the deferred gradients, which are ``scale`` times too large.

        Classes that were not sampled stay as they are, their momentum too, as in Partial FC
        (An et al., CVPR 2022).
        """
        pending = self.pending
        if self.momentum is None:
            self.momentum = torch.zeros_like(self.weight)
        chosen, is_sampled = pending[0].chosen, None
        if chosen is not None and len(pending) > 1:
            sampled = [factors.chosen for factors in pending]
            chosen, is_sampled = union(sampled, len(self.weight))
        device = pending[0].grad.device
        for part, block in self.blocks(chosen, device, BLOCK_ROWS[device.type]):
            rows = part if chosen is None else chosen[part]
            gradient = self.gradient(pending, chosen, part, block).div_(scale)
            gradient.add_(block, alpha=weight_decay)
            velocity = self.momentum[rows].to(device, torch.float32)
            velocity.mul_(momentum).add_(gradient)
            for tensor, values in (
                (self.momentum, velocity),
                (self.weight, block.sub_(velocity, alpha=lr)),
            ):
                if is_sampled is not None:
                    before = tensor.detach()[rows].to(device, torch.float32)
                    values = torch.where(is_sampled[part, None].to(device), values, before)
                store(tensor, rows, values)
        self.forget()

    def forget(self) -> None:
        """Drop the deferred gradients; their memory serves the next step."""
        for factors in self.pending:
            self.matrix.give_back(factors.grad)
        self.pending = []


def union(sampled: list[torch.Tensor], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows (n,) of ``count`` that are in any list, ascending, and others; whether each is (n,).

    n is as large as the union can be: how many rows lie in several lists only the GPU knows.
    """
    rows = torch.cat(sampled)
    is_sampled = torch.zeros(count, device=rows.device).index_fill_(0, rows, 1.0)
    rows = is_sampled.topk(min(len(rows), count), sorted=False).indices.sort().values
    return rows, is_sampled[rows] > 0


def columns_of(grad: torch.Tensor, columns: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Of ``grad`` (B, n), the columns (B, k) of the classes ``asked`` (k,), zero for absent ones.

    columns (n,) ascending: the classes of grad's columns.
    """
    at = torch.searchsorted(columns, asked).clamp_(max=len(columns) - 1)
    return grad[:, at.to(grad.device)] * (columns[at] == asked).to(grad.device)
