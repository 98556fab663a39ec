"""Names of files and folders that are not UTF-8, as old archives unpack them: printed, logged,
written, found again, and handed to libraries that take UTF-8 alone."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter

from eval.report import figure_keys, files
from eval.report.html_report import write_page
from tests.commands import ROOT, environment, run
from tests.dataset.test_dataset import jpeg
from utils.files import printable, read_json, utf8_path, write_json
from utils.run.log import RunLog
from utils.weights.read import read_tensors

NAME = os.fsdecode(b"Ren\xe9")
SHOWN = r"Ren\udce9"
TINY = (
    "dataset=synthetic network=mobilefacenet embedding_size=16 batch_size=9 num_epoch=1"
    " num_workers=0 device=cpu val_targets=[] log_every=1 lr=0.01 db_file_format=folder"
).split()


@pytest.fixture
def folder(tmp_path):
    """A folder of that name, where the file system allows it."""
    try:
        (tmp_path / NAME).mkdir()
    except OSError:
        pytest.skip("this file system's names are UTF-8")
    return tmp_path / NAME


@pytest.fixture
def people(folder):
    """Photographs of two people, of whom one has such a name."""
    for person in ("Anna", NAME):
        (folder / "people" / person).mkdir(parents=True)
        for number in range(4):
            path = folder / "people" / person / f"{NAME}{number}.jpg"
            path.write_bytes(jpeg(number + 10 * len(person)))
    return folder / "people"


@pytest.mark.processes
@pytest.mark.parametrize(
    "settings",
    [
        {"PYTHONIOENCODING": "utf-8:strict"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"LC_ALL": "C"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_an_entry_script_prints_any_name(settings):
    """As every command ends in ``utils.errors.run``."""
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from utils.errors import InputError, "
        "run\n"
        "def main():\n"
        "    name = os.fsdecode(b'Ren\\xe9')\n"
        "    print('here is', name, '\\u00b1')\n"
        "    raise InputError(f'no {name}')\n"
        "run(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], env=environment(**settings), capture_output=True
    )
    assert done.returncode == 1
    assert done.stdout.startswith(b"here is Ren\\udce9 ")
    assert done.stderr == b"error: no Ren\\udce9\n"


@pytest.mark.processes
@pytest.mark.parametrize(
    "settings",
    [
        {"PYTHONIOENCODING": "utf-8:strict"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_packing_and_checking(folder, people, settings):
    """train.lst holds the names as they are, a JSON report as Python reads them again."""
    (people / "Åsa").mkdir()
    (people / "Åsa" / "ä.jpg").write_bytes(jpeg(77))
    output = folder / "records"
    printed = run(ROOT / "data" / "make_rec.py", "--images", people, "--output", output, **settings)
    assert printed == f"{printable(str(output))}: 9 images of 3 identities, read back and equal\n"
    lines = (output / "train.lst").read_bytes().splitlines()
    listed = {os.fsdecode(line.split(b"\t")[2]) for line in lines}
    there = {str(path.relative_to(people)) for path in people.glob("*/*")}
    assert listed == there and len(there) == 9
    bad = people / NAME / f"{NAME}bad.jpg"
    bad.write_bytes(b"no image")
    written = folder / "check.json", folder / "sheet.png"
    printed = run(
        ROOT / "data" / "check_rec.py",
        people,
        "--json",
        written[0],
        "--sheet",
        written[1],
        expect=1,
        **settings,
    )
    assert f"record {SHOWN}/{SHOWN}bad.jpg" in printed and written[1].is_file()
    record = json.loads(written[0].read_text())["unreadable"]["listed"][0]["record"]
    if settings.get("PYTHONUTF8") != "0":
        assert people / record == bad


@pytest.mark.processes
def test_training_logs(folder, people):
    """Into such a folder, with a warning that names such a file."""
    (people / NAME / f"{NAME}9.jpg").write_bytes(b"no image")
    arguments = [*TINY, f"data_path={people}", f"output={folder / 'run'}"]
    script = ROOT / "train" / "train_standalone.py"
    printed = run(script, *arguments, PYTHONIOENCODING="utf-8:strict")
    assert "Traceback" not in printed and "Logging error" not in printed
    log = (folder / "run" / "training.log").read_text("utf-8")
    assert f"{SHOWN}/{SHOWN}9.jpg" in log and "Finished at step" in log
    assert list((folder / "run" / "tb").glob("events.*"))
    config = json.loads((folder / "run" / "config.json").read_text())
    assert config["data_path"] == str(people)


def test_figures_of_a_set_of_such_a_name(folder):
    """Tables, plots, the page and TensorBoard."""
    figures = {"Accuracy-Flip": 0.75, "Accuracy-Std": 0.1, "XNorm": 3.0}
    results = {"verification": {NAME: figures}, "ijb": {}, "tinyface": {}}
    flat = figure_keys.flatten(results)
    assert flat[f"verification.{SHOWN}.Accuracy-Flip"] == 0.75
    files.write_metrics(folder / "metrics.csv", flat)
    assert files.read_metrics(folder / "metrics.csv") == flat
    write_json(folder / "results.json", results)
    assert read_json(folder / "results.json") == results
    files.write_summary(folder, [figure_keys.Row(printable(NAME), printable(NAME), 1, flat)])
    assert SHOWN in (folder / "summary.csv").read_text("utf-8")
    assert SHOWN in (folder / "summary.md").read_text("utf-8")
    write_page(folder / "page.html", NAME, results, [], {"val_rec": NAME}, [NAME])
    assert SHOWN in (folder / "page.html").read_text("utf-8")
    log = RunLog(folder, 10, 0)
    log.validation(1, 0, {NAME: figures}, {NAME: 0.75})
    log.close()
    row = json.loads((folder / "metrics.jsonl").read_text())
    assert list(row["validation"]) == [NAME]


@pytest.mark.parametrize("name", ["model", NAME])
def test_onnx_models_and_detectors(folder, name):
    """OpenCV crashes on such a path."""
    pytest.importorskip("onnx", reason="onnx is not installed (requirements/onnx.txt)")
    pytest.importorskip("onnxruntime")
    from tests.teacher.test_onnx import onnx_model, reference
    from tests.yunet import photograph, write_detector
    from utils.detect import Detector
    from utils.teacher.onnx import OnnxNetwork

    path = onnx_model(folder / f"{name}.onnx")
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 3, 112, 112)).astype(np.float32)
    features = OnnxNetwork(path, "model")(torch.from_numpy(pixels)).numpy()
    # float32 products and sums of 768 numbers of size 1, against float64
    np.testing.assert_allclose(features, reference(pixels), atol=1e-3)
    detector = Detector(write_detector(folder / f"{name}.onnx"))
    crop = np.full((112, 112, 3), 90, np.uint8)
    assert len(detector(photograph([crop], [(160, 160)]))) == 1


def test_onnx_models_with_weights_in_a_second_file(folder):
    pytest.importorskip("onnx", reason="onnx is not installed (requirements/onnx.txt)")
    pytest.importorskip("onnxruntime")
    from tests.teacher.test_onnx import onnx_model, reference
    from utils.teacher.onnx import OnnxNetwork

    onnx_model(folder.parent / "model.onnx", external=True)
    for file in ("model.onnx", "model.onnx.data"):
        (folder.parent / file).rename(folder / file)
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 3, 112, 112)).astype(np.float32)
    features = OnnxNetwork(folder / "model.onnx", "model")(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(features, reference(pixels), atol=1e-3)


def test_a_path_for_libraries_that_take_utf8_alone(folder):
    (folder / "plain.txt").write_text("plain")
    (folder / f"{NAME}.txt").write_text("odd")
    assert utf8_path(folder.parent) == str(folder.parent)
    for path in (folder, folder / "plain.txt", folder / f"{NAME}.txt"):
        path_for_library = utf8_path(path)
        path_for_library.encode("utf-8")
        assert os.path.samefile(path_for_library, path)
    board = SummaryWriter(utf8_path(folder))
    board.close()
    assert list(folder.glob("events.*"))
    save_file({"kernel": torch.arange(6.0).reshape(2, 3)}, folder.parent / "x.safetensors")
    (folder.parent / "x.safetensors").rename(folder / f"{NAME}.safetensors")
    weights = read_tensors(folder / f"{NAME}.safetensors", "header")
    np.testing.assert_array_equal(weights["kernel"], np.arange(6.0).reshape(2, 3))
