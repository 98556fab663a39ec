"""Read a whole training set before a run does: which images are unreadable, which labels empty,
which images there twice, how large the identities are.

    python data/check_rec.py data/faces_emore --sheet sheet.png --json check.json

takes what rec= takes: a folder with train.rec (or its shards), a .rec, or several of these (with
commas or spaces between them; of several folders add rec_labels=shared or rec_labels=separate); or
a folder of identities. It decodes every image in as many processes as there are cores and prints
what it finds.

Errors, which make the exit status 1: unreadable records (damaged, no image, not 112x112), JPEGs
that end early (no end marker: decoders fill the rest with grey, or give up), labels that are no
class of the set, classes without an image (label gaps), all images in one class, and the same bytes
under two identities. The same bytes twice under one identity are only reported. --allow names
errors to tolerate. --sheet draws identities, large and small, and images that two identities share.
A missing train.idx or property is rebuilt, as training does. About 100 bytes a record are kept in
memory.
"""

import argparse
import hashlib
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from tqdm import tqdm

from data.contact_sheet import draw_sheet, training_set_rows
from utils.command_line import command_parser
from utils.dataset.base import FaceImages, decode_into
from utils.dataset.folder import FaceDatasetFolder, Identities, refuse_empty, why_empty
from utils.dataset.labels import from_1, one_class
from utils.dataset.records import MXFaceDataset
from utils.dataset.workers import cores
from utils.errors import InputError, RecordError, run
from utils.files import write_json
from utils.jpeg import ends_early
from utils.process_pool import in_parallel
from utils.recordio.files import IMAGE_SIZE, has_records, split_paths

# records that a process reads at a time
PIECE = 1024
# bytes: among six million images two different ones share it with a chance of 1e-25
DIGEST = 16
# of each finding at most so many are listed, all are counted
SHOWN = 1000
# of the histogram of identity sizes
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
ERRORS = ("unreadable", "cut", "labels", "gaps", "single", "shared")


class Contents(NamedTuple):
    """Of N records, in order.

    labels: (N,) float64, NaN where there is no header. digests: (N,) of the stored bytes.
    readable: (N,) bool. cut: (N,) bool, JPEGs that end early. bad: (index, reason) of the first
    SHOWN that are not readable.
    """

    labels: np.ndarray
    digests: np.ndarray
    readable: np.ndarray
    cut: np.ndarray
    bad: list[tuple[int, str]]


class Records(MXFaceDataset):
    """A record set whose labels are not looked at when it is opened: here they are a finding."""

    def _check_last_labels(self) -> None:
        pass


class Folders(FaceDatasetFolder):
    """A folder of identities, of which those without images are a finding."""

    def _refuse_empty(self, identities: Identities) -> None:
        if not any(identities.groups):
            refuse_empty(self.root_dir, identities)
        self.without_images = why_empty(identities)


def main() -> None:
    args = parse_arguments()
    dataset, name = open_set(args.set)
    contents = read_all(dataset, args.workers)
    findings, shared = examine(dataset, contents)
    print(describe(name, findings), flush=True)
    if args.json:
        write_json(args.json, findings)
    if args.sheet:
        labels = np.where(contents.readable, contents.labels, np.nan)
        draw_sheet(args.sheet, training_set_rows(dataset, labels, shared))
        print(f"{args.sheet}: what they look like")
    wrong = [
        f"{findings[name]['count']} {findings[name]['what']}"
        for name in ERRORS
        if findings[name]["count"] and name not in args.allow
    ]
    if wrong:
        raise InputError(f"{name}: {', '.join(wrong)}")


def open_set(arguments: list[str]) -> tuple[FaceImages, str]:
    """(the set, its name). arguments: of the command line. Raises InputError as training does."""
    paths, labels = [], "auto"
    for argument in arguments:
        if argument.startswith("rec_labels="):
            labels = argument.removeprefix("rec_labels=")
        else:
            names = argument.removeprefix("rec=").removeprefix("data_path=")
            paths += split_paths(names, Path.cwd())
    paths = [str(Path(path).expanduser()) for path in paths]
    if len(paths) == 1:
        path = Path(paths[0])
        if not path.is_dir() and path.suffix != ".rec":
            raise InputError(
                f"no folder {path.absolute()}: name a folder with train.rec, a .rec, or a folder "
                "of identities"
            )
        if path.is_dir() and not has_records(path):
            return Folders(str(path)), paths[0]
    return Records(paths, labels=labels), ", ".join(paths)


# --- reading


