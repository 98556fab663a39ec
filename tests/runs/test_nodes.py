"""Several machines: what the run scripts tell torchrun, two hosts as network namespaces, and a
SLURM job that is pre-empted.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import LIMIT, ROOT, environment, run
from tests.runs.outputs import draw_faces, everything, rows, same
from tests.warm_python import kill_tree

pytestmark = pytest.mark.processes

OPTIONS = [
    "dataset=synthetic",
    "embedding_size=32",
    "batch_size=2",
    "num_epoch=1",
    "val_targets=[]",
    "log_every=1",
    "num_workers=0",
    "loss=AdaFace",
    "device=cpu",
]


def with_python(**extra) -> dict:
    """The environment in which the run scripts find the Python of these tests; any rendezvous of an
    outer launch is no part of it.
    """
    clean = {
        key: value
        for key, value in environment(**extra).items()
        if not key.startswith(("SLURM_", "TORCHELASTIC_")) or key in extra
    }
    return dict(clean, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def start(command, folder="/", **extra):
    return subprocess.Popen(
        [str(word) for word in command],
        env=with_python(**{key: str(value) for key, value in extra.items()}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        start_new_session=True,
    )


def finish(*processes, timeout=LIMIT) -> list[str]:
    """Wait for all; each must end with 0. Whatever happens, none is left."""
    try:
        said = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                kill_tree(process.pid)
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, f"exit status {process.returncode}:\n{text[-4000:]}"
    return said


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """24 images of 3 people: 6 steps."""
    return draw_faces(tmp_path_factory.mktemp("faces"), 3)


@pytest.fixture(scope="module")
def one_host(faces, tmp_path_factory):
    """The run on two ranks of one machine."""
    output = tmp_path_factory.mktemp("one") / "run"
    run(
        ROOT / "train" / "train_standalone.py",
        *OPTIONS,
        f"rec={faces}",
        f"output={output}",
        ranks=2,
    )
    return output


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def figures(folder):
    """(step, loss, learning rate) of every step."""
    return [(row["step"], row["loss"], row["lr"]) for row in rows(folder) if "loss" in row]


@pytest.fixture
def two_hosts():
    """Two network namespaces with a cable between them, 10.213.7.1 and 10.213.7.2; nothing else is
    reachable from there, nor they from elsewhere.
    """
    names = [f"host{number}-{os.getpid()}" for number in (1, 2)]

    def ip(*arguments):
        return subprocess.run(["ip", *arguments], capture_output=True, text=True)

    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the command ip (Debian: apt install iproute2)")
    try:
        for name in names:
            if (made := ip("netns", "add", name)).returncode:
                pytest.skip(f"this machine forbids network namespaces: {made.stderr.strip()}")
        cable = [f"v{number}-{os.getpid()}" for number in (1, 2)]
        if (
            made := ip(
                "link",
                "add",
                cable[0],
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                "name",
                cable[1],
                "netns",
                names[1],
            )
        ).returncode:
            pytest.skip(f"this machine forbids virtual network cables: {made.stderr.strip()}")
        for number, (name, end) in enumerate(zip(names, cable, strict=True), start=1):
            for arguments in (
                ["addr", "add", f"10.213.7.{number}/24", "dev", end],
                ["link", "set", end, "up"],
                ["link", "set", "lo", "up"],
            ):
                assert ip("-n", name, *arguments).returncode == 0
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def test_two_hosts_give_the_losses_of_two_ranks_on_one(two_hosts, faces, one_host, tmp_path):
    hosts = [
        start(
            [
                "ip",
                "netns",
                "exec",
                name,
                ROOT / "run_standalone.sh",
                *OPTIONS,
                f"rec={faces}",
                f"output={tmp_path / 'run'}",
            ],
            NNODES=2,
            NODE_RANK=number,
            MASTER_ADDR="10.213.7.1",
            MASTER_PORT=29511,
            NPROC_PER_NODE=1,
            PYTHON_EXEC=sys.executable,
        )
        for number, name in enumerate(two_hosts)
    ]
    said = finish(*hosts)
    assert any("2 processes on cpu" in text for text in said)
    assert figures(tmp_path / "run") == figures(one_host)
    assert [step for step, *_ in figures(one_host)] == [1, 2, 3, 4, 5, 6]
    assert same(tmp_path / "run", one_host, 6)
    tensors = everything(one_host, 6)
    assert len(tensors) > 100 and "momentum/header" in tensors


# --- SLURM, played

SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
command = sys.argv[next(at for at, word in enumerate(sys.argv) if at and not word.startswith("-")):]
tasks = []
for node in range(int(os.environ["SLURM_JOB_NUM_NODES"])):
    variables = dict(os.environ, SLURM_NODEID=str(node))
    tasks.append(subprocess.Popen(command, env=variables, start_new_session=True))
def forward(number, frame):
    # as slurmstepd does: to every process of the step
    for task in tasks:
        os.killpg(task.pid, number)
signal.signal(signal.SIGUSR1, forward)
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$SCONTROL_LOG"
[ "$1" != show ] || printf '127.0.0.1\\nnode1\\n'
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A function that starts launch/slurm.sh as SLURM does: a copy of it, with its variables, and
    srun and scontrol on the path.
    """
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    shutil.copy(ROOT / "launch" / "slurm.sh", tmp_path / "slurm_script")

    def submit(*arguments, folder=ROOT, restarts=0):
        variables = dict(
            SLURM_JOB_ID="4711",
            SLURM_JOB_NUM_NODES="2",
            SLURM_JOB_NODELIST="node[0-1]",
            SLURM_SUBMIT_DIR=folder,
            NPROC_PER_NODE="1",
            SCONTROL_LOG=tmp_path / "scontrol.log",
        )
        if restarts:
            variables["SLURM_RESTART_COUNT"] = restarts
        return start(["bash", tmp_path / "slurm_script", *arguments], tmp_path, **variables)

    return submit


