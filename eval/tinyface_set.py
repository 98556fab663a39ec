"""TinyFace from disk, in the two layouts people have: the official tree of aligned images, and CVLFace's folder.

The tree: ``Testing_Set/Probe``, ``Gallery_Match`` and ``Gallery_Distractor`` (or the three without ``Testing_Set``), images aligned to 112x112 named
``<identity>_<number>.jpg``; distractors may have any name. CVLFace: see eval/arrow.py; its column ``path`` tells which image a row is.
"""

from pathlib import Path
from typing import NamedTuple

from torch.utils.data import Dataset

from eval.arrow import METADATA, is_saved, open_records, read_metadata, saved_fingerprint
from eval.set_folder import ImageFiles, find_set, fingerprint, first_of, scan, warn_if_not_as_published
from utils.errors import InputError

SUFFIX = "_aligned_pad_0.1"     # of CVLFace's folder
TOP = "Testing_Set"
FOLDERS = {"probe_paths": "Probe", "gallery_paths": "Gallery_Match", "distractor_paths": "Gallery_Distractor"}
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
PUBLISHED = {"probes": 3_728, "gallery images": 157_871}


class TinyFaceSet(NamedTuple):
    """N images, and which of them are probes, their mates in the gallery, and distractors there."""

    name: str
    images: Dataset             # images[i] -> (112, 112, 3) uint8 RGB; name_of(i)
    image_paths: list[str]      # of images[i]; its file name without suffix is the image's key, unique in the set
    meta: dict[str, list[str]]  # probe_paths, gallery_paths, distractor_paths, of keys among image_paths'
    fingerprint: str


def find_tinyface(root: str | Path, target: str) -> Path:
    """The set's folder: ``root/target``, or else ``root/target_aligned_pad_0.1``. Errors: InputError listing the folders that are there."""
    return find_set(root, target, SUFFIX)


def load_tinyface(root: str | Path, target: str) -> TinyFaceSet:
    """Read everything but the images, and check it, so that an evaluation does not fail after hours; one image is read as a sample.

    Errors: InputError for missing or empty folders, unreadable metadata, lists naming images that are not there, two images with one key,
    a probe without a mate in the gallery, a first image that is unreadable or not aligned.
    """
    folder = find_tinyface(root, target)
    tree = any((folder / name).is_dir() for name in (TOP, *FOLDERS.values()))
    if tree == is_saved(folder):
        raise InputError(f"{folder} is {'both' if tree else 'neither'} the official layout (folders {TOP}/{', '.join(FOLDERS.values())}) "
                         f"{'and' if tree else 'nor'} CVLFace's (state.json, dataset_info.json, *.arrow, {METADATA})")
    tinyface = read_tree(folder, target) if tree else read_cvlface(folder, target)
    check(tinyface, folder)
    tinyface.images[0]
    if target.lower().removesuffix(SUFFIX) == "tinyface":
        probes, *gallery = map(len, tinyface.meta.values())
        warn_if_not_as_published(target, {"probes": probes, "gallery images": sum(gallery)}, PUBLISHED)
    return tinyface


def read_cvlface(folder: Path, target: str) -> TinyFaceSet:
    images = open_records(folder, with_paths=True)
    meta = read_metadata(folder, dict.fromkeys(("image_paths", *FOLDERS), str))
    listed = meta.pop("image_paths")
    if sorted(map(key_of, listed)) != sorted(map(key_of, images.names)):
        raise InputError(f"{folder}: the {len(listed)} image_paths of {METADATA} are not the {len(images)} images in the column 'path'")
    return TinyFaceSet(target, images, images.names, meta, saved_fingerprint(folder))


def read_tree(folder: Path, target: str) -> TinyFaceSet:
    top = Path(TOP) if (folder / TOP).is_dir() else Path()
    listing, meta = [], {}
    for key, name in FOLDERS.items():
        place = folder / top / name
        if not place.is_dir():
            raise InputError(f"{place.parent}: no folder {name}; TinyFace has {', '.join(FOLDERS.values())}")
        files = sorted((str(top / name / file), *stat) for file, stat in scan(place).items() if file.lower().endswith(SUFFIXES))
        if not files:
            raise InputError(f"{place} holds no images ({', '.join(SUFFIXES)})")
        meta[key] = [path for path, *_ in files]
        listing += files
    empty = [path for path, size, _ in listing if not size]
    if empty:
        raise InputError(f"{folder}: {first_of(empty, 'files of 0 bytes')}: copy them again")
    paths = [path for path, *_ in listing]
    return TinyFaceSet(target, ImageFiles(folder, paths), paths, meta, fingerprint((), listing))


def key_of(path: str) -> str:
    """What an image is known by: its file name without the suffix."""
    return Path(path).stem


def identity_of(path: str) -> str:
    return Path(path).name.split("_")[0]


def check(tinyface: TinyFaceSet, folder: Path) -> None:
    """That images and lists fit each other. Errors: InputError naming the first thing that does not."""
    keys = name_once(tinyface.image_paths, f"{folder}: the images")
    for name, paths in tinyface.meta.items():
        unknown = [path for path in paths if key_of(path) not in keys]
        if unknown or not paths:
            raise InputError(f"{folder}: {name} has {first_of(unknown, 'paths of which there is no image') if unknown else 'no entries'}")
    name_once([path for paths in tinyface.meta.values() for path in paths], f"{folder}: {', '.join(tinyface.meta)}")
    probes, gallery, _ = tinyface.meta.values()
    anonymous = [path for path in probes + gallery if "_" not in key_of(path)]
    if anonymous:
        raise InputError(f"{folder}: {first_of(anonymous, 'images')}, whose names do not tell the identity (<identity>_<number>.jpg)")
    known = set(map(identity_of, gallery))
    lonely = [path for path in probes if identity_of(path) not in known]
    if lonely:
        raise InputError(f"{folder}: {first_of(lonely, 'probes')}, have no image of their identity in the gallery")


def name_once(paths: list[str], where: str) -> dict[str, str]:
    """Key -> path. Errors: InputError if two paths have one key, for then features could not be told apart."""
    seen = {}
    for path in paths:
        key = key_of(path)
        if key in seen:
            raise InputError(f"{where} name {key} twice ({seen[key]} and {path})")
        seen[key] = path
    return seen