def read_all(dataset: FaceImages, workers: int) -> Contents:
    """Every record of the set, in pieces, in as many processes."""
    indices = range(len(dataset))
    pieces = [indices[first : first + PIECE] for first in indices[::PIECE]]
    whole = nothing_read(len(dataset))
    parts = in_parallel(Reading(dataset), pieces, min(workers, len(pieces)))
    with tqdm(desc="reading", total=len(dataset), unit="img", disable=None) as bar:
        for piece, part in zip(pieces, parts, strict=True):
            for column, values in zip(whole[:4], part[:4], strict=True):
                column[piece.start : piece.stop] = values
            whole.bad.extend(part.bad[: SHOWN - len(whole.bad)])
            bar.update(len(piece))
    return whole


def nothing_read(count: int) -> Contents:
    """Of so many records, none of which is read yet."""
    digests = np.zeros(count, f"V{DIGEST}")
    readable, cut = np.zeros(count, bool), np.zeros(count, bool)
    return Contents(np.full(count, np.nan), digests, readable, cut, [])


class Reading:
    """range of indices -> Contents of these records."""

    def __init__(self, dataset: FaceImages):
        self.dataset = dataset

    def __call__(self, piece: range) -> Contents:
        labels, digests, readable, cut, bad = part = nothing_read(len(piece))
        image = np.empty((*IMAGE_SIZE, 3), np.uint8)
        for row, index in enumerate(piece):
            try:
                encoded, labels[row] = self.dataset.stored(index)
                digests[row] = np.void(hashlib.blake2b(encoded, digest_size=DIGEST).digest())
                cut[row] = ends_early(encoded)
                decode_into(encoded, image)
                readable[row] = True
            except RecordError as error:
                bad.append((index, str(error)))
        return part


# --- examining


def examine(dataset: FaceImages, contents: Contents) -> tuple[dict, list[np.ndarray]]:
    """(all findings, as --json writes them; indices of images that two identities share, by image).

    Labels are those in the records; classes those of the whole set, where folders count theirs on.
    """
    labels, readable = contents.labels, contents.readable
    classes, fits = labels.copy(), np.zeros(len(labels), bool)
    for part, first, count in dataset.parts():
        stored = labels[part]
        # a NaN does not fit
        fits[part] = (stored >= 0) & (stored < count) & (stored == np.floor(stored))
        classes[part] += first
    strange = np.flatnonzero(~fits & (readable | ~np.isnan(labels)))
    sizes = np.bincount(classes[readable & fits].astype(np.int64), minlength=dataset.num_classes)
    gaps = np.flatnonzero(sizes == 0)
    cut = np.flatnonzero(contents.cut)
    single = np.unique(classes[readable])
    single = single if len(single) == 1 else single[:0]
    groups = group_equal(contents.digests, np.flatnonzero(readable))
    shared = [group for group in groups if len(np.unique(classes[group])) > 1]
    repeated = sum(map(len, groups)) - len(groups)
    findings = dict(
        images=len(dataset),
        classes=dataset.num_classes,
        unreadable=finding(
            "unreadable records",
            [dict(record=dataset.name_of(index), reason=reason) for index, reason in contents.bad],
            int((~readable).sum()),
        ),
        cut=finding(
            "JPEGs that end early (no end marker: the rest is grey, or they cannot be read)",
            names_and_labels(dataset, classes, cut[:SHOWN]),
            len(cut),
        ),
        labels=finding(
            f"labels that are no class{run_from_1(labels[readable], dataset)}",
            names_and_labels(dataset, labels, strange[:SHOWN]),
            len(strange),
        ),
        gaps=find_gaps(dataset, gaps),
        single=finding(
            "class only" + "".join(f": {one_class(dataset, label)}" for label in single),
            single.tolist(),
            len(single),
        ),
        shared=finding(
            "images under two identities (same bytes)",
            [names_and_labels(dataset, classes, group) for group in shared[:SHOWN]],
            len(shared),
        ),
        duplicates=finding(
            "copies of an image that is there already (same bytes)",
            [names_and_labels(dataset, classes, group) for group in groups[:SHOWN]],
            repeated,
        ),
        identity_sizes=describe_sizes(sizes),
    )
    return findings, shared


def find_gaps(dataset: FaceImages, gaps: np.ndarray) -> dict:
    """Classes without an image: by number; of a folder by name, and why they have none."""
    what, listed = "label gaps (classes without an image)", gaps[:SHOWN].tolist()
    if isinstance(dataset, Folders):
        listed = [dataset.identities[number] for number in listed]
        if dataset.without_images:
            what = f"identities without a readable image ({dataset.without_images})"
    elif listed == [0]:
        what = "label gaps (classes without an image; labels run from 1, and class 0 stays empty)"
    return finding(what, listed, len(gaps))


