"""What lies in the sub-folders of a folder of identities, kept from one start to the next.

Listing ten thousand folders takes minutes on a slow or distant disk. The list is laid down in the
temporary folder (TMPDIR) and holds while the folders have the same inodes and times: every file
that comes, goes or is renamed changes the time of its folder.
"""

import json
import logging
import os
import time
from hashlib import sha256

from utils.files import replacing
from utils.recordio.index import shared_folder

# of the file
FORMAT = 1
# files from which on a list is kept
KEPT_FROM = 20_000
# seconds that folders must have been as they are: a change soon after another one may not show in
# their times
SETTLED = 2

log = logging.getLogger(__name__)

Content = tuple[list[str], list[str]]


def split_folder(folder: str) -> Content:
    """(names of its sub-folders, of its files), sorted, without hidden ones."""
    with os.scandir(folder) as entries:
        visible = sorted((entry.name, entry.is_dir()) for entry in entries if entry.name[0] != ".")
    folders = [name for name, is_folder in visible if is_folder]
    return folders, [name for name, is_folder in visible if not is_folder]


def split_folders(root: str, names: list[str]) -> list[Content]:
    """``split_folder`` of the sub-folders ``names`` of ``root``, by the list if it still holds."""
    stamp, changed = stamp_of(root, names)
    kept = read_list(root, stamp)
    if kept is not None:
        return kept
    is_settled = changed < time.time() - SETTLED
    contents = [split_folder(os.path.join(root, name)) for name in names]
    is_large = sum(len(files) for _, files in contents) >= KEPT_FROM
    if is_large and is_settled and stamp_of(root, names)[0] == stamp:
        write_list(root, stamp, contents)
    return contents


def stamp_of(root: str, names: list[str]) -> tuple[str, float]:
    """(a SHA-256 over names, inodes and times of the folders, when the last of them changed)."""
    digest, newest = sha256(), 0
    for name in names:
        status = os.stat(os.path.join(root, name))
        marks = status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns
        digest.update(f"{name}\0{marks}\0".encode("utf-8", "surrogateescape"))
        newest = max(newest, status.st_mtime_ns, status.st_ctime_ns)
    return digest.hexdigest(), newest / 1e9


def list_file(folder: str, root: str) -> str:
    digest = sha256(os.fsencode(os.path.abspath(root))).hexdigest()
    return os.path.join(folder, f"folders-{digest[:32]}.json")


def read_list(root: str, stamp: str) -> list[Content] | None:
    """None if there is none, or one of other times."""
    folder = shared_folder()
    if folder is None:
        return None
    try:
        with open(list_file(folder, root), "rb") as file:
            head = json.loads(file.readline())
            return json.loads(file.read()) if head == [FORMAT, stamp] else None
    except (FileNotFoundError, ValueError):
        return None


def write_list(root: str, stamp: str, contents: list[Content]) -> None:
    folder = shared_folder()
    if folder is None:
        return
    path = list_file(folder, root)
    try:
        with replacing(path) as file:
            file.write(f"{json.dumps([FORMAT, stamp])}\n{json.dumps(contents)}".encode())
    except OSError as error:
        log.warning(
            f"{path}: {error.strerror}; the folders of {root} are listed again at the next start "
            "(TMPDIR names another folder)"
        )
