"""What a run is measured on while it trains: pair sets, IJB and TinyFace, and its best so far."""

import torch

from eval import verification
from eval.test_sets import run_test_set, test_sets_of
from train.run_state import Position
from utils import distributed
from utils.run.folder import save


class Validation:
    """The sets of ``cfg``, read and checked before the first step: a damaged one ends no run later.

    Raises InputError if a set is missing or damaged.
    """

    def __init__(self, cfg):
        self.cfg = cfg
        self.pair_sets = {}
        if cfg.val_targets:
            self.pair_sets = verification.load_targets(cfg.val_rec, cfg.val_targets)
        self.benchmarks = test_sets_of(cfg)
        # {set: highest accuracy so far}, and the highest mean over the sets
        self.highest = {}
        self.best = 0.0
        self.done_at_step = -1

    def is_due(self, step: int, epoch: int, epoch_ended: bool) -> bool:
        """Every eval_step steps, every val_eval_every_n_epoch epochs, and at the end of the run."""
        cfg = self.cfg
        if cfg.eval_step and step % cfg.eval_step == 0:
            return True
        return epoch_ended and ends_a_period(epoch, cfg.val_eval_every_n_epoch, cfg.num_epoch)

    def benchmarks_are_due(self, epoch: int) -> bool:
        """After every eval_every_n_epoch-th epoch and at the end of the run."""
        if not self.benchmarks or epoch < 0:
            return False
        return ends_a_period(epoch, self.cfg.eval_every_n_epoch, self.cfg.num_epoch)

    def verify(self, backbone: torch.nn.Module, run, log, position: Position) -> None:
        """Verify on all ranks together, log with this step, and keep the best student so far."""
        if not self.pair_sets or self.done_at_step == position.step:
            return
        self.done_at_step = position.step
        distributed.sync_buffers(backbone)
        results = {
            name: verification.test(
                pairs,
                backbone,
                self.cfg.val_batch_size,
                device=run.device,
                precision=run.precision,
                channels_last=self.cfg.channels_last,
            )
            for name, pairs in self.pair_sets.items()
        }
        accuracies = {name: figures["Accuracy-Flip"] for name, figures in results.items()}
        for name, accuracy in accuracies.items():
            self.highest[name] = max(self.highest.get(name, 0.0), accuracy)
        log.validation(position.step, position.epoch, results, self.highest)
        mean = sum(accuracies.values()) / len(accuracies)
        if mean > self.best:
            self.best = mean
            if distributed.is_main():
                save(backbone.state_dict(), run.folder.path / "best_backbone.pth")

    def run_benchmarks(self, backbone: torch.nn.Module, run, log, step: int, epoch: int) -> None:
        """Measure IJB and TinyFace on all ranks together, and log with this step of ``epoch``."""
        if not self.benchmarks:
            return
        distributed.sync_buffers(backbone)
        results = {}
        for benchmark in self.benchmarks:
            results.setdefault(benchmark.kind, {})[benchmark.name] = run_test_set(
                benchmark,
                backbone,
                device=run.device,
                precision=run.precision,
                channels_last=self.cfg.channels_last,
            )
        log.benchmarks(step, epoch, results)


def ends_a_period(epoch: int, every: int, num_epoch: int) -> bool:
    """Whether ``epoch`` is the last of ``every`` epochs or of the run; every 0: of the run."""
    return epoch + 1 == num_epoch or bool(every) and (epoch + 1) % every == 0
