"""tests/warm_python.py: what it starts is what a fresh Python starts, and ends as one does."""

import signal
import subprocess
import sys

import pytest

from tests.commands import LIMIT, environment
from tests.warm_python import python

pytestmark = pytest.mark.processes


@pytest.fixture(autouse=True)
def warm():
    if python() == sys.executable:
        pytest.skip("the tests start fresh interpreters")


def start(folder, text, *arguments, executable=None, **extra) -> subprocess.Popen:
    """Start ``text`` as script.py, with the words of a command line."""
    (folder / "script.py").write_text(text)
    return subprocess.Popen(
        [executable or python(), *(arguments or ["script.py"])],
        env=environment(**extra),
        cwd=folder,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


TELL = """
import os, sys
print("told", file=sys.stderr)
print(__name__, __file__, sys.argv, sys.path[0], os.getcwd(), os.environ["MINE"], sys.stdin.read())
sys.exit(3)
"""


@pytest.mark.parametrize("arguments", [["script.py"], ["-u", "script.py"], ["-m", "script"]])
def test_it_is_as_a_fresh_one(arguments, tmp_path):
    answers = []
    for executable in (python(), sys.executable):
        process = start(tmp_path, TELL, *arguments, "two words", executable=executable, MINE="mine")
        answers.append((process.communicate("typed", timeout=LIMIT), process.returncode))
    assert answers[0] == answers[1]
    assert answers[0][0][1] == "told\n" and answers[0][1] == 3


@pytest.mark.parametrize("settings, imported", [({}, True), (dict(OMP_NUM_THREADS="3"), False)])
def test_torch_is_there_unless_it_would_read_other_settings(settings, imported, tmp_path):
    process = start(tmp_path, "import sys\nprint('torch' in sys.modules)", **settings)
    assert process.communicate(timeout=LIMIT)[0] == f"{imported}\n"


@pytest.mark.parametrize(
    "text, status",
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("raise SystemExit('no')", 1),
        ("1 / 0", 1),
        ("", 0),
    ],
)
def test_it_ends_as_the_script_ends(text, status, tmp_path):
    process = start(tmp_path, text)
    said = process.communicate(timeout=LIMIT)[1]
    assert process.returncode == status and ("ZeroDivisionError" in said) == (text == "1 / 0")


WAIT = """
import signal
signal.signal(signal.SIGUSR1, lambda *_: exit(7))
print("ready", flush=True)
while True:
    signal.pause()
"""


def test_signals_reach_the_script(tmp_path):
    process = start(tmp_path, WAIT)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=LIMIT)
    assert process.returncode == 7


def test_who_kills_it_kills_all_below(tmp_path):
    """Both processes hold the pipe: it ends when they have ended."""
    text = "import os, time\nos.fork()\nos.write(1, b'ready\\n')\ntime.sleep(600)"
    process = start(tmp_path, text)
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.kill()
    assert process.communicate(timeout=LIMIT) == ("", "")
    assert process.returncode == -signal.SIGKILL
