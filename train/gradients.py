"""Gradients that can be used: fp16's loss scale, and the end of a run that meets none."""

import torch

from utils import distributed
from utils.errors import InputError

NO_SCALER = torch.amp.GradScaler(enabled=False)


def make_scaler(run):
    """fp16's loss scaler, which does nothing for the other precisions."""
    scaling = dict(device=run.device.type, enabled=run.precision == "fp16")
    if scaling["enabled"] and distributed.world_size() > 1:
        # all ranks skip a step together; takes seconds to import
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

        return ShardedGradScaler(**scaling)
    return torch.amp.GradScaler(**scaling)


class FiniteGuard:
    """Stops a run whose loss or gradient is not finite; it never trains on.

    With fp16's scaler an infinite gradient is normal: that step is skipped and the scale halved.
    engine: whose run, position, optimizer and scaler these are.
    """

    def __init__(self, engine):
        self.engine = engine
        self.first_bad_step = torch.full((), -1, device=engine.run.device)

    def note(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Remember the first bad step; on CPUs stop before the weights see it."""
        finite = torch.isfinite(loss)
        if not self.engine.scaler.is_enabled():
            # a centre's gradient that is not finite makes the features' not finite either
            finite = finite & torch.isfinite(norm)
        is_first = ~finite & (self.first_bad_step < 0)
        step = self.engine.position.step + 1
        self.first_bad_step = torch.where(is_first, step, self.first_bad_step)
        if self.engine.run.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raises InputError if a loss or gradient was not finite; before anything is saved."""
        step = int(self.first_bad_step)
        scaler = self.engine.scaler
        if step < 0 and not (scaler.is_enabled() and scaler.get_scale() < 1e-3):
            return
        step = step if step >= 0 else self.engine.position.step
        raise InputError(
            f"the loss or a gradient is not finite at step {step} "
            f"(learning rate {self.engine.lr:g}, "
            f"{self.engine.run.precision}); try a lower lr, warmup_epoch=1 or more, or "
            "precision=fp32. Earlier checkpoints are untouched"
        )
