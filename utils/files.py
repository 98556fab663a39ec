"""Files that appear whole or not at all, and locks between the processes of a machine."""

import fcntl
import os
import signal
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str, mode: str = "wb"):
    """Open a temporary neighbour of ``path`` to write; it takes the name ``path`` when the block ends well, else it is removed."""
    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


@contextmanager
def scratch(prefix: str, folder: Path):
    """A temporary folder inside ``folder``, whose files can be renamed to where they belong; it goes when the block ends, also by SIGTERM. For the main thread."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with tempfile.TemporaryDirectory(prefix=prefix, dir=folder) as path:
            yield Path(path)
    finally:
        signal.signal(signal.SIGTERM, before)


def take_lock(path: str, shared: bool = False, wait: bool = True):
    """Lock the file ``path``, made if it is missing, until the returned file is closed or this process and its forks have ended.

    None if another process has it and ``wait`` is False. Whoever removes ``path`` holds its lock: one that was waiting meanwhile starts again on the new file.
    """
    while True:
        file = open(path, "ab")
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
            if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
            file.close()
        except BlockingIOError:
            file.close()
            return None
