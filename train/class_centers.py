"""Compute AMLDistill's class centres, where a teacher is published without its header.

    python train/class_centers.py output=data/teacher_centers.pth \\
        teacher=ir50 pretrained_teacher_path=adaface_ir50_ms1mv2.ckpt
    # from what train/cache_teacher.py wrote, without running the teacher
    python train/class_centers.py output=data/teacher_centers.pth teacher_embeddings=data/teacher
    torchrun --nproc_per_node 4 train/class_centers.py ...

writes {"kernel": (D, C)}, which pretrained_teacher_header_path takes. A centre is the mean of the
L2-normalised features of all images of its class and of their mirror images. (output may be a
folder: class_centers.pth in it.) It prints the number of classes, how many images they have, and
the mean cosine between a feature and its class centre, which is the mean length of the centres. A
killed run starts again; where the teacher takes hours, make the cache first, which goes on.
"""

import logging
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from tqdm import tqdm

from config.load import argument_parser, load_config
from train import build
from train.teacher_pass import TeacherPass, log_to_console
from utils import distributed
from utils.errors import InputError, run
from utils.run.folder import save
from utils.teacher.cache_writer import PART


def main():
    cfg = parse_arguments()
    device = distributed.init(cfg.device)
    log_to_console()
    output = distributed.main_computes(lambda: prepare_output(Path(cfg.output)))
    patient = distributed.patient_group()
    dataset = build.build_dataset(cfg)
    cfg = build.with_classes(cfg, dataset)
    starts = range(0, len(dataset), PART)[distributed.rank() :: distributed.world_size()]
    parts = [range(start, min(start + PART, len(dataset))) for start in starts]
    centers = ClassMeans(cfg.num_classes)

    def add(part, features, damaged):
        centers.add(features, labels_of(dataset, part, damaged))

    if cfg.teacher_embeddings:
        read_cache(cfg, dataset, parts, add)
    else:
        TeacherPass(cfg, dataset, device).run(parts, add)
    # a rank may be further behind than the collectives below would wait
    distributed.all_gather_object(None, patient)
    kernel = centers.kernel(dataset.root_dir)
    if distributed.is_main():
        advice = "make room or choose another place with output="
        save({"kernel": kernel}, output, advice)
        counts = centers.counts.sort().values
        logging.info(
            "%d classes of %d to %d images (median %d), %d in all",
            len(counts),
            counts[0],
            counts[-1],
            counts[len(counts) // 2],
            counts.sum(),
        )
        logging.info(
            "mean cosine between a feature and its class centre: %.3f",
            (kernel.norm(dim=0).double() * centers.counts).sum() / counts.sum(),
        )
        logging.info(
            "train with pretrained_teacher_header_path=%s embedding_size=%d", output, len(kernel)
        )
    distributed.shutdown()


def parse_arguments():
    parser = argument_parser(__doc__, "output=data/teacher_centers.pth")
    arguments = parser.parse_intermixed_args()
    if not any(override.startswith("output=") for override in arguments.overrides):
        raise InputError("no file for the centres: name one with output=FILE.pth")
    return load_config(arguments.config, arguments.overrides)


def prepare_output(path: Path) -> Path:
    """The file to write, its folder made. Raises InputError if it cannot be."""
    path = path if path.suffix == ".pth" else path / "class_centers.pth"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"output: cannot make the folder {path.parent} ({error.strerror}); choose "
            "another place with output="
        ) from error
    if not os.access(path.parent, os.W_OK) or path.is_dir():
        raise InputError(f"output: cannot write {path}; choose another place with output=")
    return path


def read_cache(cfg, dataset, parts: list[range], keep) -> None:
    """Call ``keep`` as TeacherPass.run does, with the features in cfg.teacher_embeddings."""
    cache = build.open_teacher_cache(cfg, dataset)
    replaced = set(cache.replaced)
    # None: no bar where no terminal watches
    hidden = None if distributed.is_main() else True
    for part in tqdm(parts, desc="cache", unit="part", leave=False, disable=hidden):
        damaged = [index for index in part if index in replaced]
        keep(part, torch.from_numpy(cache.read_part(part)), damaged)


def labels_of(dataset, part: range, damaged: list[int]) -> torch.Tensor:
    """(n,) labels of the part's images.

    -1 for damaged records, whose features are another image's.
    """
    labels = torch.from_numpy(dataset.labels(part))
    labels[[index - part.start for index in damaged]] = -1
    return labels


class ClassMeans:
    """Sums, in float64, of the normalised features of this rank's images by class.

    Together with the other ranks' they become the centres.
    """

    def __init__(self, num_classes: int):
        self.sums = None
        self.counts = torch.zeros(num_classes, dtype=torch.int64)

    def add(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """features (n, 2, D): of images and mirror images; labels (n,): below 0 is left out."""
        if self.sums is None:
            self.sums = torch.zeros(len(self.counts), features.shape[2], dtype=torch.float64)
        known = labels >= 0
        self.sums.index_add_(0, labels[known], F.normalize(features[known].double(), dim=2).sum(1))
        self.counts += torch.bincount(labels[known], minlength=len(self.counts))

    def kernel(self, root_dir: str) -> torch.Tensor:
        """(D, C) float32 means over all ranks; not normalised again: as long as the class is alike.

        Raises InputError for a class without images.
        """
        size = max(distributed.all_gather_object(0 if self.sums is None else self.sums.shape[1]))
        if self.sums is None:
            self.sums = torch.zeros(len(self.counts), size, dtype=torch.float64)
        sums = distributed.all_reduce(self.sums)
        distributed.all_reduce(self.counts)
        empty = torch.nonzero(self.counts == 0).flatten().tolist()
        if empty:
            raise InputError(
                f"class {empty[0]} of {root_dir} has no readable image, as have "
                f"{len(empty) - 1} more of {len(self.counts)} classes: "
                "there is nothing to compute its centre from; make the set without "
                "it, or set num_classes to the classes that are there"
            )
        return (sums / (2 * self.counts[:, None])).t().contiguous().float()


if __name__ == "__main__":
    run(main)
