"""The one kind of error that users are meant to read, and the way entry scripts show it."""

import os
import sys
import time


class InputError(ValueError):
    """Wrong or missing input. The message is one line: what, where it was looked for, how to mend it."""


def run(main) -> None:
    """Call ``main()``; an InputError becomes one line on stderr and exit status 1, everything else is a bug and keeps its traceback."""
    try:
        main()
    except InputError as error:
        if int(os.environ.get("RANK", 0)):
            time.sleep(2)       # rank 0 speaks first; where all ranks fail alike, torchrun then ends this one and the line stands once
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
