"""IJB-B and IJB-C from disk, in the two layouts people have: InsightFace's loose crops with meta
files, and CVLFace's aligned images.

InsightFace: ``loose_crop/*.jpg`` and in ``meta``, all beginning with one prefix (ijbb, ijbc),
``_face_tid_mid.txt`` (name, template, media), ``_template_pair_label.txt`` (template, template, 1
if the same person) and ``_name_5pts_score.txt`` (name, x and y of five points, detector score).
CVLFace: see eval/sets/arrow.py. In both, 1:N comes with the lists ``_1N_gallery_<name>.csv`` and
``_1N_probe_mixed.csv``.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from eval.ijb import check_mated, list_templates
from eval.sets.arrow import open_images, read_metadata, saved_fingerprint
from eval.sets.folder import (
    ImageFiles,
    find_set,
    fingerprint,
    first_of,
    layout_error,
    refuse_empty_files,
    scan,
    warn_if_not_as_published,
)
from eval.sets.ijb_meta import check_points, in_order, read_lists, read_pairs, read_rows
from utils.errors import InputError
from utils.saved_table import is_saved

SUFFIX = "_gt_aligned"  # of CVLFace's folders
CROPS, META = "loose_crop", "meta"
FACES, PAIRS, POINTS = "_face_tid_mid.txt", "_template_pair_label.txt", "_name_5pts_score.txt"
PUBLISHED = {
    "ijbb": {"image": 227_630, "pair": 8_010_270},
    "ijbc": {"image": 469_375, "pair": 15_658_489},
}


class IJBSet(NamedTuple):
    """N images of templates and media, and P pairs of templates to compare."""

    name: str
    images: Dataset  # images[i] -> (112, 112, 3) uint8 RGB; name_of(i)
    faceness_scores: np.ndarray  # (N,) float32, the detector's
    templates: np.ndarray  # (N,) int64
    medias: np.ndarray  # (N,) int64: a photograph, or a video whose frames these are
    label: np.ndarray  # (P,) int64, 1: the same person
    p1: np.ndarray  # (P,) int64 template
    p2: np.ndarray  # (P,) int64 template
    # "G1" -> templates, subjects (rows,) int64, a row per image; {} without 1:N lists
    galleries: dict[str, tuple[np.ndarray, np.ndarray]]
    probes: tuple[np.ndarray, np.ndarray] | None  # likewise
    # of what decides the images and their order, and of the other meta files but the 1:N lists
    fingerprint: str


def find_ijb(root: str | Path, target: str) -> Path:
    """The set's folder: ``root/target``, or else ``root/target_gt_aligned``.

    Raises InputError listing the folders that are there.
    """
    return find_set(root, target, SUFFIX)


def load_ijb(root: str | Path, target: str) -> IJBSet:
    """Read everything but the images, and check it, so that an evaluation does not fail after
    hours; one image is read as a sample.

    Raises InputError naming the file (and line) for files that are missing, cut off or do not fit
    each other, images that are missing, pairs or 1:N lists with templates of which there is no
    image or all detector scores are 0, no genuine or no impostor pair, a gallery with the subjects
    of all probes or of none, an unreadable first image.
    """
    folder = find_ijb(root, target)
    # CVLFace's may have got a copy of the meta files
    has_meta_only = not is_saved(folder) and bool(prefixes(folder / META))
    crops = (folder / CROPS).is_dir() or has_meta_only
    if crops == is_saved(folder):
        layout = f"InsightFace's layout (folders {CROPS} and {META}, in it <prefix>{FACES})"
        raise layout_error(folder, crops, layout)
    ijb = read_insightface(folder, target) if crops else read_cvlface(folder, target)
    check(ijb, folder)
    ijb.images[0]
    published = PUBLISHED.get(target.lower().removesuffix(SUFFIX))
    if published:
        warn_if_not_as_published(
            target, {"image": len(ijb.images), "pair": len(ijb.label)}, published
        )
    return ijb


# --- layouts


def read_cvlface(folder: Path, target: str) -> IJBSet:
    images = open_images(folder)
    columns = dict(faceness_scores=float, templates=int, medias=int, label=int, p1=int, p2=int)
    meta = read_metadata(folder, columns)
    return IJBSet(
        target,
        images,
        **meta,
        **read_lists([folder, folder / META], "*"),
        fingerprint=saved_fingerprint(folder),
    )


def read_insightface(folder: Path, target: str) -> IJBSet:
    crops, meta = folder / CROPS, folder / META
    for part in (crops, meta):
        if not part.is_dir():
            raise InputError(
                f"{folder}: no folder {part.name}; InsightFace's layout has {CROPS} and {META}"
            )
    prefix = choose_prefix(meta, target)
    faces, points, pairs = files = [meta / (prefix + name) for name in (FACES, POINTS, PAIRS)]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise InputError(
            f"{meta}: no {' and no '.join(missing)}; files there: {', '.join(sorted(scan(meta)))}"
        )
    names, numbers = read_rows(faces, "q", ("template", "media"))
    values = in_order(names, faces, *read_rows(points, "d", ("x", "y") * 5 + ("score",)), points)
    landmarks = values[:, :10].astype(np.float32).reshape(-1, 5, 2)
    check_points(names, landmarks, points)
    p1, p2, label = read_pairs(pairs)
    listing = find_files(crops, names)
    return IJBSet(
        target,
        ImageFiles(crops, names, landmarks),
        values[:, 10].astype(np.float32),
        *numbers.T.copy(),
        label,
        p1,
        p2,
        **read_lists([meta], prefix),
        fingerprint=fingerprint(files, listing),
    )


def prefixes(meta: Path) -> list[str]:
    return sorted(path.name.removesuffix(FACES) for path in meta.glob("*" + FACES))


def choose_prefix(meta: Path, target: str) -> str:
    """What the names of the set's meta files begin with.

    Raises InputError if there are none, or those of several sets, none the target's.
    """
    present, own = prefixes(meta), target.lower().removesuffix(SUFFIX)
    if not present:
        files = ", ".join(sorted(scan(meta))) or "none"
        raise InputError(f"{meta}: no *{FACES}; files there: {files}")
    if len(present) == 1:
        return present[0]
    if own not in present:
        names = ", ".join(present)
        raise InputError(
            f"{meta} has the meta files of several sets ({names}), none of them of {own}"
        )
    return own


def find_files(folder: Path, names: list[str]) -> list[tuple]:
    """(name, bytes, modification time) of every image.

    Raises InputError with the number and the first of those missing or empty.
    """
    files = scan(folder)
    missing = [name for name in names if name not in files]
    if missing:
        raise InputError(
            f"{folder} lacks {first_of(missing, 'image')}, of {len(names)} in the meta files"
        )
    listing = [(name, *files[name]) for name in names]
    refuse_empty_files(folder, listing)
    return listing


# --- checks


def check(ijb: IJBSet, folder: Path) -> None:
    """Raises InputError unless all parts of a set fit each other, naming the first that does
    not.
    """
    check_lengths(ijb, ("images", "faceness_scores", "templates", "medias"), folder)
    check_lengths(ijb, ("label", "p1", "p2"), folder)
    unscored = np.flatnonzero(~np.isfinite(ijb.faceness_scores))
    if len(unscored):
        names = first_of([ijb.images.name_of(index) for index in unscored], "image")
        raise InputError(f"{folder}: {names}, with a detector score that is not finite")
    check_label(ijb.label, folder)
    lists = {f"1:N gallery {name}": rows for name, rows in ijb.galleries.items()}
    if ijb.probes:
        lists["1:N probes"] = ijb.probes
    for templates in (ijb.p1, ijb.p2):
        check_templates(ijb, templates, folder, "pairs")
    for name, (templates, _) in lists.items():
        check_templates(ijb, templates, folder, name)
    subjects = {
        name: list_templates(f"{folder}: the list of the {name}", *rows)[1]
        for name, rows in lists.items()
    }
    for name in ijb.galleries:
        gallery = f"1:N gallery {name}"
        mated = np.isin(subjects["1:N probes"], subjects[gallery])
        check_mated(mated, f"{folder}: {gallery}: ")


def check_lengths(ijb: IJBSet, fields: tuple[str, ...], folder: Path) -> None:
    lengths = {field: len(getattr(ijb, field)) for field in fields}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        counts = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise InputError(f"{folder}: {counts}: they must be equal, and not 0")


def check_label(label: np.ndarray, folder: Path) -> None:
    other = np.flatnonzero((label != 0) & (label != 1))
    if len(other):
        raise InputError(
            f"{folder}: pair {other[0] + 1} of {len(label)} has the label {label[other[0]]}; "
            "labels are 1 (genuine) and 0 (impostor)"
        )
    if not label.any() or label.all():
        kind = "impostor" if label.any() else "genuine"
        raise InputError(f"{folder}: no {kind} pair among {len(label)}: rates cannot be measured")


def check_templates(ijb: IJBSet, templates: np.ndarray, folder: Path, where: str) -> None:
    """Raises InputError naming the first of the listed templates that can have no feature."""
    unknown = np.flatnonzero(~np.isin(templates, ijb.templates))
    if len(unknown):
        distinct = list(dict.fromkeys(templates[unknown].tolist()))
        raise InputError(
            f"{folder}: there is no image of {first_of(distinct, 'template')}, in the {where} "
            f"(row {unknown[0] + 1} of {len(templates)})"
        )
    weightless = np.setdiff1d(ijb.templates, ijb.templates[ijb.faceness_scores != 0])
    if len(weightless):
        weightless = weightless[np.isin(weightless, templates)]
    if len(weightless):
        raise InputError(
            f"{folder}: the detector score of all images is 0 for "
            f"{first_of(weightless.tolist(), 'template')}, in the {where}: "
            "features weighted by it have no direction"
        )
