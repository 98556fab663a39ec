"""TinyFace from disk, in the two layouts people have: the official tree of aligned images, and
CVLFace's folder.

The tree: ``Testing_Set/Probe``, ``Gallery_Match`` and ``Gallery_Distractor`` (or the three without
``Testing_Set``), images aligned to 112x112 named ``<identity>_<number>.jpg``; distractors may have
any name. CVLFace: see eval/sets/arrow.py; its column ``path`` tells which image a row is.
"""

from pathlib import Path
from typing import NamedTuple

from torch.utils.data import Dataset

from eval.sets.arrow import METADATA, open_images, read_metadata, saved_fingerprint
from eval.sets.folder import (
    ImageFiles,
    find_set,
    fingerprint,
    first_of,
    layout_error,
    refuse_empty_files,
    scan,
    warn,
    warn_if_not_as_published,
)
from eval.tinyface import find_mateless, find_roles, stem_of
from utils.errors import InputError
from utils.saved_table import is_saved

SUFFIX = "_aligned_pad_0.1"  # of CVLFace's folder
TOP = "Testing_Set"
FOLDERS = {
    "probe_paths": "Probe",
    "gallery_paths": "Gallery_Match",
    "distractor_paths": "Gallery_Distractor",
}
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
PUBLISHED = {"probe": 3_728, "gallery image": 157_871}


class TinyFaceSet(NamedTuple):
    """N images, and which of them are probes, their mates in the gallery, and distractors there."""

    name: str
    images: Dataset  # images[i] -> (112, 112, 3) uint8 RGB; name_of(i)
    image_paths: list[str]  # of images[i], all different
    # probe_paths, gallery_paths, distractor_paths, which eval/tinyface.py finds among image_paths
    meta: dict[str, list[str]]
    fingerprint: str


def find_tinyface(root: str | Path, target: str) -> Path:
    """The set's folder: ``root/target``, or else ``root/target_aligned_pad_0.1``.

    Raises InputError listing the folders that are there.
    """
    return find_set(root, target, SUFFIX)


def load_tinyface(root: str | Path, target: str) -> TinyFaceSet:
    """Read everything but the images, and check it, so that an evaluation does not fail after
    hours; one image is read as a sample.

    Logged as warnings: probes without a mate in the gallery, which count as misses; no distractors.
    Raises InputError for missing or empty folders, unreadable metadata, lists naming images that
    are not there or cannot be told apart, no probe with a mate, a first image that is unreadable or
    not aligned.
    """
    folder = find_tinyface(root, target)
    tree = any((folder / name).is_dir() for name in (TOP, *FOLDERS.values()))
    if tree == is_saved(folder):
        layout = f"the official layout (folders {TOP}/{', '.join(FOLDERS.values())})"
        raise layout_error(folder, tree, layout)
    tinyface = read_tree(folder, target) if tree else read_cvlface(folder, target)
    check(tinyface, folder)
    tinyface.images[0]
    if target.lower().removesuffix(SUFFIX) == "tinyface":
        probes, *gallery = map(len, tinyface.meta.values())
        warn_if_not_as_published(
            target, {"probe": probes, "gallery image": sum(gallery)}, PUBLISHED
        )
    return tinyface


def read_cvlface(folder: Path, target: str) -> TinyFaceSet:
    images = open_images(folder, with_paths=True)
    meta = read_metadata(folder, dict.fromkeys(("image_paths", *FOLDERS), str))
    listed = meta.pop("image_paths")
    stems, by_column = list(map(stem_of, listed)), list(map(stem_of, images.names))
    if sorted(stems) != sorted(by_column):
        raise InputError(
            f"{folder}: the {len(listed)} image_paths of {METADATA} are not the "
            f"{len(images)} images in the column 'path'"
        )
    # the column tells which image a row is; image_paths tells more where the column holds file
    # names only
    are_unlike = set(listed) != set(images.names)
    are_distinct = len(set(listed)) == len(listed)
    paths = listed if stems == by_column and are_unlike and are_distinct else images.names
    return TinyFaceSet(target, images, paths, meta, saved_fingerprint(folder))


def read_tree(folder: Path, target: str) -> TinyFaceSet:
    top = Path(TOP) if (folder / TOP).is_dir() else Path()
    listing, meta = [], {}
    for key, name in FOLDERS.items():
        place = folder / top / name
        if not place.is_dir():
            raise InputError(
                f"{place.parent}: no folder {name}; TinyFace has {', '.join(FOLDERS.values())}"
            )
        files = sorted(
            (str(top / name / file), *stat)
            for file, stat in scan(place).items()
            if file.lower().endswith(SUFFIXES)
        )
        if not files and key != "distractor_paths":
            raise InputError(f"{place} holds no images ({', '.join(SUFFIXES)})")
        meta[key] = [path for path, *_ in files]
        listing += files
    refuse_empty_files(folder, listing)
    paths = [path for path, *_ in listing]
    return TinyFaceSet(target, ImageFiles(folder, paths), paths, meta, fingerprint((), listing))


def check(tinyface: TinyFaceSet, folder: Path) -> None:
    """Raises InputError unless images and lists fit each other, naming the first thing that does
    not.
    """
    paths = tinyface.image_paths
    try:
        probes, gallery, distractors = find_roles(paths, tinyface.meta)
        anonymous = [
            paths[index] for index in (*probes, *gallery) if "_" not in stem_of(paths[index])
        ]
        if anonymous:
            raise InputError(
                "the name does not tell the identity (<identity>_<number>.jpg) of "
                f"{first_of(anonymous, 'image')}"
            )
        mateless = find_mateless(paths, probes, gallery)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    if mateless:
        warn(
            f"{folder}: the gallery has no mate of {first_of(mateless, 'probe')}: counted as a "
            "miss at every rank"
        )
    if not len(distractors):
        warn(f"{folder}: no distractors: the gallery has mates only")
