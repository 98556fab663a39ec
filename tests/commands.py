"""Start the project's commands as users do, for the tests: real processes, real torchrun, real
signals.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.warm_python import kill_tree, python

ROOT = Path(__file__).resolve().parents[1]
# seconds that a process may take: below pytest's own limit, so that what it printed is seen, and
# far above what any takes, for the machine may be busy
LIMIT = 500


def command(script, *arguments, ranks=1, torchrun=None, restarts=0, fresh=False) -> list[str]:
    """The command line of a training script: plain Python for one rank, torchrun for more.

    ``fresh``: in a Python of its own (see tests/warm_python.py), which limits and namespaces of the
    caller reach.
    """
    executable = sys.executable if fresh else python()
    if ranks > 1 or torchrun:
        return [
            executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--max-restarts",
            str(restarts),
            "--nproc_per_node",
            str(ranks),
            str(script),
            *map(str, arguments),
        ]
    return [executable, str(script), *map(str, arguments)]


def environment(ranks=1, **extra) -> dict:
    """One thread per rank, so that ranks do not compete for the cores, unless OMP_NUM_THREADS says
    otherwise.
    """
    return (
        {"OMP_NUM_THREADS": "1"}
        | os.environ
        | {"CUDA_VISIBLE_DEVICES": "", "PYTHON_EXEC": python()}
        | extra
    )


def run(script, *arguments, ranks=1, expect=0, timeout=LIMIT, restarts=0, **extra) -> str:
    """Run to the end and return stdout and stderr together.

    The exit status must be ``expect`` (or, for "error", not 0).
    """
    done = subprocess.run(
        command(script, *arguments, ranks=ranks, restarts=restarts),
        env=environment(ranks, **extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        cwd="/",
    )
    assert done.returncode == expect if expect != "error" else done.returncode != 0, (
        f"exit status {done.returncode}:\n{done.stdout[-6000:]}"
    )
    return done.stdout


def run_until(
    script, *arguments, ranks=1, log: Path, text: str, send=signal.SIGKILL, timeout=LIMIT
) -> int:
    """Run until ``text`` appears in ``log``, send the signal (SIGKILL to every process of it) and
    return the exit status.
    """
    offset = log.stat().st_size if log.exists() else 0
    process = subprocess.Popen(
        command(script, *arguments, ranks=ranks),
        env=environment(ranks),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
        start_new_session=True,
    )
    deadline = time.monotonic() + timeout
    while not (log.exists() and text in log.read_text()[offset:]):
        assert process.poll() is None and time.monotonic() < deadline, (
            f"{text!r} never came:\n{process.communicate()[0][-6000:]}"
        )
        time.sleep(0.02)
    if send == signal.SIGKILL:
        kill_tree(process.pid)
    else:
        process.send_signal(send)
    process.communicate(timeout=timeout)
    return process.returncode
