"""One pass of the teacher over the training set, for cache_teacher.py and class_centers.py."""

import logging
import sys

import torch

from eval.embed import embed_parts, split
from train.build import memory_format
from utils import distributed
from utils.dataset.loader import open_loader
from utils.dataset.workers import end_workers, next_batch
from utils.precision import choose_precision
from utils.teacher.load import load_teacher

log = logging.getLogger(__name__)


def log_to_console() -> None:
    """Show what the libraries report on rank 0, and the warnings of the others."""
    logging.basicConfig(
        stream=sys.stdout,
        format="%(message)s",
        level=logging.INFO if distributed.is_main() else logging.WARNING,
    )


class TrainingImages:
    """The images of a training set as eval.embed takes them, decoded ahead by workers.

    They come in the batches of ``parts``, in that order and no other. ``damaged``: {index: reason}
    of the records met so far, whose images are those of the next good one.
    """

    def __init__(
        self, dataset, parts: list[range], batch_size: int, num_workers: int, device: torch.device
    ):
        self.dataset = dataset
        self.damaged = {}
        batches = split(parts, batch_size)
        self.reading = iter(open_loader(dataset, batches, batch_size, num_workers, device))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, part: slice) -> torch.Tensor:
        batch = next_batch(self.reading)
        if batch.bad:
            indices = {self.dataset.name_of(i): i for i in range(part.start, part.stop)}
        for name, reason in batch.bad:
            log.warning(
                "damaged record %s, the features are those of the next good one: %s", name, reason
            )
            self.damaged[indices[name]] = reason
        return batch.images

    def name_of(self, index: int) -> str:
        return f"record {self.dataset.name_of(index)}"

    def close(self) -> None:
        end_workers(self.reading)


class TeacherPass:
    """The teacher of ``cfg`` on this process's device, and how it is run over ``dataset``."""

    def __init__(self, cfg, dataset, device: torch.device):
        self.cfg = cfg
        self.dataset = dataset
        self.device = device
        self.precision = choose_precision(cfg.precision, device)
        self.teacher = load_teacher(cfg).to(device, memory_format=memory_format(cfg))

    def run(self, parts: list[range], keep) -> None:
        """Call ``keep(part, features, damaged)`` for every part.

        features (n, 2, D) float32: of images and mirror images, on the CPU; damaged: the indices of
        damaged records in the part.
        """
        cfg = self.cfg
        images = TrainingImages(
            self.dataset, parts, cfg.val_batch_size, cfg.num_workers, self.device
        )

        def keep_part(part, features):
            damaged = [index for index in part if index in images.damaged]
            keep(part, features.view(len(part), 2, -1), damaged)

        try:
            embed_parts(
                self.teacher,
                images,
                parts,
                cfg.val_batch_size,
                keep_part,
                device=self.device,
                precision=self.precision,
                channels_last=cfg.channels_last,
                name="teacher",
            )
        finally:
            images.close()