def run_from_1(labels: np.ndarray, dataset: FaceImages) -> str:
    """What to add about labels where class 0 is missing and one is too large."""
    count = dataset.num_classes
    if len(labels) and labels.min() >= 1 and labels.max() == count:
        return f" (labels run from {labels.min():g} to {count}; {from_1(dataset, count)})"
    return ""


def finding(what: str, listed: list, count: int) -> dict:
    """count: of all; listed: the first of them."""
    return dict(what=what, count=count, listed=listed)


def names_and_labels(dataset: FaceImages, classes: np.ndarray, group: np.ndarray) -> list[dict]:
    return [
        dict(record=dataset.name_of(index), label=float(classes[index])) for index in group.tolist()
    ]


def group_equal(digests: np.ndarray, indices: np.ndarray) -> list[np.ndarray]:
    """The indices whose digests are equal, two or more a group, each rising."""
    order = indices[np.argsort(digests[indices], kind="stable")]
    if len(order) < 2:
        return []
    starts = np.flatnonzero(np.append(True, digests[order[1:]] != digests[order[:-1]]))
    ends = np.append(starts[1:], len(order))
    several = ends - starts > 1
    return sorted(
        (order[start:end] for start, end in zip(starts[several], ends[several], strict=True)),
        key=lambda group: int(group[0]),
    )


def describe_sizes(sizes: np.ndarray) -> dict:
    """Images of the classes that have any: least, median, mean, most, and how many classes have 1,
    2 to 4, 5 to 9, ... of them.
    """
    present = sizes[sizes > 0]
    if not len(present):
        return dict(classes=0)
    counts = np.histogram(present, [*STEPS, np.inf])[0]
    names = [f"{low}" if high == low + 1 else f"{low}-{high - 1}" for low, high in pairwise(STEPS)]
    names.append(f"{STEPS[-1]} and more")
    return dict(
        classes=len(present),
        least=int(present.min()),
        median=float(np.median(present)),
        mean=float(present.mean()),
        most=int(present.max()),
        largest_class=int(sizes.argmax()),
        smallest_class=int(np.flatnonzero(sizes == present.min())[0]),
        histogram={name: int(count) for name, count in zip(names, counts, strict=True) if count},
    )


def describe(name: str, findings: dict) -> str:
    """The findings in words, of each kind the first."""
    sizes = findings["identity_sizes"]
    lines = [f"{name}: {findings['images']:,} images, {findings['classes']:,} classes"]
    if sizes["classes"]:
        lines.append(
            f"images an identity: {sizes['least']} at least, {sizes['median']:g} median, "
            f"{sizes['mean']:.1f} mean, {sizes['most']} at most (class {sizes['largest_class']})"
        )
        bars = ", ".join(f"{name}: {count:,}" for name, count in sizes["histogram"].items())
        lines.append(f"identities by images: {bars}")
    for kind in (*ERRORS, "duplicates"):
        count, listed = findings[kind]["count"], findings[kind]["listed"]
        what = findings[kind]["what"]
        if kind != "single":
            first = f"; the first: {show(listed[0])}" if count else ""
            lines.append(f"{what}: {count:,}{first}")
        elif count:
            lines.append(f"one {what}")
    return "\n".join(lines)


def show(entry) -> str:
    if isinstance(entry, list):
        return " = ".join(map(show, entry))
    if not isinstance(entry, dict):
        return str(entry)
    if "reason" in entry:
        return f"record {entry['record']}, {entry['reason']}"
    return f"record {entry['record']} with label {entry['label']:g}"


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument(
        "set",
        nargs="+",
        metavar="SET",
        help="what rec= names (folders, .rec files), or a folder of identities",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help=f"write all findings there (of each kind the first {SHOWN} are listed)",
    )
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="draw a contact sheet")
    parser.add_argument(
        "--allow",
        nargs="+",
        choices=ERRORS,
        default=(),
        metavar="WHAT",
        help=f"findings that are no error: {', '.join(ERRORS)}",
    )
    parser.add_argument(
        "--workers", type=int, default=cores(), metavar="N", help="processes (%(default)s)"
    )
    args = parser.parse_args()
    if args.workers < 1:
        raise InputError("--workers must be at least 1")
    if args.sheet and args.sheet.suffix.lower() != ".png":
        raise InputError(f"--sheet: {args.sheet} must end in .png")
    for path, flag in ((args.json, "--json"), (args.sheet, "--sheet")):
        if path and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise InputError(
                f"{flag}: {path.absolute()} is a folder, or in none; name a file in a "
                "folder that is there"
            )
    return args


if __name__ == "__main__":
    run(main)
