"""What a run says of itself: training.log and the console."""

import logging

import pytest

from tests.local_hub import child, hub_options, serve
from tests.teachers import network, repository
from utils.run.log import start_log


@pytest.fixture
def root_logger():
    """The root logger, which is afterwards what it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    yield root
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_others_have_their_warnings_in_the_log_only(tmp_path, capsys, root_logger):
    start_log(tmp_path, append=False)
    root_logger.info("Student mbf")
    for name in ("train.teacher_pass", "utils.teacher.load", "eval.sets.folder", "data.make_rec"):
        logging.getLogger(name).info("of %s", name)
    for name in ("httpx", "httpx2", "utils_of_another", "dataset"):
        logging.getLogger(name).info("a request of %s", name)
        logging.getLogger(name).warning("a warning of %s", name)
    logged = (tmp_path / "training.log").read_text()
    messages = [line.split("-", 3)[-1] for line in logged.splitlines()]
    assert messages == [
        "Student mbf",
        "of train.teacher_pass",
        "of utils.teacher.load",
        "of eval.sets.folder",
        "of data.make_rec",
        "a warning of httpx",
        "a warning of httpx2",
        "a warning of utils_of_another",
        "a warning of dataset",
    ]
    assert capsys.readouterr().out == logged


@pytest.mark.processes
def test_fetching_a_teacher_logs_no_requests(tmp_path):
    """Whichever HTTP library huggingface_hub has."""
    repository(tmp_path / "served" / "someone" / "faces_ir18", network().state_dict())
    code = """
import json, logging, sys
from utils.run.log import start_log
from utils.teacher.hub import fetch
start_log(sys.argv[1], append=False)
folder = fetch("someone/faces_ir18", sys.argv[1] + "/cache")
logging.info("fetched")
print(json.dumps(folder.is_dir()))
"""
    with serve(tmp_path / "served") as (address, requests):
        assert child(code, tmp_path, **hub_options(address))
    assert requests
    (line,) = (tmp_path / "training.log").read_text().splitlines()
    assert line.endswith("-fetched")
