"""Two ways of doing one thing, each in a process of its own, called in turns by a third.

    python bench/processes.py MODULE CLASS OPTIONS        # what the comparing process starts

So neither profits from the other's memory or compiled code, and each has its own environment: ours
that of the run scripts, the plain way the system's. A way is a class with methods that return a
dict of figures; the process answers each call with seconds, the memory that the call needed at its
peak beyond what was there before, and these figures.
"""

import ctypes
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# what launch/environment.sh sets for ours
ALLOCATOR = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


class Process:
    """``Process("bench.header", "Ours", {...})``; the options are the class's keyword arguments.

    Ends with its ``with`` block.
    """

    def __init__(self, module: str, name: str, options: dict):
        ours = name.startswith("Ours")
        environment = {
            key: value for key, value in os.environ.items() if ours or key not in ALLOCATOR
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, module, name, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.name = f"{module}.{name}"

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_error) -> None:
        self.process.stdin.close()
        self.process.wait()

    def call(self, method: str) -> dict:
        """{"seconds", "bytes", ...the method's figures}.

        Raises RuntimeError if the process has ended; it has said why.
        """
        self.process.stdin.write(method + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} ended in {method}()")
        return json.loads(answer)


def run_tool(script: str, *arguments) -> None:
    """Run one of the project's commands. Raises RuntimeError with its output if it fails."""
    done = subprocess.run(
        [sys.executable, ROOT / script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{script} failed:\n{done.stdout}")


def serve(module: str, name: str, options: dict) -> None:
    """Answer calls until the comparing process hangs up. Whatever the way prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    way = getattr(importlib.import_module(module), name)(**options)
    for line in sys.stdin:
        print(json.dumps(measured(getattr(way, line.strip()))), file=answers, flush=True)
    if hasattr(way, "close"):
        way.close()


def measured(method) -> dict:
    import torch

    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        start_peak()
        before = resident("VmRSS")
    start = time.perf_counter()
    figures = method()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    return dict(seconds=seconds, bytes=peak - before) | figures


def return_memory() -> None:
    """Give freed memory back to the system, so that the peak counts what a call needs also where
    freed memory lay.
    """
    ctypes.CDLL(None).malloc_trim(0)


def start_peak() -> None:
    """Have the process's peak of resident memory (VmHWM) begin anew; Linux only."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(which: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(which))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    serve(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
