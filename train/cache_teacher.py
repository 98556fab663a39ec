"""Run the teacher once over the training set, and keep its features for training.

    python train/cache_teacher.py --output data/teacher \\
        teacher=ir50 pretrained_teacher_path=adaface_ir50_ms1mv2.ckpt
    torchrun --nproc_per_node 4 train/cache_teacher.py ...              on several GPUs
    python train/cache_teacher.py --from features.npz --output data/teacher

then ./run_AdaDistill.sh teacher_embeddings=data/teacher. Of every image and of its mirror image the
features are written as float16 (MS1MV2 in 512 dimensions: 11.9 GB), with a manifest of what they
are. A run that was killed goes on where it was; the same command again is enough. It prints how
many images are to compute, how many are there, and in the end what the cache holds. precision is
that of the teacher, once and for all: precision=fp32 costs time only here.

--from takes the features of any other model: an .npz with emb and emb_flip, (N, D) float16 or
float32 in record-key order (a folder's: sorted by identity, then by name), and optionally label
(N,), which is compared with that of every record.
"""

import argparse
import logging
import sys
import zipfile
import zlib
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from tqdm import tqdm

from config.load import argument_parser, load_config
from train import build
from train.damaged_records import refuse_too_many
from train.teacher_pass import TeacherPass, log_to_console
from utils import distributed
from utils.errors import InputError, run
from utils.teacher.cache import CacheSource, TeacherCache, make_manifest, read_manifest
from utils.teacher.cache_writer import CacheWriter
from utils.teacher.names import ONNX, repository_of
from utils.weights.read import sha256

# what zipfile and NumPy's headers raise
DAMAGED_ARCHIVE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    KeyError,
    ValueError,
    NotImplementedError,
    RuntimeError,
)


def main():
    arguments = parse_arguments()
    cfg = load_config(arguments.config, arguments.overrides)
    if arguments.output:
        output = arguments.output.absolute()
    elif cfg.teacher_embeddings:
        output = Path(cfg.teacher_embeddings)
    else:
        raise InputError(
            "no folder for the features: name one with --output, or with "
            "teacher_embeddings= as in training"
        )
    device = distributed.init(cfg.device)
    log_to_console()
    dataset = build.build_dataset(cfg)
    if arguments.source:
        writer = import_features(arguments.source, dataset, output)
    else:
        writer = compute_features(cfg, dataset, output, device)
    if distributed.is_main():
        if writer:
            writer.finish(dataset.name_of)
        logging.info(
            "%s\ntrain from it with teacher_embeddings=%s",
            TeacherCache(output, read_manifest(output)).describe(),
            output,
        )
    distributed.shutdown()


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__, "dataset=CASIA_WebFace val_batch_size=256")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder of the cache (default: the configuration's teacher_embeddings)",
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="import the features of an .npz instead of running a teacher",
    )
    return parser.parse_intermixed_args()


def compute_features(cfg, dataset, output: Path, device) -> CacheWriter | None:
    """Every rank computes its share of what is missing.

    Returns the writer, None if the cache was complete before.
    """
    teacher_pass = TeacherPass(cfg, dataset, device)
    teacher = teacher_pass.teacher
    # onnxruntime knows no autocast
    precision = "fp32" if teacher.name.startswith(ONNX) else teacher_pass.precision
    origin = CacheSource(
        teacher.name,
        precision,
        Path(teacher.path).name,
        teacher.sha256,
        teacher.color_space,
        teacher.normalisation,
        repository=repository_of(cfg),
        color_space_set=cfg.color_space != "auto"
        and teacher.color_space != teacher.own_color_space,
    )
    writer = open_writer(output, make_manifest(dataset, teacher.embedding_size, origin))
    if writer is None:
        logging.info("nothing to compute")
        return None
    missing = distributed.main_computes(writer.missing)
    todo = sum(map(len, missing))
    logging.info("%d images to compute, %d are in %s", todo, len(dataset) - todo, output)

    def check_damaged():
        names = [dataset.name_of(index) for index in writer.replaced()]
        refuse_too_many(names, cfg.max_bad_records)

    def keep(part, features, damaged):
        writer.write(part, features.numpy(), damaged)
        check_damaged()

    check_damaged()
    teacher_pass.run(missing[distributed.rank() :: distributed.world_size()], keep)
    return writer


def open_writer(output: Path, manifest: dict) -> CacheWriter | None:
    """The cache to write on all ranks, prepared by the first; None if it is complete."""
    first = distributed.all_succeed(
        lambda: CacheWriter(output, manifest, main=True) if distributed.is_main() else None
    )
    if distributed.main_computes(lambda: first.complete):
        return None
    return distributed.all_succeed(lambda: first or CacheWriter(output, manifest, main=False))


# --- features of another model


