"""Who is on the images of test sets, groups of people, and figures by group, on drawn faces whose
groups differ by construction.
"""

import csv

import cv2
import numpy as np
import pytest
import torch

from data.synth.render_pool import Photograph, open_studio
from eval.groups import (
    UNRESOLVED,
    GroupsOfPeople,
    check_names,
    compare_groups,
    find_worst,
    ratio_of,
    read_groups,
)
from eval.sets.people import connect_templates, find_people, names_file, read_names
from eval.test_sets import PairTestSet
from eval.uncertainty import PairMeasurement, Uncertainty
from utils.errors import InputError

GROUPS = ("distinct", "alike")
PEOPLE = 15


# --- people


def test_people_of_a_pair_set_are_what_genuine_pairs_connect():
    """Images 0 and 5 are equal: the first and the third pair show one person."""
    images = np.random.default_rng(0).integers(0, 255, (10, 4, 4, 3), np.uint8)
    images[5] = images[0]
    issame = np.array([True, False, True, True, False])
    people = find_people(images, issame, [])
    assert people[0] == people[1] == people[5] == people[4]
    assert people[6] == people[7] != people[0]
    # the rest are four people of one image
    assert len(set(people)) == 6 and people.max() == 5


@pytest.mark.parametrize(
    "names, expected",
    [
        # folders are people
        (["a/1.jpg", "a/2.jpg", "a/1.jpg", "b/1.jpg"], [0, 0, 0, 1]),
        # one folder for all, or none: names say only which image is which
        (["x/1.jpg", "x/2.jpg", "x/1.jpg", "x/3.jpg"], [0, 0, 0, 1]),
        (["1.jpg", "2.jpg", "3.jpg", "4.jpg"], [0, 0, 1, 2]),
    ],
)
def test_people_of_a_pair_set_by_name(names, expected):
    images = np.zeros((4, 2, 2, 3), np.uint8)
    assert find_people(images, np.array([True, False]), names).tolist() == expected


def test_names_beside_a_pair_set(tmp_path):
    path = names_file(tmp_path, "lfw")
    assert path.name == "lfw.names.csv" and read_names(path, 2) == []
    path.write_text('first,second\na/1.jpg,"b, c/1.jpg"\n\na/2.jpg,a/3.jpg\n')
    assert read_names(path, 2) == ["a/1.jpg", "b, c/1.jpg", "a/2.jpg", "a/3.jpg"]
    with pytest.raises(InputError, match="names the images of 2 pairs, the set beside it has 3"):
        read_names(path, 3)


def test_people_of_templates_are_what_pairs_and_subjects_connect():
    people = connect_templates(
        templates=np.array([5, 5, 7, 9, 11, 13, 20]),
        first=np.array([5]),
        second=np.array([9]),
        lists=[(np.array([9, 9, 13]), np.array([1, 1, 2])), (np.array([7]), np.array([1]))],
    )
    first, seven, nine, eleven, thirteen, twenty = people.of(np.array([5, 7, 9, 11, 13, 20]))
    assert first == seven == nine and len({first, eleven, thirteen, twenty}) == 4
    assert people.count == 4