def wait_for(condition, process, what):
    deadline = time.monotonic() + LIMIT
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            if process.poll() is None:
                kill_tree(process.pid)
            raise AssertionError(f"{what} never came:\n{process.communicate()[0][-4000:]}")
        time.sleep(0.02)


def test_a_preempted_job_saves_and_goes_back_into_the_queue(slurm, faces, one_host, tmp_path):
    """Two machines' worth of real run scripts; USR1 to the batch script alone, as --signal=B:USR1
    sends it. (How it goes on by --resume: test_training.py.)
    """
    log = tmp_path / "run" / "training.log"
    job = slurm(
        "run_standalone.sh", *OPTIONS, "num_epoch=50", f"rec={faces}", f"output={tmp_path / 'run'}"
    )
    wait_for(lambda: log.exists() and "Global Step: 1 " in log.read_text(), job, "the first step")
    job.send_signal(signal.SIGUSR1)
    (text,) = finish(job)
    assert (
        "saved; job 4711 goes back into the queue" in text
        and "Stopped by a signal at step" in log.read_text()
    )
    assert (tmp_path / "scontrol.log").read_text().splitlines() == [
        "show hostnames node[0-1]",
        "requeue 4711",
    ]
    steps = len(figures(tmp_path / "run"))
    assert (tmp_path / "run" / f"{steps}state.pth").exists() and figures(tmp_path / "run")[
        :6
    ] == figures(one_host)[:steps]


PLAYED_RUN = """#!/usr/bin/env bash
trap 'exit ${STOP_STATUS:-0}' USR1
echo "$NNODES $NODE_RANK $MASTER_ADDR $MASTER_PORT $RDZV_ID $*" > said.$NODE_RANK
[ -z "${END_STATUS:-}" ] || exit "$END_STATUS"
for _ in {1..10000}; do sleep 0.05; done
"""


