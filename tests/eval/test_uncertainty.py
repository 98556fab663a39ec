"""Intervals and groups of IJB and TinyFace, in thresholds.json, tables and the comparison of
checkpoints.
"""

import json

import numpy as np
import pytest
import torch

from data.synth.benchmarks import write_ijb, write_tinyface
from data.synth.render_pool import open_studio
from eval.groups import read_groups
from eval.report import files, tables
from eval.report.figure_keys import flatten
from eval.report.tables import tabulate
from eval.report.thresholds import write_thresholds
from eval.roc import threshold_at
from eval.sets.ijb import load_ijb
from eval.sets.tinyface import load_tinyface
from eval.test_sets import IJBTestSet, TinyFaceTestSet
from eval.tinyface import identity_of
from eval.uncertainty import Uncertainty


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    with open_studio(1, 0, 1.0) as studio:
        write_ijb(folder, studio, 0, 1.0, 8)
        write_tinyface(folder, studio, 0, 1.0, 8)
    return folder


def features_of(people: np.ndarray) -> torch.Tensor:
    """(N, 16): a direction for each person, and noise."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(people.max() + 1, 16))
    return torch.from_numpy((directions[people] + rng.normal(size=(len(people), 16))).astype("f4"))


def two_groups(path, names) -> Uncertainty:
    lines = [f"{name},{'AB'[index % 2]}\n" for index, name in enumerate(names)]
    path.write_text("name,group\n" + "".join(lines))
    return Uncertainty(60, read_groups(path))


def check_intervals(figures: dict, keys: list[str]) -> None:
    for key in keys:
        low, high = figures[f"{key}-95"]
        assert low <= high, key
        assert low <= figures[key] <= high, key


def without_intervals(figures: dict) -> dict:
    return {
        key: without_intervals(value) if isinstance(value, dict) else value
        for key, value in figures.items()
        if not key.endswith("-95")
    }


def test_ijb(folder, tmp_path):
    data = load_ijb(folder / "ijb", "IJBsynth")
    test_set = IJBTestSet("IJBsynth", data, 16, 0, True)
    subjects = np.unique(data.probes[1])
    uncertainty = two_groups(tmp_path / "groups.csv", subjects)
    exhibits = []
    features = features_of(test_set.people.of(data.templates))
    figures = test_set.measure(features, None, exhibits, uncertainty)
    assert test_set.people.count == 8
    plain = test_set.measure(features, None, None, Uncertainty())
    # what is asked for beside figures does not change them
    assert plain == without_intervals(figures)
    first = "Norm:True_Det:True"
    rates = [f"{first}_tpr_at_fpr_0.1", f"{first}_fnmr_at_fmr_0.1", f"{first}_eer"]
    check_intervals(figures, [*rates, f"{first}_thresh_at_fpr_0.1"])
    for gallery in data.galleries:
        check_intervals(figures[f"1N_{gallery}"], ["top1", "top5", "tpir_at_fpir_1"])
    comparison = uncertainty.by_group["ijb", "IJBsynth"]
    groups = comparison["by_group"]
    assert set(groups) == {"A", "B"} and comparison["common_threshold"] < 1
    for group in groups.values():
        check_intervals(group, rates)
        assert 0 <= group["fnmr_at_common_threshold"] <= 100
    sizes = [group["genuine_pairs"] for group in groups.values()]
    # every genuine pair shows one person, who is in a group
    assert sum(sizes) == figures["genuine_pairs"]
    impostors = sum(group["impostor_pairs"] for group in groups.values())
    assert 0 < impostors < figures["impostor_pairs"]
    assert uncertainty.samples["ijb", "IJBsynth"]["1N_G1.top1"].shape == (60,)

    write_thresholds(tmp_path / "t.json", tmp_path / "x.pth", "abc", "RGB", exhibits)
    at_far = json.loads((tmp_path / "t.json").read_text())["sets"]["IJBsynth"]["at_far"]
    assert at_far and all(
        low <= point["cosine"] <= high
        for point in at_far.values()
        for low, high in [point["cosine-95"]]
    )
    assert at_far["0.1"]["tar"] == threshold_at(exhibits[0].rocs[first], 0.1)[1]


def test_tinyface(folder, tmp_path):
    data = load_tinyface(folder, "tinyface")
    test_set = TinyFaceTestSet("tinyface", data, 16, 0, True)
    identities = np.unique([identity_of(path) for path in data.meta["probe_paths"]])
    uncertainty = two_groups(tmp_path / "groups.csv", identities)
    people = np.unique([identity_of(path) for path in data.image_paths], return_inverse=True)[1]
    figures = test_set.measure(features_of(people), None, None, uncertainty)
    check_intervals(figures, ["rank-1", "rank-5", "rank-20"])
    groups = uncertainty.by_group["tinyface", "tinyface"]
    assert "fmr_ratio" not in groups and groups["worst"].keys() == {"rank-1", "rank-5", "rank-20"}
    probes = [group["probes"] for group in groups["by_group"].values()]
    assert sum(probes) == len(data.meta["probe_paths"])
    mean = np.average([group["rank-1"] for group in groups["by_group"].values()], weights=probes)
    assert mean == pytest.approx(figures["rank-1"])


def test_tables_show_intervals_behind_figures():
    results = {
        "verification": {
            "lfw": {
                "Accuracy-Flip": 0.9,
                "Accuracy-Flip-95": [0.88, 0.915],
                "Accuracy-Std": 0.01,
                "XNorm": 20.0,
                "fnmr_at_fmr_0.1": 0.02,
                "fnmr_at_fmr_0.0001": 0.5,
                "fnmr_at_fmr_0.0001-95": [0.4, 0.625],
                "eer": 0.031,
                "genuine_pairs": 3000,
                "impostor_pairs": 3000,
            }
        },
        "ijb": {},
        "tinyface": {"tiny": {"rank-1": 60.0, "rank-1-95": [55.0, 66.5]}},
    }
    accuracy, errors, tinyface = tabulate(results)
    assert accuracy.rows["lfw"][0] == "90.00 ± 1.00 [88.00, 91.50]"
    assert errors.columns == ["EER", "1e-4", "1e-1"]
    assert errors.rows["lfw"] == ["3.10", f"50.00 [40.00, 62.50]{tables.MARK}", "2.00"]
    assert tinyface.rows["tiny"] == ["60.00 [55.00, 66.50]"]
    flat = flatten(results)
    assert flat["verification.lfw.Accuracy-Flip-95.low"] == 0.88
    assert flat["tinyface.tiny.rank-1-95.high"] == 66.5


def test_samples_come_back(tmp_path):
    samples = {("ijb", "IJBC"): {"1N_G1.top1": np.arange(3.0), "a:b": np.array([np.inf, 0, 1])}}
    files.write_samples(tmp_path / "a.npz", samples)
    read = files.read_samples(tmp_path / "a.npz")
    assert read.keys() == {"ijb.IJBC.1N_G1.top1", "ijb.IJBC.a:b"}
    np.testing.assert_array_equal(read["ijb.IJBC.a:b"], [np.inf, 0, 1])