def import_features(source: Path, dataset, output: Path) -> CacheWriter | None:
    """The first rank copies the features of ``source``, a part at a time, and compares its labels.

    Raises InputError if they are not this set's.
    """
    if not distributed.is_main():
        return None
    columns, size, kind = open_columns(source, len(dataset))
    writer = CacheWriter(
        output,
        make_manifest(dataset, size, CacheSource(source.name, kind, imported=sha256(source))),
        main=True,
    )
    if writer.complete:
        return None
    for part in tqdm(writer.missing(), desc=source.name, unit="part", disable=None):
        rows = {name: column.read(part) for name, column in columns.items()}
        for name in ("emb", "emb_flip"):
            useful = np.isfinite(rows[name]).all(axis=1) & rows[name].any(axis=1)
            if not useful.all():
                record = dataset.name_of(part.start + int(useful.argmin()))
                raise InputError(
                    f"--from: {name} of record {record} in {source} is not finite or all zeros"
                )
        if "label" in rows:
            compare_labels(rows["label"], dataset, part, source)
        writer.write(part, np.stack([rows["emb"], rows["emb_flip"]], axis=1))
    return writer


def compare_labels(labels: np.ndarray, dataset, part: range, source: Path) -> None:
    expected = dataset.labels(part)
    # below 0: a damaged record, whose label is not known
    differ = (labels != expected) & (expected >= 0)
    if differ.any():
        first = int(differ.argmax())
        raise InputError(
            f"--from: record {dataset.name_of(part.start + first)} has label "
            f"{expected[first]}, {source} says {labels[first]}: "
            "its features are of another set or in another order"
        )


class Column:
    """One array of an .npz, read from its beginning to its end a part at a time.

    So features of millions of images need no memory.
    """

    def __init__(self, archive: zipfile.ZipFile, name: str, path: Path):
        self.name = name
        self.path = path
        self.at = 0
        try:
            self.stream = archive.open(f"{name}.npy")
            if np.lib.format.read_magic(self.stream) == (1, 0):
                header = np.lib.format.read_array_header_1_0(self.stream)
            else:
                header = np.lib.format.read_array_header_2_0(self.stream)
            self.shape, by_column, self.dtype = header
        except DAMAGED_ARCHIVE as error:
            raise InputError(f"--from: {name} of {path} cannot be read ({error})") from error
        if self.dtype.hasobject:
            raise InputError(
                f"--from: {name} of {path} is a pickled array, which could run code: "
                "save plain numbers"
            )
        if by_column and len(self.shape) > 1:
            raise InputError(
                f"--from: {name} of {path} is stored by columns: save np.ascontiguousarray({name})"
            )

    def read(self, part: range) -> np.ndarray:
        """The rows of ``part``, which must follow those of the last call, perhaps after others."""
        row = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        try:
            self.skip((part.start - self.at) * row)
            content = self.stream.read(len(part) * row)
        except DAMAGED_ARCHIVE as error:
            raise InputError(f"--from: {self.name} of {self.path} is damaged ({error})") from error
        if len(content) < len(part) * row:
            raise InputError(f"--from: {self.name} of {self.path} is cut off")
        self.at = part.stop
        return np.frombuffer(content, self.dtype).reshape(len(part), *self.shape[1:])

    def skip(self, size: int) -> None:
        while size > 0 and (skipped := len(self.stream.read(min(size, 1 << 24)))):
            size -= skipped


def open_columns(path: Path, images: int) -> tuple[dict[str, Column], int, str]:
    """emb, emb_flip and, if it is there, label of an .npz; the features' dimensions and type.

    Raises InputError if they cannot be this set's features.
    """
    if not path.is_file():
        raise InputError(f"--from: no file at {path.absolute()}")
    try:
        archive = zipfile.ZipFile(path)
    except DAMAGED_ARCHIVE as error:
        raise InputError(
            f"--from: {path} is no .npz ({error}); write one with numpy.savez(file, "
            "emb=..., emb_flip=...)"
        ) from error
    names = {Path(name).stem for name in archive.namelist()}
    if not {"emb", "emb_flip"} <= names:
        raise InputError(
            f"--from: {path} needs emb and emb_flip, it has {', '.join(sorted(names)) or 'nothing'}"
        )
    columns = {
        name: Column(archive, name, path) for name in ("emb", "emb_flip", "label") if name in names
    }
    emb, flip, label = columns["emb"], columns["emb_flip"], columns.get("label")
    fits = len(emb.shape) == 2 and emb.shape[0] == images and emb.shape[1] > 0
    if not fits or flip.shape != emb.shape or (label and label.shape != (images,)):
        shapes = ", ".join(f"{name} {column.shape}" for name, column in columns.items())
        raise InputError(
            f"--from: {path} has {shapes}; this set has {images} images, so emb and "
            f"emb_flip must be ({images}, D) and label ({images},)"
        )
    fits = emb.dtype in (np.float16, np.float32) and flip.dtype == emb.dtype
    if not fits or (label and label.dtype.kind not in "iuf"):
        kinds = ", ".join(f"{name} {column.dtype}" for name, column in columns.items())
        raise InputError(
            f"--from: {path} has {kinds}; emb and emb_flip must both be float16 or "
            "float32, label a number"
        )
    return columns, emb.shape[1], str(emb.dtype)


if __name__ == "__main__":
    run(main)
