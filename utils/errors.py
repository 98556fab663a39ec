"""The one kind of error that users are meant to read, and the way entry scripts show it."""

import errno
import io
import os
import signal
import sys
import time
from difflib import get_close_matches

# an OSError of these kinds tells of the user's disk or folders, not of a bug
DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.ENOTDIR,
    errno.ENOENT,
    errno.EEXIST,
}


class InputError(ValueError):
    """Wrong or missing input.

    The message is one line: what, where it was looked for, how to mend it.
    """


class RecordError(InputError):
    """A record or image that is truncated or damaged.

    The message of a record names the file, the key and the byte offset.
    """


def nearest(word, known) -> str:
    """ ", did you mean 'x'?" for the known name most like ``word``, "" if none is."""
    near = get_close_matches(str(word), known, 1, 0.5)
    return f", did you mean {near[0]!r}?" if near else ""


def first_line(error: BaseException, most: int = 160) -> str:
    """What another library's error says, short enough for a line of ours; its type where it says
    nothing.
    """
    return (str(error) or type(error).__name__).splitlines()[0][:most]


def run(main) -> None:
    """Call ``main()``; an InputError or a full or forbidden disk becomes one line on stderr and
    exit status 1, all else is a bug and keeps its traceback.
    """
    print_any_name()
    try:
        main()
    except InputError as error:
        fail(str(error))
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        fail(f"{error.filename or 'a file'}: {error.strerror}")


def print_any_name() -> None:
    """Let stdout show what its encoding lacks as ``\\udce9`` or ``\\xe9``, as stderr does by
    itself.

    The name of a file may be any bytes.
    """
    # a test or a notebook may have put something else in its place
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def fail(message: str) -> None:
    """Print the line and end this process; the ranks that wait for it in a collective are ended by
    torchrun.
    """
    if int(os.environ.get("RANK", 0)):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # rank 0 speaks first; where all ranks fail alike, torchrun ends this one meanwhile and the
        # line stands once
        time.sleep(2)
    print(f"error: {message}", file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        # leaving the other ranks in an orderly way would wait for them
        os._exit(1)
    sys.exit(1)