# --- files of groups


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "begins with '', not with the line name,group"),
        ("a,African\n", "begins with 'a,African'"),
        ("name,group\na,African,x\n", "line 2: expected name,group, got 'a,African,x'"),
        ("name,group\na,\n", "line 2: expected name,group"),
        ("name,group\na,A\nb,B\na,B\n", "line 4: a is in the groups A and B"),
        ("name,group\na,A\nb,A\n", "has the groups A: two are needed"),
    ],
)
def test_files_that_are_no_groups(tmp_path, text, message):
    (tmp_path / "groups.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_groups(tmp_path / "groups.csv")


def test_groups_of_people(tmp_path):
    with pytest.raises(InputError, match="--groups: no file /.*none.csv"):
        read_groups(tmp_path / "none.csv")
    path = tmp_path / "groups.csv"
    path.write_text("name , group\nanna, B\nbert/2.jpg, A\ncarl/1.jpg, A\ncarl/2.jpg, B\n")
    groups = read_groups(path)
    assert groups.names == ["A", "B"]
    names = [("anna/1.jpg", "anna"), ("bert/1.jpg", "bert"), ("bert/2.jpg",)]
    # an image stands for its person; who is in two groups, is in none
    names += [("carl/1.jpg",), ("carl/2.jpg",), ("dora",)]
    numbers, unmatched = groups.of_people(4, [0, 1, 1, 2, 2, 3], names)
    assert numbers.tolist() == [1, 0, -1, -1] and unmatched == []
    assert groups.of_people(1, [0], [("anna",)]).unmatched[0] == "bert/2.jpg"


def test_worst_group_and_ratio():
    by_group = {
        "a": {"genuine_pairs": 9, "Accuracy-Flip": 0.9, "eer": 0.1, "1N_G1": {"top1": 0.5}},
        "b": {"genuine_pairs": 8, "Accuracy-Flip": 0.8, "eer": 0.2, "1N_G1": {"top1": 0.6}},
        "few": {"genuine_pairs": 0},
    }
    by_group["a"] |= {"Accuracy-Flip-95": [0.1, 0.99], "fmr_at_common_threshold": 0.001}
    by_group["b"] |= {"Norm:True_Det:True_tpr_at_fpr_0.1": 3, "fmr_at_common_threshold": 0.004}
    assert find_worst(by_group) == {
        "Accuracy-Flip": "b",
        "eer": "b",
        "1N_G1.top1": "a",
        "fmr_at_common_threshold": "b",
        "Norm:True_Det:True_tpr_at_fpr_0.1": "b",
    }
    assert compare_groups(by_group, 0.3)["fmr_ratio"] == pytest.approx(4)
    assert "fmr_ratio" not in compare_groups(by_group)
    assert ratio_of([0.1, 0.0]) == ratio_of([0.1]) == UNRESOLVED


# --- drawn faces


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(pair set, file of groups): 15 people of each group, three images each. Faces of the group
    "alike" are blended with one common face, so that different people look alike, and with
    strangers' faces, so that one person does not.
    """
    folder = tmp_path_factory.mktemp("groups")
    photographs = [Photograph(7, p, i, "frontal") for p in range(2 * PEOPLE) for i in (1, 2, 3)]
    with open_studio(1, 0, 0.3) as studio:
        faces = [cv2.imdecode(np.frombuffer(face, np.uint8), 1) for face in studio(photographs)]
    faces = np.stack(faces).reshape(2 * PEOPLE, 3, *faces[0].shape)
    strangers = np.random.default_rng(0).permutation(faces[:PEOPLE].reshape(-1, *faces.shape[2:]))
    own, others = faces[PEOPLE:], strangers.reshape(faces[PEOPLE:].shape)
    faces[PEOPLE:] = (0.2 * own + 0.2 * others + 0.6 * faces[0, 0]).astype(np.uint8)
    chosen, names, issame = [], [], []
    for group in range(2):
        people = range(group * PEOPLE, (group + 1) * PEOPLE)
        pairs = [((p, i), (p, k), True) for p in people for i, k in ((0, 1), (0, 2), (1, 2))]
        pairs += [((p, 0), (q, 1), False) for p in people for q in people if p != q]
        for *ends, same in pairs:
            chosen += [faces[end] for end in ends]
            names += [f"{GROUPS[group]}/person{p}/{i}.jpg" for p, i in ends]
            issame.append(same)
    lines = [(f"person{p}", GROUPS[p // PEOPLE]) for p in range(2 * PEOPLE)]
    with open(folder / "groups.csv", "w", newline="") as file:
        csv.writer(file).writerows([("name", "group"), *lines, ("nobody", "few")])
    data = (np.stack(chosen), np.array(issame)), "fingerprint", names
    return PairTestSet("drawn", data, 16), folder / "groups.csv"


def pixels(images: np.ndarray) -> torch.Tensor:
    """Features of a network that nobody trained: coarse pixels."""
    coarse = np.stack([cv2.resize(image, (8, 8), interpolation=cv2.INTER_AREA) for image in images])
    return torch.from_numpy(coarse.reshape(len(images), -1).astype(np.float32) - 128)


def test_drawn_groups_differ_as_they_were_made(drawn):
    test_set, path = drawn
    features = pixels(test_set.images)
    uncertainty = Uncertainty(100, read_groups(path))
    figures = test_set.measure(features, features, None, uncertainty)
    comparison = uncertainty.by_group["verification", "drawn"]
    groups = comparison["by_group"]
    distinct, alike = groups["distinct"], groups["alike"]
    for group in (distinct, alike):
        assert (group["genuine_pairs"], group["impostor_pairs"]) == (45, 210)
    # pairs at the common threshold, counted
    own = np.repeat([0, 1], 255)
    unit = features / features.norm(dim=1, keepdim=True)
    scores = (unit[0::2] * unit[1::2]).sum(dim=1).numpy()
    # a score of one of the pairs, but for the rounding of 192 products
    accepted = scores >= comparison["common_threshold"] - 1e-6
    for number, group in enumerate((distinct, alike)):
        for key, kind in (("fmr", ~test_set.issame), ("fnmr", test_set.issame)):
            share = accepted[(own == number) & kind].mean()
            expected = share if key == "fmr" else 1 - share
            assert group[f"{key}_at_common_threshold"] == pytest.approx(expected)
    assert alike["eer"] > distinct["eer"] and alike["Accuracy-Flip"] < distinct["Accuracy-Flip"]
    assert comparison["worst"]["eer"] == comparison["worst"]["Accuracy-Flip"] == "alike"
    assert groups["few"] == {"genuine_pairs": 0, "impostor_pairs": 0}
    assert "drawn: --groups: 30 of 30 people are in a group" in uncertainty.notes
    assert "drawn: --groups: names that match nothing: 1, first 'nobody'" in uncertainty.notes
    assert any("few has 0 genuine and 0 impostor pairs: too few" in n for n in uncertainty.notes)
    for of_set in (figures, distinct, alike):
        for key in ("Accuracy-Flip", "eer", "fnmr_at_fmr_0.01"):
            low, high = of_set[f"{key}-95"]
            assert low <= of_set[key] <= high, key
    assert alike["fmr_at_common_threshold-95"][0] <= alike["fmr_at_common_threshold"]
    assert figures.keys() >= {"eer-95", "genuine_pairs", "XNorm"}
    assert not {"XNorm-95", "genuine_pairs-95", "tpr_at_fpr_0.1-95"} & figures.keys()


def test_ratio_where_both_groups_have_false_accepts(tmp_path):
    """6,000 impostor pairs of each group under one score: the threshold accepts 12 of all, of
    which the second group, whose scores are higher by 0.2 sd, has more.
    """
    rng = np.random.default_rng(0)
    (tmp_path / "groups.csv").write_text("name,group\na,A\nb,B\n")
    person = np.arange(4) // 2
    first = rng.integers(0, 2, 12_000) * 2
    same = np.arange(12_000) < 100
    measurement = PairMeasurement(
        "many",
        Uncertainty(0, read_groups(tmp_path / "groups.csv")),
        4,
        lambda groups: GroupsOfPeople(person, []),
        same,
        first,
        first + 1,
    )
    scores = rng.normal(3 * same + 0.2 * (first == 2), 1)
    measurement.add_scores(scores, lambda rates, chosen, pairs: (rates.figures, {}))
    comparison = compare_groups(measurement.by_group, measurement.common_threshold)
    rates = [comparison["by_group"][group]["fmr_at_common_threshold"] for group in "AB"]
    threshold = comparison["common_threshold"]
    for group, rate in enumerate(rates):
        impostor = ~same & (first == 2 * group)
        assert rate == pytest.approx((scores[impostor] >= threshold).mean())
    assert 0 < rates[0] < rates[1]
    assert comparison["fmr_ratio"] == pytest.approx(rates[1] / rates[0])


def test_names_that_match_nothing(drawn, tmp_path):
    test_set, path = drawn
    check_names(read_groups(path), [test_set])
    other = tmp_path / "other.csv"
    other.write_text("name,group\nsomebody,A\nelse,B\n")
    with pytest.raises(InputError, match="names no person and no image of drawn, .*'somebody'"):
        check_names(read_groups(other), [test_set])
    without_names = PairTestSet("drawn", ((test_set.images, test_set.issame), "", []), 16)
    with pytest.raises(InputError, match="needs <set>.names.csv beside it"):
        check_names(read_groups(path), [without_names])
