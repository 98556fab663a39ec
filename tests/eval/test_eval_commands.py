"""The evaluation commands as users start them: figures, reports, what is skipped and what is
refused.
"""

import csv
import json
import os
from pathlib import Path

import pytest
import torch

from backbones import build_backbone
from data import make_synthetic
from eval import evaluate, run_batch_eval, verification
from eval.report import files
from eval.run_batch_eval import find_checkpoints, name_of
from tests.commands import ROOT, run
from utils.errors import InputError
from utils.weights.load import load_backbone

FULL, BATCH = ROOT / "eval" / "run_full_eval.py", ROOT / "eval" / "run_batch_eval.py"
NETWORK = dict(network="mobilefacenet", embedding_size=32)
SUMMARIES = {"summary.csv", "summary.md", "summary.png", "metrics.pdf", "settings"}
NOT_THERE = {
    ROOT / "data" / "ijb" / "IJBB": "IJBB",
    ROOT / "data" / "ijb" / "IJBC": "IJBC",
    ROOT / "data" / "tinyface": "tinyface",
}
HOW = ("--device", "cpu", "--precision", "fp32", "--val-batch-size", "7")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder with frontal.bin and lowres.bin, 20 pairs each; pose.bin, which the synthetic preset
    names too, is not there.
    """
    folder = tmp_path_factory.mktemp("sets")
    with make_synthetic.open_studio(1, seed=0, nuisance=1.0) as studio:
        for name in ("frontal", "lowres"):
            make_synthetic.write_pair_set(folder, studio, name, 20)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, sets):
    """Two runs as training leaves them: student (steps 2 and 10, and the best) and teacher (step
    5).
    """
    folder = tmp_path_factory.mktemp("runs")
    for seed, (name, stems) in enumerate(
        {"student": ("10", "2", "best_"), "teacher": ("5",)}.items()
    ):
        (folder / name).mkdir()
        for number, stem in enumerate(stems):
            save_network(folder / name / f"{stem}backbone.pth", seed=10 * seed + number)
        write_run_config(
            folder / name, val_rec=str(sets), val_targets=["frontal", "pose", "lowres"]
        )
    return folder


def save_network(path: Path, seed: int = 0, **network) -> Path:
    torch.manual_seed(seed)
    network = NETWORK | network
    torch.save(build_backbone(network["network"], network["embedding_size"]).state_dict(), path)
    return path


def write_run_config(folder: Path, **values) -> None:
    (folder / "config.json").write_text(json.dumps(NETWORK | values))


def expected(checkpoint: Path, sets: Path, names) -> dict:
    network = build_backbone("mobilefacenet", 32)
    load_backbone(network, checkpoint, "test")
    return {
        name: verification.test(pairs, network, 7)
        for name, pairs in verification.load_targets(sets, names).items()
    }


def assert_close(actual: dict, reference: dict) -> None:
    """Accuracies are shares of pairs; XNorm is a length of features of 50 layers, off by 1e-5 of it
    where other images are computed together.
    """
    assert actual.keys() == reference.keys()
    for name, figures in reference.items():
        of_set = {key: actual[name][key] for key in figures}
        assert of_set == pytest.approx(figures, rel=1e-4, abs=1e-9), name


class HostilePayload:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


# --- run_full_eval


@pytest.mark.processes
def test_full_eval_figures_skipped_sets_and_json(runs, sets, tmp_path):
    checkpoint, results = runs / "student" / "2backbone.pth", tmp_path / "new" / "results.json"
    output = run(
        FULL, "--checkpoint", checkpoint, *HOW, "channels_last=False", "--results-json", results
    )
    actual = json.loads(results.read_text())
    assert (
        actual.keys() == {"verification", "ijb", "tinyface"}
        and actual["ijb"] == actual["tinyface"] == {}
    )
    assert_close(actual["verification"], expected(checkpoint, sets, ["frontal", "lowres"]))
    assert f"skipped pose: no {sets / 'pose.bin'}" in output
    assert f"{100 * actual['verification']['frontal']['Accuracy-Flip']:.2f} ±" in output
    assert [path.name for path in results.parent.iterdir()] == ["results.json"]


@pytest.mark.processes
def test_full_eval_on_two_ranks_gives_the_same_and_prints_once(runs, sets, tmp_path):
    checkpoint, results = runs / "student" / "10backbone.pth", tmp_path / "results.json"
    output = run(FULL, "--checkpoint", checkpoint, *HOW, "--results-json", results, ranks=2)
    assert_close(
        json.loads(results.read_text())["verification"],
        expected(checkpoint, sets, ["frontal", "lowres"]),
    )
    assert output.count("Accuracy-Flip") == 1 and "on 2 x cpu" in output


@pytest.mark.processes
@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--val-targets", "frontal,pose"],
            "pose.bin not found; .bin files there: frontal.bin, lowres.bin",
        ),
        (["--ijb-root", "/ijb"], "--ijb-root: no folder /ijb"),
    ],
)
def test_what_the_command_line_names_must_be_there(runs, arguments, message):
    output = run(
        FULL, "--checkpoint", runs / "student" / "2backbone.pth", *arguments, expect="error"
    )
    assert message in output and "Traceback" not in output


@pytest.mark.processes
def test_hostile_checkpoint_is_refused_and_does_not_run(runs, sets, tmp_path):
    target, hostile = tmp_path / "executed", tmp_path / "1backbone.pth"
    torch.save({"weight": HostilePayload(target)}, hostile)
    output = run(
        FULL,
        "--checkpoint",
        hostile,
        *HOW,
        "--val-data",
        sets,
        "--val-targets",
        "frontal",
        expect=1,
    )
    assert "error: checkpoint:" in output and "posix.system" in output and "Traceback" not in output
    assert not target.exists()


# --- the same path, without a process


def evaluator(*arguments) -> evaluate.Evaluator:
    parser = evaluate.argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    return evaluate.Evaluator(parser.parse_intermixed_args([*HOW, *map(str, arguments)]))


def names_of(job) -> list[str]:
    return [test_set.name for test_set in job.test_sets]


def test_named_folder_or_name_must_exist(runs, sets, tmp_path):
    checkpoint = runs / "student" / "2backbone.pth"
    for arguments, message in (
        (["--val-data", tmp_path / "none"], "no folder"),
        (["--val-targets", "frontal", "nosuch"], "nosuch.bin not found"),
        (["--val-data", tmp_path], "nothing to evaluate on"),
        ([f"val_rec={tmp_path}"], "nothing to evaluate on"),
    ):
        with pytest.raises(InputError, match=message):
            evaluator(*arguments).plan(checkpoint)


def test_sets_of_the_configuration_that_a_named_folder_lacks_are_skipped(runs, sets, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "from easydict import EasyDict\nconfig = EasyDict(val_targets=['lowres', 'lfw'])\n"
    )
    tool = evaluator("--config", config, "--val-data", sets)
    assert names_of(tool.plan(runs / "student" / "2backbone.pth")) == ["lowres"]
    assert tool.skipped == {sets / "lfw.bin": "lfw", **NOT_THERE}


def test_nothing_found_is_an_error_that_lists_the_paths(tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "from easydict import EasyDict\nconfig = "
        f"EasyDict(val_rec={str(tmp_path)!r}, val_targets=['lfw', 'cfp_fp'])\n"
    )
    with pytest.raises(
        InputError,
        match=r"nothing to evaluate "
        r"on.*lfw\.bin.*cfp_fp\.bin.*--val-data",
    ):
        evaluator("--config", config).plan(tmp_path / "1backbone.pth")


def test_network_is_the_runs_and_sets_are_those_of_a_named_config(runs, sets, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "from easydict import EasyDict\nconfig = EasyDict(network='iresnet18', "
        f"val_rec={str(sets)!r}, val_targets=['lowres', 'lfw'])\n"
    )
    tool = evaluator("--config", config)
    job = tool.plan(runs / "student" / "2backbone.pth")
    assert (job.network.network, job.network.embedding_size, names_of(job)) == (
        "mobilefacenet",
        32,
        ["lowres"],
    )
    assert tool.skipped == {sets / "lfw.bin": "lfw", **NOT_THERE}
    assert (
        tool.plan(runs / "teacher" / "5backbone.pth").test_sets[0].images is job.test_sets[0].images
    ), "read once"
    assert tool.plan(tmp_path / "1backbone.pth").network.network == "iresnet18", (
        "no config.json beside it"
    )
    assert names_of(
        evaluator("--val-data", sets, "--val-targets", "frontal,", "lowres").plan(
            tmp_path / "1backbone.pth"
        )
    ) == ["frontal", "lowres"]


def test_wrong_network_says_which_it_is(sets, tmp_path):
    tool = evaluator("--val-data", sets, "--val-targets", "frontal", "network=iresnet18")
    with pytest.raises(InputError, match="it looks like mobilefacenet, embedding_size=32"):
        tool.evaluate_checkpoint(tool.plan(save_network(tmp_path / "1backbone.pth")))


def test_adaface_releases_see_bgr(sets, tmp_path):
    plain = save_network(tmp_path / "plain.pth", network="ir18")
    weights = {f"model.{key}": value for key, value in torch.load(plain).items()}
    torch.save(
        {"state_dict": weights, "pytorch-lightning_version": "1.4.0"}, tmp_path / "adaface.ckpt"
    )
    torch.save({"state_dict": weights}, tmp_path / "whose.pth")
    network = ["network=ir18", "embedding_size=32"]
    images = torch.rand(2, 3, 112, 112)

    def load(path, *arguments):
        tool = evaluator("--val-data", sets, "--val-targets", "frontal", *network, *arguments)
        job = tool.plan(path)
        actual = tool.load(job)(images)
        return actual, tool.describe(job)

    def assert_same(actual, reference):
        torch.testing.assert_close(
            actual, reference, rtol=0, atol=1e-4 * float(reference.abs().max())
        )

    rgb, description = load(plain)
    assert description.endswith("on 1 x cpu, RGB images")
    exchanged, _ = load(plain, "--color-space", "BGR")
    released, description = load(tmp_path / "adaface.ckpt")
    assert description.endswith("BGR images, weights of state_dict under model.")
    assert_same(released, exchanged)
    assert (rgb - exchanged).abs().max() > 0.01 * rgb.abs().max()
    assert_same(load(tmp_path / "adaface.ckpt", "color_space=RGB")[0], rgb)
    with pytest.raises(
        InputError,
        match=r"checkpoint: .*whose.pth is an IR network under model\.: "
        r".*set color_space=BGR or",
    ):
        load(tmp_path / "whose.pth")
    assert_same(load(tmp_path / "whose.pth", "color_space=BGR")[0], exchanged)


def test_color_space_of_a_run_is_its_teachers(sets, tmp_path):
    """Its config.json, and a configuration that is one, do not speak of the student."""
    (tmp_path / "run").mkdir()
    own = save_network(tmp_path / "run" / "5backbone.pth")
    elsewhere = save_network(tmp_path / "5backbone.pth")
    write_run_config(tmp_path / "run", color_space="BGR")
    (tmp_path / "my.py").write_text(
        f"from easydict import EasyDict\nconfig = EasyDict({NETWORK | {'color_space': 'BGR'}})\n"
    )
    for checkpoint, config, order in (
        (own, tmp_path / "my.py", "RGB"),
        (own, tmp_path / "run" / "config.json", "RGB"),
        (elsewhere, tmp_path / "run" / "config.json", "RGB"),
        (elsewhere, tmp_path / "my.py", "BGR"),
    ):
        tool = evaluator("--config", config, "--val-data", sets, "--val-targets", "frontal")
        job = tool.plan(checkpoint)
        tool.load(job)
        assert tool.order(job) == order, (checkpoint, config)
    tool = evaluator("--val-data", sets, "--val-targets", "frontal", "--color-space", "BGR")
    job = tool.plan(own)
    tool.load(job)
    assert tool.order(job) == "BGR"
    assert evaluator("--val-data", sets, "--val-targets", "frontal").settings(job) != tool.settings(
        job
    )


# --- run_batch_eval


@pytest.mark.processes
def test_batch_eval_reports(runs, sets, tmp_path):
    reports = tmp_path / "reports"
    output = run(BATCH, "--checkpoint-dir", runs, "--report-dir", reports, "--save-json", *HOW)
    names = [
        "student_2backbone",
        "student_10backbone",
        "student_best_backbone",
        "teacher_5backbone",
    ]
    assert {path.name for path in reports.iterdir()} == SUMMARIES | {
        name + end for name in names for end in ("_metrics.csv", "_metrics.json")
    }
    assert "4 of 4 checkpoints evaluated" in output and output.count("skipped pose") == 1

    results = json.loads((reports / "teacher_5backbone_metrics.json").read_text())
    assert_close(
        results["verification"],
        expected(runs / "teacher" / "5backbone.pth", sets, ["frontal", "lowres"]),
    )
    header, *metrics = csv.reader((reports / "teacher_5backbone_metrics.csv").open())
    assert header == ["metric", "value"] and metrics == sorted(metrics)
    assert dict(metrics) == {
        f"verification.{name}.{key}": f"{value:.6f}"
        for name, figures in results["verification"].items()
        for key, value in figures.items()
    }

    rows = list(csv.DictReader((reports / "summary.csv").open()))
    assert [row["checkpoint"] for row in rows] == names and [row["step"] for row in rows] == [
        "2",
        "10",
        "",
        "5",
    ]
    assert rows[3]["verification.frontal.XNorm"] == dict(metrics)["verification.frontal.XNorm"]
    best = max(float(row["verification.lowres.Accuracy-Flip"]) for row in rows)
    bold = [
        line.split(" | ")[2].rstrip(" |")
        for line in (reports / "summary.md").read_text().splitlines()
        if "backbone" in line
    ]
    assert [cell.strip("*") == f"{100 * best:.2f}" for cell in bold] == [
        cell.startswith("**") for cell in bold
    ]
    assert (reports / "summary.png").read_bytes().startswith(b"\x89PNG")


def batch(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["run_batch_eval.py", *map(str, arguments)])
    run_batch_eval.main()


def test_checkpoints_against_one(runs, sets, tmp_path, monkeypatch, capsys):
    for plot in ("plot_all", "plot_headlines", "plot_differences"):
        monkeypatch.setattr(files, plot, lambda *_: None)
    how = [
        "--checkpoint-dir",
        runs / "student",
        *HOW,
        "--val-targets",
        "frontal",
        "--intervals",
        "40",
    ]
    how += ["--report-dir", tmp_path, "--features", tmp_path / "features"]
    how += ["--val-data", sets]
    batch(monkeypatch, *how, "--against", "10backbone")
    rows = {row["checkpoint"]: row for row in csv.DictReader((tmp_path / "summary.csv").open())}
    assert len(rows) == 3
    against, key = rows.pop("10backbone"), "verification.frontal.eer"
    assert against[f"difference.{key}"] == ""
    marks = []
    for row in rows.values():
        difference, low, high = (
            float(row[f"difference.{key}{end}"]) for end in ("", "-95.low", "-95.high")
        )
        # three numbers of six decimals each
        assert difference == pytest.approx(float(row[key]) - float(against[key]), abs=2e-6)
        assert low <= high and row[f"difference.{key}.mark"] == ("*" if low > 0 or high < 0 else "")
        assert float(row[f"{key}-95.low"]) <= float(row[f"{key}-95.high"])
        marks.append(row[f"difference.{key}.mark"])
    text = (tmp_path / "summary.md").read_text()
    assert "Differences to 10backbone with 95 % intervals" in text
    (line,) = (line for line in text.splitlines() if line.startswith("| frontal.eer |"))
    assert [cell.strip().endswith("*") for cell in line.split("|")[2:4]] == list(map(bool, marks))

    # from the draws that were kept, against another one
    capsys.readouterr()
    batch(monkeypatch, *how, "--against", "2backbone")
    assert capsys.readouterr().out.count("the report is newer") == 3
    again = {row["checkpoint"]: row for row in csv.DictReader((tmp_path / "summary.csv").open())}
    assert float(again["10backbone"][f"difference.{key}"]) == pytest.approx(
        -float(rows["2backbone"][f"difference.{key}"])
    )
    for arguments, message in (
        (["--against", "10back"], "no such checkpoint.*nearest names: 10backbone"),
        (["--against", "10backbone", "--intervals", "0"], "needs the draws of --intervals"),
        (["--intervals", "-1"], "--intervals -1: a number of draws"),
        (["--groups", tmp_path / "none.csv"], "--groups: no file"),
    ):
        with pytest.raises(InputError, match=message):
            batch(monkeypatch, *how, *arguments)


@pytest.mark.processes
def test_seeds_of_one_method_are_one_row(sets, tmp_path):
    for seed in (1, 2):
        folder = tmp_path / f"ada_seed{seed}"
        folder.mkdir()
        save_network(folder / "3backbone.pth", seed)
        own = dict(method="AdaDistill", seed=seed, output=str(folder))
        write_run_config(folder, val_rec=str(sets), val_targets=["lowres"], **own)
    output = run(BATCH, "--checkpoint-dir", tmp_path, *HOW)
    assert "seeds.md, seeds.csv" in output
    with (tmp_path / "reports" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    first, second = (100 * float(row["verification.lowres.Accuracy-Flip"]) for row in rows)
    mean, spread = (first + second) / 2, abs(first - second) / 2**0.5
    line = (tmp_path / "reports" / "seeds.md").read_text().splitlines()[-1]
    assert line == f"| ada_seed* | 3backbone | 1, 2 | {mean:.2f} ± {spread:.2f} |"


@pytest.mark.processes
def test_one_bad_checkpoint_does_not_stop_the_others(sets, tmp_path):
    good = save_network(tmp_path / "3backbone.pth")
    (tmp_path / "1backbone.pth").write_bytes(good.read_bytes()[:5000])
    write_run_config(tmp_path, val_rec=str(sets), val_targets=["frontal"])
    output = run(BATCH, "--checkpoint-dir", tmp_path, *HOW, expect=1)
    assert (
        "error: 1 of 2 checkpoints could not be evaluated: 1backbone: checkpoint:" in output
        and "Traceback" not in output
    )
    assert {path.name for path in (tmp_path / "reports").iterdir()} == SUMMARIES | {
        "3backbone_metrics.csv"
    }


@pytest.mark.processes
def test_no_checkpoint_is_an_error(tmp_path):
    output = run(BATCH, "--checkpoint-dir", tmp_path, expect=1)
    assert f"no file *backbone.pth in {tmp_path}" in output and not any(tmp_path.iterdir())


def test_order_and_names(runs):
    actual = find_checkpoints(runs, "backbone.pth")
    assert [name_of(path, runs) for path in actual] == [
        "student_2backbone",
        "student_10backbone",
        "student_best_backbone",
        "teacher_5backbone",
    ]
    actual = find_checkpoints(runs / "student", "0backbone.pth")
    assert [name_of(path, runs / "student") for path in actual] == ["10backbone"]
