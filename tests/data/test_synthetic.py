"""Synthetic faces: the same arguments give the same bytes, the files are what training and
evaluation read, bad arguments are one line.
"""

import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from data import make_synthetic
from data.synth.faces import IDENTITY, VIEWS, draw_identity, draw_nuisance, render
from tests.commands import LIMIT
from utils.recordio.format import unpack
from utils.recordio.indexed import IndexedRecordIO

SCRIPT = Path(make_synthetic.__file__)
IDENTITIES, IMAGES, PAIRS = 3, 4, 40
BENCHMARKS = [
    "ijb/IJBsynth",
    "ijb_arrow/IJBsynth_gt_aligned",
    "tinyface/Testing_Set",
    "tinyface_arrow/tinyface_aligned_pad_0.1",
]


def make(output, **options):
    few = {
        "identities": IDENTITIES,
        "images": IMAGES,
        "pairs": PAIRS,
        "ijb_subjects": 2,
        "tinyface_identities": 2,
    }
    options = few | {"seed": 0, "workers": 1} | options
    flags = [
        text
        for name, value in options.items()
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    return subprocess.run(
        [sys.executable, SCRIPT, "--output", output, *flags],
        capture_output=True,
        text=True,
        cwd=output.parent,
        timeout=LIMIT,
    )


def read_all(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    output = tmp_path_factory.mktemp("synthetic") / "set"
    result = make(output)
    assert result.returncode == 0, result.stderr
    return output


def person(number):
    return draw_identity(np.random.default_rng([0, 0, number, 0]))


@pytest.mark.processes
def test_same_bytes_with_one_and_two_workers(made, tmp_path):
    assert make(tmp_path / "two", workers=2).returncode == 0
    assert read_all(tmp_path / "two") == read_all(made)


@pytest.mark.processes
def test_another_seed_gives_other_images(made, tmp_path):
    assert make(tmp_path / "other", seed=1).returncode == 0
    first, second = (
        {
            name: data
            for name, data in read_all(folder).items()
            if name.count("/") == 0 or name.endswith((".jpg", ".arrow"))
        }
        for folder in (made, tmp_path / "other")
    )
    assert [name for name in first if first[name] == second.get(name)] == ["property"]
    assert not set(first.values()) - {first["property"]} & set(second.values())


@pytest.mark.processes
def test_without_the_benchmarks_all_else_is_the_same(made, tmp_path):
    assert make(tmp_path / "set", ijb_subjects=0, tinyface_identities=0).returncode == 0
    full, plain = read_all(made), read_all(tmp_path / "set")
    assert {name for name in full if name.count("/") == 0} == plain.keys()
    assert {name for name in plain if plain[name] != full[name]} == {
        "synthetic.json",
        "contact_sheet.png",
    }


@pytest.mark.processes
def test_training_set_has_insightface_layout(made):
    assert (made / "property").read_text().split() == [f"{IDENTITIES},112,112"]
    count = IDENTITIES * IMAGES
    with IndexedRecordIO(str(made / "train.idx"), str(made / "train.rec"), "r") as records:
        zero, nothing = unpack(records.read_idx(0))
        assert (zero.flag, list(zero.label), bytes(nothing)) == (
            2,
            [count + 1, count + 1 + IDENTITIES],
            b"",
        )
        for identity in range(IDENTITIES):
            span, _ = unpack(records.read_idx(count + 1 + identity))
            assert list(span.label) == [1 + identity * IMAGES, 1 + (identity + 1) * IMAGES]
            for key in range(int(span.label[0]), int(span.label[1])):
                header, jpeg = unpack(records.read_idx(key))
                assert (header.flag, header.label, header.id) == (0, identity, key)
                assert cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR).shape == (
                    112,
                    112,
                    3,
                )


@pytest.mark.processes
@pytest.mark.parametrize("name", make_synthetic.PAIR_SETS)
def test_pair_sets_are_balanced_in_each_fold(made, name):
    faces, issame = pickle.loads((made / f"{name}.bin").read_bytes())
    assert (len(faces), len(issame)) == (2 * PAIRS, PAIRS)
    assert {type(face) for face in faces} == {bytes} and {type(same) for same in issame} == {bool}
    assert (np.reshape(issame, (10, -1)).mean(axis=1) == 0.5).all()
    assert len(set(faces)) == 2 * PAIRS


@pytest.mark.parametrize("pairs", [20, 40, 600])
def test_pairs_say_the_truth_and_nobody_is_in_two_folds_or_sets(pairs):
    splits = {make_synthetic.TRAIN}
    for name in make_synthetic.PAIR_SETS:
        photographs, issame = make_synthetic.list_pairs(name, pairs)
        assert len(set(photographs)) == 2 * pairs
        assert [
            a.identity == b.identity
            for a, b in zip(photographs[::2], photographs[1::2], strict=True)
        ] == issame
        folds = [
            {photograph.identity for photograph in photographs[k : k + pairs // 5]}
            for k in range(0, 2 * pairs, pairs // 5)
        ]
        assert len(folds) == 10 and sum(map(len, folds)) == len(set.union(*folds))
        [split] = {photograph.split for photograph in photographs}
        assert split not in splits
        splits.add(split)


def test_without_nuisance_a_person_looks_the_same_and_people_differ():
    plain = [
        [
            render(person(k), draw_nuisance(np.random.default_rng(number), 0.0))
            for number in range(3)
        ]
        for k in range(10)
    ]
    for images in plain:
        assert all(np.array_equal(images[0], image) for image in images)
    for a in range(10):
        for b in range(a):
            assert np.abs(plain[a][0].astype(int) - plain[b][0]).mean() > 2


@pytest.mark.parametrize("name", IDENTITY)
def test_each_identity_parameter_shows(name):
    """A parameter that is drawn but not drawn with would promise an identity that no network can
    see.
    """
    plain, who = draw_nuisance(np.random.default_rng(0), 0.0), person(1)
    plain.yaw = 0.3  # depth does not show from the front
    who.bald = False
    colour = {
        "skin_tone": "skin",
        "skin_warmth": "skin",
        "hair_tone": "hair",
        "hair_red": "hair",
        "iris_tone": "iris_colour",
    }.get(name)
    before = render(who, plain)
    if colour:
        setattr(who, colour, getattr(who, colour) + 20)
    else:
        setattr(who, name, getattr(who, name) + IDENTITY[name][1])
    assert not np.array_equal(render(who, plain), before)


@pytest.mark.parametrize("view", VIEWS)
def test_faces_are_drawn_at_any_nuisance(view):
    for number in range(40):
        image = render(
            person(number), draw_nuisance(np.random.default_rng(number), 3.0 * number / 40, view)
        )
        assert image.shape == (112, 112, 3) and image.dtype == np.uint8 and image.std() > 1


@pytest.mark.processes
@pytest.mark.parametrize(
    "options, message",
    [
        ({"pairs": 30}, "multiple of 20"),
        ({"identities": 0}, "--identities"),
        ({"seed": -1}, "--seed"),
        ({"workers": 0}, "--workers"),
        ({"nuisance": "nan"}, "--nuisance"),
        ({"ijb_subjects": 1}, "--ijb-subjects"),
        ({"tinyface_identities": -1}, "--tinyface-identities"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, options, message):
    result = make(tmp_path / "set", **options)
    assert result.returncode == 1 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "set").exists()


@pytest.mark.processes
def test_an_output_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "set").write_text("a file")
    result = make(tmp_path / "set")
    assert (
        result.returncode == 1
        and "is no folder" in result.stderr
        and result.stderr.count("\n") == 1
    )


@pytest.mark.processes
def test_a_real_training_set_is_not_overwritten(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.rec").write_bytes(b"precious")
    result = make(tmp_path / "set")
    assert (
        result.returncode == 1
        and "another folder" in result.stderr
        and result.stderr.count("\n") == 1
    )
    assert read_all(tmp_path / "set") == {"train.rec": b"precious"}


@pytest.mark.processes
@pytest.mark.parametrize("folder", BENCHMARKS)
def test_a_real_benchmark_is_not_overwritten(tmp_path, folder):
    (tmp_path / "set" / folder).mkdir(parents=True)
    # other sets in this folder are ours
    (tmp_path / "set" / "synthetic.json").write_text("{}")
    (tmp_path / "set" / folder / "photograph.jpg").write_bytes(b"precious")
    before = read_all(tmp_path / "set")
    result = make(tmp_path / "set")
    assert (
        result.returncode == 1
        and f"holds a {folder}" in result.stderr
        and result.stderr.count("\n") == 1
    )
    assert read_all(tmp_path / "set") == before