@pytest.fixture
def played(tmp_path):
    """A folder with a run script that only says what it was told, and waits."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "run_played.sh").write_text(PLAYED_RUN)
    (folder / "run_played.sh").chmod(0o755)
    return folder


def test_what_the_batch_script_tells_the_run_scripts(slurm, played, tmp_path, monkeypatch):
    monkeypatch.setenv("END_STATUS", "0")
    (tmp_path / "out").mkdir()
    for restarts, states, resumes in (
        (0, [], False),
        (1, [], False),
        (1, ["20state.pth"], True),
        (0, ["20state.pth"], False),
    ):
        for name in states:
            (tmp_path / "out" / name).write_text("")
        finish(
            slurm(
                "run_played.sh",
                "m=0.3 a",
                f"output={tmp_path / 'out'}",
                folder=played,
                restarts=restarts,
            )
        )
        resume = "--resume " if resumes else ""
        assert [(played / f"said.{rank}").read_text() for rank in (0, 1)] == [
            f"2 {rank} 127.0.0.1 24711 4711-{restarts} {resume}m=0.3 a output={tmp_path / 'out'}\n"
            for rank in (0, 1)
        ]


@pytest.mark.parametrize(
    "sent, stop_status, status, requeued",
    [
        (signal.SIGUSR1, 0, 0, True),
        (signal.SIGUSR1, 138, 0, True),
        (signal.SIGUSR1, 1, 1, False),
        (signal.SIGTERM, 0, 0, False),
    ],
)
def test_exit_status_and_queue(
    sent, stop_status, status, requeued, slurm, played, tmp_path, monkeypatch
):
    """Saved: 0, and again into the queue; not saved: the run script's status; cancelled: not into
    the queue.
    """
    monkeypatch.setenv("STOP_STATUS", str(stop_status))
    job = slurm("run_played.sh", "output=out", folder=played)
    wait_for(lambda: all((played / f"said.{rank}").exists() for rank in (0, 1)), job, "the start")
    job.send_signal(sent)
    text = job.communicate(timeout=LIMIT)[0]
    assert job.returncode == status, text
    assert ("requeue 4711" in (tmp_path / "scontrol.log").read_text()) == requeued


def test_a_failed_run_is_not_queued_again(slurm, played, tmp_path, monkeypatch):
    monkeypatch.setenv("END_STATUS", "3")
    job = slurm("run_played.sh", "output=out", folder=played)
    job.communicate(timeout=LIMIT)
    assert job.returncode == 3 and "requeue" not in (tmp_path / "scontrol.log").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no run script ''"),
        (["train.py", "output=x"], "no run script 'train.py'"),
        (["run_gone.sh", "output=x"], "no run script 'run_gone.sh'"),
        (["run_played.sh", "m=0.3"], "name the run's folder, output="),
    ],
)
def test_what_the_batch_script_refuses(arguments, message, slurm, played):
    job = slurm(*arguments, folder=played)
    assert message in job.communicate(timeout=LIMIT)[0] and job.returncode == 1


def test_the_test_script_keeps_a_set_number_of_threads(tmp_path):
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copy(ROOT / "run_tests.sh", tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || echo "$OMP_NUM_THREADS threads: $*"\n')
    python.chmod(0o755)
    clean = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    for variables, threads in ((dict(), 1), (dict(OMP_NUM_THREADS="8"), 8)):
        said = subprocess.run(
            [tmp_path / "run_tests.sh", "-k", "x"],
            env=clean | variables,
            capture_output=True,
            text=True,
        ).stdout
        assert said.startswith(f"{threads} threads: -m pytest ") and said.endswith(" -k x\n")


# --- what torchrun is told, and tells


def test_machines_that_do_not_meet_are_told_in_one_line():
    rendezvous = [
        "--nnodes",
        "2",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        f"127.0.0.1:{free_port()}",
        "--rdzv_id",
        "alone",
        "--rdzv_conf",
        "is_host=1,join_timeout=1",
    ]
    done = start(
        [
            sys.executable,
            ROOT / "launch" / "torchrun.py",
            *rendezvous,
            "--nproc_per_node",
            "1",
            "train.py",
        ]
    )
    said = done.communicate(timeout=LIMIT)[0]
    assert (
        done.returncode == 1
        and "Traceback" not in said
        and said.splitlines()[-1].startswith(
            "error: the machines did not meet (RendezvousTimeoutError); start the run"
        )
    )


STUB = f"""#!/usr/bin/env bash
case "$1" in
    -c) echo 1 ;;
    */node_address.py) exec {sys.executable} "$@" ;;
    *) shift; printf '%s\\n' "$@" "gloo ${{GLOO_SOCKET_IFNAME:-}}" ;;
esac
"""


def messages(tmp_path, **variables) -> subprocess.CompletedProcess:
    """Run run_standalone.sh of a copy of the repository whose Python only prints what torchrun
    would get.
    """
    root = tmp_path / "copy"
    if not root.exists():
        shutil.copytree(ROOT / "launch", root / "launch")
        shutil.copy(ROOT / "run_standalone.sh", root)
        (root / ".venv" / "bin").mkdir(parents=True)
        (root / ".venv" / "bin" / "python").write_text(STUB)
        (root / ".venv" / "bin" / "python").chmod(0o755)
    names = (
        "NNODES",
        "NODE_RANK",
        "NODE_ADDR",
        "MASTER_ADDR",
        "MASTER_PORT",
        "NPROC_PER_NODE",
        "MAX_RESTARTS",
        "RDZV_ID",
        "GLOO_SOCKET_IFNAME",
    )
    clean = {key: value for key, value in os.environ.items() if key not in names}
    return subprocess.run(
        [root / "run_standalone.sh", "m=0.3"],
        env=dict(clean, **variables),
        capture_output=True,
        text=True,
    )


def test_a_python_without_the_packages_is_passed_over(tmp_path):
    """One in .venv that does not start, and one that lacks a package."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "environment.sh", tmp_path / "launch")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    broken = tmp_path / ".venv" / "bin" / "python"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    find = (
        'source "$0"; find_python "$1" || { echo none; exit; }; can_import "$1" || exit; echo '
        '"$PYTHON"'
    )

    def actual(modules=""):
        return subprocess.run(
            ["bash", "-euc", find, tmp_path / "launch" / "environment.sh", modules],
            env=with_python(),
            capture_output=True,
            text=True,
        ).stdout

    assert Path(actual("pytest").strip()).parent == Path(sys.executable).parent
    assert actual("pytest, no_such_module") == "none\n"


