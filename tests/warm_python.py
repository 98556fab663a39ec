"""A Python that has imported PyTorch already, for the processes that the tests start.

Importing PyTorch and what training needs of it takes more processor time (3 s) than most tests
train for (1 s). A server does it once for each process of pytest, and forks at every start: a real
process with the arguments, the environment, the folder and the open files of a fresh one, which has
imported nothing of the project yet. ``python()`` names what to start instead of ``sys.executable``
(and torchrun instead of that, by PYTHON_EXEC):

    python [-u] SCRIPT argument...
    python -m MODULE argument...

Started is a small client, which passes signals on and ends as the forked process ends. Whoever
kills it kills the forked process and all below that. What belongs to the client alone (limits,
network namespace) does not reach the forked process: start ``sys.executable`` there. With
FRESH_PYTHON=1 in the environment of the tests, and where there is no /proc, ``python()`` is
``sys.executable``.
"""

import contextlib
import functools
import json
import os
import signal
import socket
import sys

PRELOADED = [
    "torch",
    "torch._dynamo",
    "torch.distributed.run",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp.sharded_grad_scaler",
    "torch.utils.tensorboard",
    "torchvision.transforms.v2.functional",
    "cv2",
    "easydict",
    "safetensors.torch",
    "tqdm",
]
# read while libraries are loaded: with other values than the server's, a fresh Python is needed
READ_AT_START = (
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "PYTHONPATH",
    "PYTHONIOENCODING",
    "PYTHONUTF8",
    "LC_ALL",
    "LC_CTYPE",
    "LANG",
)
SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


# --- in the process of pytest


@functools.cache
def python() -> str:
    """The path of the executable. Starts the server, which ends with this process."""
    import shlex
    import subprocess
    import tempfile
    from pathlib import Path

    if os.environ.get("FRESH_PYTHON", "0") != "0" or not os.path.isdir("/proc/self/task"):
        return sys.executable
    folder = Path(tempfile.mkdtemp(prefix="warm_python-"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen(64)
        words = [sys.executable, __file__, "--serve", str(listener.fileno()), str(folder)]
        python.server = subprocess.Popen(
            words,
            env={"OMP_NUM_THREADS": "1"} | os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            # the server ends when this end of the pipe is closed
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
            cwd="/",
            start_new_session=True,
        )
    words = " ".join(map(shlex.quote, [sys.executable, "-IS", __file__, "--start", str(folder)]))
    (folder / "python").write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    (folder / "python").chmod(0o755)
    return str(folder / "python")


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all below it, as a machine does that goes away."""
    os.kill(pid, signal.SIGSTOP)
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/children") as children:
            for child in children.read().split():
                kill_tree(int(child))
    os.kill(pid, signal.SIGKILL)


# --- the client


def start(folder: str, arguments: list[str]) -> None:
    """Have the server start a process with these arguments, and end as it ends."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.path.join(folder, "socket"))
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: connection.sendall(bytes([number])))
    request = dict(arguments=arguments, environment=dict(os.environ), folder=os.getcwd())
    socket.send_fds(connection, [b"\n"], [0, 1, 2])
    connection.sendall(json.dumps(request).encode() + b"\n")
    answer = connection.recv(4)
    if len(answer) < 4:
        sys.exit("tests/warm_python.py: the server has ended")
    status = int.from_bytes(answer, "little")
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) in SIGNALS:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


# --- the server


def serve(listener: socket.socket, folder: str) -> dict:
    """Start a process for each connection, until stdin is closed.

    Returns in the forked processes alone: the client's request.
    """
    import gc
    import importlib
    import select
    import shutil
    import threading

    for name in PRELOADED:
        importlib.import_module(name)
    assert threading.active_count() == 1, "threads do not live on after a fork"
    # what is there is never garbage: the forked processes need not look at it
    gc.collect()
    gc.freeze()
    # nobody waits for the keepers
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return keep(connection)
        connection.close()


def keep(connection: socket.socket) -> dict:
    """Fork the process and stay beside it: pass signals on, kill it with the client, tell its end.

    Returns in the process itself.
    """
    import threading

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    client = connection.makefile("rb")
    request = json.loads(client.readline())
    child = os.fork()
    if child == 0:
        client.close()
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        return request

    def obey():
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            while signals := client.read(1):
                os.kill(child, signals[0])
            kill_tree(child)

    for file in [0, 1, *files]:
        os.close(file)
    threading.Thread(target=obey, daemon=True).start()
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(status.to_bytes(4, "little"))
    os._exit(0)


def become(arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """Run the script or module as a fresh Python does."""
    import io
    import runpy
    import types

    if any(environment.get(name) != os.environ.get(name) for name in READ_AT_START):
        os.chdir(folder)
        os.execve(sys.executable, [sys.executable, *arguments], environment)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    unbuffered = arguments[0] == "-u"
    if unbuffered:
        del arguments[0]
    # the server's streams know of the files that it had
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        mode = "rb" if number == 0 else "wb"
        binary = open(number, mode, 0 if unbuffered and number else -1, closefd=False)
        stream = io.TextIOWrapper(
            binary,
            before.encoding,
            before.errors,
            line_buffering=number == 2 or os.isatty(number),
            write_through=unbuffered and number > 0,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if arguments[0] == "-m":
        sys.path[0], sys.argv = folder, arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    path = os.path.abspath(arguments[0])
    sys.path[0], sys.argv = os.path.dirname(path), arguments
    main = types.ModuleType("__main__")
    # multiprocessing's name for the script of the parent, as it sets it when it is imported
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main
    main.__file__ = path
    with open(path, "rb") as script:
        code = compile(script.read(), path, "exec")
    exec(code, main.__dict__)


if __name__ == "__main__" and sys.argv[1] == "--start":
    start(sys.argv[2], sys.argv[3:])
elif __name__ == "__main__":
    become(**serve(socket.socket(fileno=int(sys.argv[2])), sys.argv[3]))
