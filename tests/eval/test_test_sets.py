"""IJB and TinyFace as users run them: by the evaluation commands, in both layouts, shared out over
ranks, and during training.
"""

import csv
import json
import os

import numpy as np
import pytest
import torch

from backbones import build_backbone
from data.make_synthetic import write_pair_set, write_training_set
from data.synth.benchmarks import write_ijb, write_tinyface
from data.synth.render_pool import open_studio
from eval import ijb, tinyface
from eval.embed import embed
from eval.sets.ijb import load_ijb
from eval.sets.tinyface import load_tinyface
from tests.commands import ROOT, run
from tests.runs.outputs import everything, rows
from utils.weights.load import load_backbone

FULL, BATCH, STANDALONE = (
    ROOT / "eval" / "run_full_eval.py",
    ROOT / "eval" / "run_batch_eval.py",
    ROOT / "train" / "train_standalone.py",
)
HOW = ["--device", "cpu", "network=mobilefacenet", "embedding_size=32"]


pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A training set, a pair set, and small IJB-like and TinyFace-like sets in both layouts."""
    folder = tmp_path_factory.mktemp("data")
    with open_studio(1, 0, 1.0) as studio:
        write_training_set(folder, studio, 6, 8)
        write_pair_set(folder, studio, "frontal", 20)
        write_ijb(folder, studio, 0, 1.0, 6)
        write_tinyface(folder, studio, 0, 1.0, 6)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2, 3):
        torch.manual_seed(step)
        torch.save(build_backbone("mobilefacenet", 32).state_dict(), folder / f"{step}backbone.pth")
    return folder


def sets(data, layout=""):
    return [
        "--val-data",
        data,
        "--val-targets",
        "frontal",
        "--ijb-root",
        data / f"ijb{layout}",
        "--ijb-targets",
        "IJBsynth",
        "--ijb-batch-size",
        16,
        "--ijb-num-workers",
        1,
        "--tinyface-root",
        data / "tinyface_arrow" if layout else data,
        "--tinyface-targets",
        "tinyface",
        "--tinyface-num-workers",
        1,
    ]


@pytest.fixture(scope="module")
def evaluated(data, checkpoints, tmp_path_factory):
    """The figures of a checkpoint on one rank in InsightFace's layout, the report and what was
    printed.
    """
    folder = tmp_path_factory.mktemp("evaluated")
    output = run(
        FULL,
        "--checkpoint",
        checkpoints / "1backbone.pth",
        *HOW,
        *sets(data),
        "--results-json",
        folder / "results.json",
        "--report-dir",
        folder,
        "--features",
        folder / "features",
    )
    return folder, json.loads((folder / "results.json").read_text()), output


def assert_close(actual, reference):
    """Shares of pairs and probes are the same; thresholds are cosines of features of 50 layers, of
    batches of other images (3e-5) and the larger numbers have as much of their size.
    """
    assert actual.keys() == reference.keys()
    for key, value in reference.items():
        if isinstance(value, dict):
            assert_close(actual[key], value)
        elif value is None or value == np.inf:  # a threshold above all scores, in JSON null
            assert actual[key] is None, key
        else:
            np.testing.assert_allclose(actual[key], value, rtol=1e-4, atol=1e-6, err_msg=key)


def test_figures_are_those_of_the_protocols(data, checkpoints, evaluated):
    _, results, _ = evaluated
    network = build_backbone("mobilefacenet", 32)
    load_backbone(network, checkpoints / "1backbone.pth", "test")
    images = load_ijb(data / "ijb", "IJBsynth")
    plain, mirrored = embed(network, images.images, 16)
    rows = (plain + mirrored).numpy(), images.faceness_scores, images.templates, images.medias
    figures = results["ijb"]["IJBsynth"]
    reference = ijb.evaluate(*rows, images.label, images.p1, images.p2)
    assert_close({key: figures[key] for key in reference}, reference)
    assert (figures["genuine_pairs"], figures["impostor_pairs"]) == (
        images.label.sum(),
        (1 - images.label).sum(),
    )
    for gallery, lists in images.galleries.items():
        reference = ijb.evaluate_1n(*rows, *lists, *images.probes, ijb.FARS)
        actual = figures[f"1N_{gallery}"]
        assert [
            actual[key] for key in ("top1", "top5", "top10", "mated", "non_mated")
        ] == pytest.approx(
            [reference[key] for key in ("top1", "top5", "top10", "mated", "non_mated")]
        )
        np.testing.assert_allclose(
            [actual[f"tpir_at_fpir_{far:g}"] for far in ijb.FARS], reference["tpir"]
        )
        np.testing.assert_allclose(
            [actual[f"threshold_at_fpir_{far:g}"] for far in ijb.FARS],
            reference["thresholds"],
            rtol=1e-4,
        )
    small = load_tinyface(data, "tinyface")
    assert results["tinyface"]["tinyface"] == pytest.approx(
        tinyface.evaluate(
            sum(embed(network, small.images, 16)).numpy(), small.image_paths, small.meta
        )
    )


def test_both_layouts_and_two_ranks_give_the_same(data, checkpoints, evaluated, tmp_path):
    run(
        FULL,
        "--checkpoint",
        checkpoints / "1backbone.pth",
        *HOW,
        *sets(data, "_arrow"),
        "--results-json",
        tmp_path / "results.json",
        ranks=2,
    )
    assert_close(json.loads((tmp_path / "results.json").read_text()), evaluated[1])


def test_the_page_and_the_table_show_everything(evaluated):
    folder, results, output = evaluated
    page = (folder / "report.html").read_text()
    for text in (
        "IJBsynth",
        "frontal",
        "tinyface",
        "Norm:True_Det:True",
        "false accepts",
        "false rejects",
        "mobilefacenet",
        "SHA-256",
        "DET of frontal",
        "DET of IJBsynth",
    ):
        assert text in page, text
    assert page.count("data:image/jpeg") >= 8 and page.count("data:image/svg+xml") >= 6
    for figure in (
        results["ijb"]["IJBsynth"]["Norm:True_Det:True_tpr_at_fpr_0.1"],
        results["tinyface"]["tinyface"]["rank-5"],
        100 * results["ijb"]["IJBsynth"]["1N_G1"]["top5"],
    ):
        assert f"{figure:.2f}" in page and f"{figure:.2f}" in output


def test_kept_features_replace_the_network(data, checkpoints, evaluated, tmp_path):
    """A copy of the kept features, made unlike any network's, is what the second evaluation
    measures.
    """
    folder, results, _ = evaluated
    files = sorted((folder / "features").glob("*/*/*.npy"))
    assert {file.parent.name.rpartition("-f")[0].rpartition("-")[0] for file in files} == {
        "verification-frontal",
        "ijb-IJBsynth",
        "tinyface-tinyface",
    }
    for file in files:
        copy = tmp_path / "features" / file.relative_to(folder / "features")
        copy.parent.mkdir(parents=True)
        np.save(
            copy, np.random.default_rng(0).standard_normal(np.load(file).shape).astype(np.float32)
        )
    run(
        FULL,
        "--checkpoint",
        checkpoints / "1backbone.pth",
        *HOW,
        *sets(data),
        "--results-json",
        tmp_path / "other.json",
        "--features",
        tmp_path / "features",
    )
    other = json.loads((tmp_path / "other.json").read_text())
    assert (
        other["ijb"] != results["ijb"]
        and other["tinyface"] != results["tinyface"]
        and other["verification"] != results["verification"]
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ijb-root", "/nowhere"], "--ijb-root: no folder /nowhere"),
        (["--ijb-root", "{data}/ijb", "--ijb-targets", "IJBC"], "folders there: IJBsynth"),
        (["--tinyface-root", "{data}", "--tinyface-targets", "nosuch"], "nosuch"),
    ],
)
def test_what_the_command_line_names_must_be_there(data, checkpoints, arguments, message):
    output = run(
        FULL,
        "--checkpoint",
        checkpoints / "1backbone.pth",
        *HOW,
        *[word.format(data=data) for word in arguments],
        expect=1,
    )
    assert "error: " in output and message in output and "Traceback" not in output


def test_an_unreadable_image_is_an_error_with_its_name(data, checkpoints, tmp_path):
    damaged = tmp_path / "tinyface"
    for folder in (data / "tinyface").rglob("*"):
        if folder.is_file():
            (damaged / folder.relative_to(data / "tinyface")).parent.mkdir(
                parents=True, exist_ok=True
            )
            os.link(folder, damaged / folder.relative_to(data / "tinyface"))
    last = sorted((damaged / "Testing_Set" / "Gallery_Distractor").iterdir())[-1]
    last.unlink()
    last.write_bytes(b"no image")
    for ranks in (1, 2):
        output = run(
            FULL,
            "--checkpoint",
            checkpoints / "1backbone.pth",
            *HOW,
            "val_targets=[]",
            "--tinyface-root",
            tmp_path,
            "--tinyface-targets",
            "tinyface",
            "--tinyface-num-workers",
            1,
            "--results-json",
            tmp_path / "r.json",
            ranks=ranks,
            expect="error",
        )
        assert (
            "error: tinyface: " in output
            and last.name in output
            and "Traceback" not in output.split("error: ")[0]
        )
    assert not (tmp_path / "r.json").exists()


# --- many checkpoints


def test_each_run_is_evaluated_as_its_own_configuration_says(data, checkpoints, tmp_path):
    """Two runs of the same weights, one evaluated without mirror images; a third whose set is not
    there.
    """
    for name, flip, root in (
        ("a", True, data / "ijb"),
        ("b", False, data / "ijb"),
        ("c", True, "/nowhere"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1backbone.pth").write_bytes(
            (checkpoints / "1backbone.pth").read_bytes()
        )
        (tmp_path / name / "config.json").write_text(
            json.dumps(
                dict(
                    network="mobilefacenet",
                    embedding_size=32,
                    val_targets=[],
                    ijb_root=str(root),
                    ijb_flip=flip,
                    ijb_targets=["IJBsynth"],
                    ijb_num_workers=0,
                    tinyface_targets=[],
                )
            )
        )
    output = run(BATCH, "--checkpoint-dir", tmp_path, "--device", "cpu", "--save-json", expect=1)
    assert (
        "error: 1 of 3 checkpoints could not be evaluated: c_1backbone: nothing to evaluate on"
        in output
    )
    with_flip, without = (
        json.loads((tmp_path / "reports" / f"{name}_1backbone_metrics.json").read_text())["ijb"]
        for name in "ab"
    )
    assert with_flip != without
    run(
        FULL,
        "--checkpoint",
        tmp_path / "b" / "1backbone.pth",
        "--device",
        "cpu",
        "--results-json",
        tmp_path / "alone.json",
    )
    assert_close(json.loads((tmp_path / "alone.json").read_text())["ijb"], without)


def test_reports_that_are_newer_are_kept(data, checkpoints, tmp_path):
    arguments = [
        "--checkpoint-dir",
        checkpoints,
        "--report-dir",
        tmp_path,
        *HOW,
        "--val-data",
        data,
        "--val-targets",
        "frontal",
        "--tinyface-root",
        data,
        "--tinyface-targets",
        "tinyface",
        "--tinyface-num-workers",
        0,
    ]
    # 3 checkpoints on 2 ranks
    first = run(BATCH, *arguments, "--share-checkpoints", "--save-json", ranks=2)
    assert "3 of 3 checkpoints evaluated" in first and first.count("Accuracy-Flip ± Std") == 3
    shared = {path.name: path.read_text() for path in tmp_path.glob("*.csv")}
    assert (
        "report is newer" in run(BATCH, *arguments, "--save-json")
        and {path.name: path.read_text() for path in tmp_path.glob("*.csv")} == shared
    )

    (tmp_path / "2backbone_metrics.csv").write_text("metric,value\nverification.fro")
    os.utime(checkpoints / "3backbone.pth")
    again = run(BATCH, *arguments, "--sort-by", "rank-1")
    assert (
        "2backbone: evaluated again, for its report is damaged" in again
        and again.count("report is newer") == 1
        and again.count("Accuracy-Flip ± Std") == 2
    )
    ranked = [
        float(row["tinyface.tinyface.rank-1"])
        for row in csv.DictReader((tmp_path / "summary.csv").open())
    ]
    assert ranked == sorted(ranked, reverse=True) and len(ranked) == 3
    for row in csv.DictReader((tmp_path / "summary.csv").open()):
        name = f"{row['checkpoint']}_metrics.csv"
        before, now = (
            dict(list(csv.reader(text.splitlines()))[1:])
            for text in (shared[name], (tmp_path / name).read_text())
        )
        assert before.keys() == now.keys()
        # 2 ranks, 1 rank
        np.testing.assert_allclose(
            [float(before[key]) for key in before],
            [float(now[key]) for key in before],
            rtol=1e-3,
            atol=1e-5,
        )

    assert run(BATCH, *arguments, "--precision", "bf16").count("Accuracy-Flip ± Std") == 3, (
        "other settings, other figures"
    )
    assert (
        run(BATCH, *arguments, "--precision", "bf16", "--force").count("Accuracy-Flip ± Std") == 3
    )


def test_a_bad_checkpoint_among_shared_ones_is_named_at_the_end(data, checkpoints, tmp_path):
    for step in (1, 2, 3):
        (tmp_path / f"{step}backbone.pth").write_bytes(
            (checkpoints / f"{step}backbone.pth").read_bytes()[: None if step != 2 else 4000]
        )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "4backbone.pth").write_bytes((checkpoints / "3backbone.pth").read_bytes())
    (tmp_path / "other" / "config.json").write_text('{"network": "nosuch"}')
    output = run(
        BATCH,
        "--checkpoint-dir",
        tmp_path,
        *HOW[:2],
        "network=mobilefacenet",
        "embedding_size=32",
        "--val-data",
        data,
        "--val-targets",
        "frontal",
        "--share-checkpoints",
        ranks=2,
        expect="error",
    )
    assert (
        "error: 1 of 4 checkpoints could not be evaluated: 2backbone: checkpoint:" in output
        and ("3 of 4 checkpoints evaluated") in output
    )
    assert {path.name for path in (tmp_path / "reports").iterdir()} >= {
        "summary.csv",
        "summary.md",
        "summary.png",
        "metrics.pdf",
    }


# --- during training


def training(data, output, *more):
    return [
        "dataset=synthetic",
        f"rec={data}",
        f"val_rec={data}",
        "val_targets=[]",
        "embedding_size=32",
        "batch_size=16",
        "num_epoch=2",
        "num_workers=1",
        "lr=0.5",
        "eval_ijb=True",
        f"ijb_root={data / 'ijb'}",
        "ijb_targets=IJBsynth",
        "ijb_num_workers=1",
        "eval_tinyface=True",
        f"tinyface_root={data}",
        "tinyface_num_workers=1",
        f"output={output}",
        *more,
    ]


def test_training_measures_and_a_missed_measurement_is_made_up_for(data, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run(STANDALONE, *training(data, straight, "batch_size=8"), ranks=2)
    measured = {row["step"]: row for row in rows(straight) if "ijb" in row}
    assert list(measured) == [3, 6] and (measured[3]["epoch"], measured[6]["epoch"]) == (0, 1)
    assert measured[6]["ijb"]["IJBsynth"]["1N_G1"]["top1"] >= 0 and measured[6]["tinyface"][
        "tinyface"
    ].keys() == {"rank-1", "rank-5", "rank-20"}
    board = b"".join(path.read_bytes() for path in (straight / "tb").iterdir())
    assert (
        b"IJB/IJBsynth/Norm:True_Det:True_tpr_at_fpr_0.0001" in board
        and b"TinyFace/tinyface/rank-1" in board
    )
    assert "rank-1" in (straight / "training.log").read_text()

    # the figures of the command on the saved weights are those of the run
    run(
        FULL,
        "--checkpoint",
        straight / "6backbone.pth",
        "--device",
        "cpu",
        "--precision",
        "auto",
        "--ijb-root",
        data / "ijb",
        "--ijb-targets",
        "IJBsynth",
        "--results-json",
        tmp_path / "r.json",
        ranks=2,
    )
    assert_close(json.loads((tmp_path / "r.json").read_text())["ijb"], measured[6]["ijb"])

    # a run that is killed while it measures has saved the epoch before, and makes up for the
    # figures when it is resumed
    run(
        ROOT / "tests" / "runs" / "interfere.py",
        "benchmark:1",
        STANDALONE,
        *training(data, broken, "batch_size=8"),
        ranks=2,
        expect="error",
    )
    assert (broken / "3state.pth").exists() and not any("ijb" in row for row in rows(broken))
    run(STANDALONE, *training(data, broken, "batch_size=8"), "--resume", ranks=2)
    assert [row["step"] for row in rows(broken) if "ijb" in row] == [3, 6]
    one, two = everything(straight, 6), everything(broken, 6)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert_close(
        next(row for row in rows(broken) if row["step"] == 3 and "ijb" in row)["ijb"],
        measured[3]["ijb"],
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (["ijb_targets=IJBC"], "folders there: IJBsynth"),
        (["tinyface_root=/nowhere"], "/nowhere"),
        (["ijb_root={bad}"], "template_pair_label"),
        (["tinyface_root={bad}"], "0_9.jpg"),
    ],
)
def test_training_refuses_a_wrong_set_before_the_first_step(data, tmp_path, change, message):
    (tmp_path / "ijb" / "tinyface").mkdir(parents=True)
    for name in ("Probe", "Gallery_Match"):
        (tmp_path / "ijb" / "tinyface" / name).symlink_to(data / "tinyface" / "Testing_Set" / name)
    (tmp_path / "ijb" / "tinyface" / "Gallery_Distractor").mkdir()
    (tmp_path / "ijb" / "tinyface" / "Gallery_Distractor" / "0_9.jpg").write_bytes(
        b"an image that cannot be read, the last of the set"
    )
    bad = tmp_path / "ijb" / "IJBsynth"
    (bad / "meta").mkdir(parents=True)
    (bad / "loose_crop").symlink_to(data / "ijb" / "IJBsynth" / "loose_crop")
    for file in (data / "ijb" / "IJBsynth" / "meta").iterdir():
        if "pair_label" not in file.name:
            (bad / "meta" / file.name).symlink_to(file)
    output = run(
        STANDALONE,
        *training(data, tmp_path / "run"),
        *[word.format(bad=tmp_path / "ijb") for word in change],
        expect=1,
    )
    assert (
        "error: " in output
        and message in output
        and "Traceback" not in output
        and not (tmp_path / "run" / "metrics.jsonl").exists()
    )