def test_arguments_of_torchrun(tmp_path):
    said = messages(
        tmp_path,
        NNODES="2",
        NODE_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29512",
        NPROC_PER_NODE="3",
        MAX_RESTARTS="2",
        RDZV_ID="run7",
    ).stdout
    assert (
        " ".join(said.split("\n")).split(" --nnodes ")[-1].split()[:-2]
        == (
            "2 --node_rank 0 --rdzv_backend c10d --rdzv_endpoint 127.0.0.1:29512 --rdzv_id run7 "
            "--rdzv_conf is_host=1,read_timeout=600 --local_addr 127.0.0.1 "
            f"--nproc_per_node 3 --max_restarts 2 {tmp_path / 'copy'}/train/train_standalone.py "
            "m=0.3"
        ).split()
    )
    assert said.endswith("gloo lo\n")
    said = messages(
        tmp_path,
        NNODES="2",
        NODE_RANK="1",
        MASTER_ADDR="127.0.0.1",
        GLOO_SOCKET_IFNAME="mine",
        NODE_ADDR="192.0.2.77",
    ).stdout
    assert (
        "is_host=0,read_timeout=600\n--local_addr\n192.0.2.77\n" in said
        and "--rdzv_id\n127.0.0.1:29500\n" in said
        and said.endswith("gloo mine\n")
    )
    said = messages(tmp_path, MAX_RESTARTS="3").stdout
    assert "--standalone\n--nproc_per_node\n1\n--max_restarts\n3\n" in said and "rdzv" not in said


@pytest.mark.parametrize(
    "variables, message",
    [
        (dict(), "set NODE_RANK: 0 on the first machine"),
        (dict(NODE_RANK="1"), "set MASTER_ADDR: the name or address"),
        (
            dict(NODE_RANK="0", MASTER_ADDR="127.0.0.1", MAX_RESTARTS="2"),
            "needs RDZV_ID, a name for this launch",
        ),
        (
            dict(NODE_RANK="0", MASTER_ADDR="no.such.host.invalid"),
            "MASTER_ADDR=no.such.host.invalid MASTER_PORT=29500 cannot be reached",
        ),
        (dict(NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="x"), "MASTER_PORT=x"),
    ],
)
def test_what_is_missing_is_told(variables, message, tmp_path):
    done = messages(tmp_path, NNODES="2", **variables)
    assert message in done.stderr and done.returncode != 0 and "--nnodes" not in done.stdout


def test_a_host_that_is_lost_and_comes_back(faces, one_host, tmp_path):
    """The second of two machines is killed, torchrun and all, and started again: the first has
    waited for it, and the run goes on from its newest state.
    """
    output, launch = (
        tmp_path / "run",
        dict(
            NNODES=2,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=free_port(),
            NPROC_PER_NODE=1,
            MAX_RESTARTS=3,
            RDZV_ID=f"lost-{os.getpid()}",
        ),
    )
    command = [
        ROOT / "run_standalone.sh",
        *OPTIONS,
        f"rec={faces}",
        f"output={output}",
        "state_every=2",
        "timeout=2",
    ]
    first = start(command, NODE_RANK=0, **launch)
    second = start(command, NODE_RANK=1, **launch)
    try:
        deadline = time.monotonic() + LIMIT
        while not (output / "2state.pth").exists():
            assert time.monotonic() < deadline and first.poll() is None and second.poll() is None, (
                "the two machines never trained together"
            )
            time.sleep(0.01)
        kill_tree(second.pid)
        second.communicate()
        said = finish(first, start(command, NODE_RANK=1, **launch))
    finally:
        for process in (first, second):
            if process.poll() is None:
                kill_tree(process.pid)
    assert any("Resumed at step" in text for text in said)
    assert figures(output) == figures(one_host) and same(output, one_host, 6)
