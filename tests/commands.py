"""Start the project's commands as users do, for the tests: real processes, real torchrun, real signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def command(script, *arguments, ranks=1, torchrun=None, restarts=0) -> list[str]:
    """The command line of a training script: plain Python for one rank, torchrun for more."""
    if ranks > 1 or torchrun:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", str(restarts), "--nproc_per_node", str(ranks), str(script),
                *map(str, arguments)]
    return [sys.executable, str(script), *map(str, arguments)]


def environment(ranks=1, **extra) -> dict:
    """One thread per rank, so that ranks do not compete for the cores, unless OMP_NUM_THREADS says otherwise."""
    return dict({"OMP_NUM_THREADS": "1"} | os.environ, CUDA_VISIBLE_DEVICES="", **extra)


def run(script, *arguments, ranks=1, expect=0, timeout=240, restarts=0, **extra) -> str:
    """Run to the end and return stdout and stderr together; the exit status must be ``expect`` (or, for "error", not 0)."""
    done = subprocess.run(command(script, *arguments, ranks=ranks, restarts=restarts), env=environment(ranks, **extra), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, timeout=timeout, cwd="/")
    assert done.returncode == expect if expect != "error" else done.returncode != 0, f"exit status {done.returncode}:\n{done.stdout[-6000:]}"
    return done.stdout


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all below it: a machine that goes away takes torchrun and its workers at once."""
    os.kill(pid, signal.SIGSTOP)
    for child in Path(f"/proc/{pid}/task").glob("*/children"):
        for number in child.read_text().split():
            kill_tree(int(number))
    os.kill(pid, signal.SIGKILL)


def run_until(script, *arguments, ranks=1, log: Path, text: str, send=signal.SIGKILL, timeout=240) -> int:
    """Run until ``text`` appears in ``log``, send the signal (SIGKILL to every process of it) and return the exit status."""
    offset = log.stat().st_size if log.exists() else 0
    process = subprocess.Popen(command(script, *arguments, ranks=ranks), env=environment(ranks), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, cwd="/", start_new_session=True)
    deadline = time.monotonic() + timeout
    while not (log.exists() and text in log.read_text()[offset:]):
        assert process.poll() is None and time.monotonic() < deadline, f"{text!r} never came:\n{process.communicate()[0][-6000:]}"
        time.sleep(0.02)
    if send == signal.SIGKILL:
        kill_tree(process.pid)
    else:
        process.send_signal(send)
    process.communicate(timeout=timeout)
    return process.returncode
