"""TinyFace's identification protocol against golden figures and plain loops."""

from pathlib import Path

import numpy as np
import pytest

from eval import tinyface
from tests.rounding import U
from utils.errors import InputError

GOLDEN = Path(__file__).parents[1] / "golden" / "evaluation.npz"


def test_golden_identification():
    with np.load(GOLDEN) as archive:
        data = {
            key.removeprefix("tinyface/"): archive[key]
            for key in archive.files
            if key.startswith("tinyface/")
        }
    meta = {role: data[role] for role in tinyface.ROLES}
    results = tinyface.evaluate(data["features"], data["image_paths"], meta)
    # the golden shares are float32
    assert results == pytest.approx(
        {f"rank-{rank}": float(data[f"result/rank-{rank}"]) for rank in (1, 5, 20)}, rel=4 * U
    )
    assert (
        tinyface.figures(tinyface.rank_probes(data["features"], data["image_paths"], meta).ranks)
        == results
    )


def random_set(
    seed: int = 0, people: int = 30, distractors: int = 150
) -> tuple[np.ndarray, list[str], dict[str, list[str]]]:
    """Features, paths in random order, and lists.

    Distractors are numbered as people are, and are nobody.
    """
    rng = np.random.default_rng(seed)
    meta = {
        "probe_paths": [f"Probe/{person}_{k}.jpg" for person in range(people) for k in range(2)],
        "gallery_paths": [
            f"Gallery_Match/{person}_{10 + k}.jpg"
            for person in range(people)
            for k in range(1 + person % 3)
        ],
        "distractor_paths": [
            f"Gallery_Distractor/{index % people}_d{index}.jpg" for index in range(distractors)
        ],
    }
    paths = rng.permutation(
        [path for role in tinyface.ROLES for path in meta[role]] + ["Other/0_9.jpg"]
    ).tolist()
    centres = rng.normal(size=(people, 12))
    features = [
        rng.uniform(0.1, 5)
        * (
            centres[int(path.split("/")[1].split("_")[0])] * ("Distractor" not in path)
            + rng.normal(size=12)
        )
        for path in paths
    ]
    return (
        np.array(features, np.float32),
        paths,
        {role: rng.permutation(listed).tolist() for role, listed in meta.items()},
    )


def slow_ranks(
    features: np.ndarray, paths: list[str], meta: dict[str, list[str]]
) -> tuple[list[int], list[tuple[int, int]]]:
    x = features.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    ranks, hardest = [], []
    for probe in meta["probe_paths"]:
        person = probe.split("/")[1].split("_")[0]
        entries = [
            (
                x[paths.index(probe)] @ x[paths.index(path)],
                role == "gallery_paths" and path.split("/")[1].split("_")[0] == person,
                paths.index(path),
            )
            for role in ("gallery_paths", "distractor_paths")
            for path in meta[role]
        ]
        falling = sorted(entries, reverse=True)
        is_mate = [entry[1] for entry in falling]
        ranks.append(1 + is_mate.index(True))
        hardest.append(
            (
                falling[is_mate.index(False)][2] if False in is_mate else -1,
                falling[is_mate.index(True)][2],
            )
        )
    return ranks, hardest


@pytest.mark.parametrize(
    "seed, people, distractors", [(0, 30, 150), (1, 30, 0), (2, 1, 3), (3, 1, 0)]
)
def test_ranks_equal_a_loop(seed, people, distractors):
    data = random_set(seed, people, distractors)
    actual = tinyface.rank_probes(*data)
    ranks, hardest = slow_ranks(*data)
    np.testing.assert_array_equal(actual.ranks, ranks)
    np.testing.assert_array_equal(actual.hardest, hardest)
    assert [data[1][index] for index in actual.probes] == data[2]["probe_paths"]
    results = tinyface.evaluate(*data, ranks=(1, 3))
    assert results == pytest.approx(
        {f"rank-{rank}": 100 * np.mean(np.array(ranks) <= rank) for rank in (1, 3)}
    )
    assert all(type(value) is float for value in results.values())


def test_lists_may_name_other_folders_and_suffixes():
    features, paths, meta = random_set()
    expected = tinyface.evaluate(features, paths, meta)
    moved = [f"/elsewhere/tinyface_aligned/{path.removesuffix('.jpg')}.png" for path in paths]
    assert tinyface.evaluate(features, moved, meta) == expected
    assert (
        tinyface.evaluate(
            features,
            np.array([path.split("/")[1] for path in paths]),
            {role: np.array(listed) for role, listed in meta.items()},
        )
        == expected
    )


def test_whole_paths_tell_images_of_one_name_apart():
    features, paths, meta = random_set()
    expected = tinyface.evaluate(features, paths, meta)

    # Gallery_Match/3_10.jpg -> Gallery_Match/3_0.jpg, the name of a probe
    def rename(path: str) -> str:
        return path.replace("_10.", "_0.")

    renamed = [rename(path) for path in paths]
    assert (
        tinyface.evaluate(
            features,
            renamed,
            meta | {"gallery_paths": [rename(path) for path in meta["gallery_paths"]]},
        )
        == expected
    )
    with pytest.raises(
        InputError,
        match=r"probe_paths: 3_0\.png could be \S+/3_0\.jpg or "
        r"\S+/3_0\.jpg",
    ):
        tinyface.evaluate(features, renamed, meta | {"probe_paths": ["3_0.png"]})


def test_a_probe_without_a_mate_is_a_miss_at_every_rank():
    """Also where the gallery has fewer images than the rank."""
    features, paths, meta = random_set(2, people=4, distractors=3)
    alone = {f"Gallery_Match/3_{number}.jpg" for number in (10, 11, 12)}
    meta["gallery_paths"] = [path for path in meta["gallery_paths"] if path not in alone]
    actual = tinyface.rank_probes(features, paths, meta)
    lonely = np.array([path.startswith("Probe/3_") for path in meta["probe_paths"]])
    assert [paths[index] for index in actual.probes] == meta["probe_paths"]
    assert (
        (actual.ranks[lonely] == tinyface.NO_MATE).all()
        and (actual.hardest[lonely, 1] == -1).all()
        and (actual.hardest[:, 0] >= 0).all()
    )
    assert (actual.ranks[~lonely] < tinyface.NO_MATE).all() and (
        actual.hardest[~lonely, 1] >= 0
    ).all()
    # of four people's probes, two each
    assert tinyface.evaluate(features, paths, meta)["rank-20"] == 75
    ranks, _ = slow_ranks(
        features,
        paths,
        meta
        | {
            "probe_paths": [path for path in meta["probe_paths"] if not path.startswith("Probe/3_")]
        },
    )
    assert actual.ranks[~lonely].tolist() == ranks


@pytest.mark.parametrize("size", [12, 128, 500])
@pytest.mark.parametrize("direction", ["ones", "random"])
def test_a_network_that_sees_no_difference_finds_nobody(direction, size):
    """Whatever the rounding of a matrix product, which is another at the edges of the matrix, and
    of features of other lengths.
    """
    _, paths, meta = random_set()
    rng = np.random.default_rng(size)
    alike = np.ones(size) if direction == "ones" else rng.normal(size=size)
    for lengths in (np.ones((len(paths), 1)), rng.uniform(0.1, 9, (len(paths), 1))):
        results = tinyface.evaluate((lengths * alike).astype(np.float32), paths, meta)
        assert set(results.values()) == {0}


def test_a_distractor_that_is_a_copy_of_the_mate_ranks_before_it():
    """One image under two names, wherever it stands in the gallery; in every other set its feature
    is shorter.
    """
    for seed in range(4):
        features, paths, meta = random_set(seed)
        index = {path: number for number, path in enumerate(paths)}
        expected = tinyface.rank_probes(features, paths, meta)
        assert (expected.ranks == 1).any()
        mates = dict.fromkeys(expected.hardest[:, 1])
        # there are more distractors than mates
        for copy, mate in zip(meta["distractor_paths"], mates, strict=False):
            features[index[copy]] = np.float32(0.3) ** (seed % 2) * features[mate]
        actual = tinyface.rank_probes(features, paths, meta)
        # every best mate has a copy among the distractors now, which stands before it
        assert (actual.ranks >= 2).all() and (actual.hardest[:, 1] == expected.hardest[:, 1]).all()


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda f, p, m: (f[:-1], p, m),
            r"features of shape \(270, 12\) do not fit 271 image paths",
        ),
        (lambda f, p, m: (f[:, 0], p, m), r"features of shape \(271,\)"),
        (
            lambda f, p, m: (np.where(np.arange(271)[:, None] == 5, np.nan, f), p, m),
            "feature of image 5 is not finite",
        ),
        (
            lambda f, p, m: (np.where(np.arange(271)[:, None] == 6, 0, f), p, m),
            "feature of image 6 is zero",
        ),
        (
            lambda f, p, m: (f, p, m | {"probe_paths": ["Probe/77_0.jpg"]}),
            r"probe_paths: "
            r"Probe/77_0\.jpg is not among the image paths",
        ),
        (
            lambda f, p, m: (f, p, m | {"distractor_paths": ["d.jpg"]}),
            r"distractor_paths: d\.jpg is "
            r"not among the image paths",
        ),
        (
            lambda f, p, m: (
                f,
                p,
                m
                | {
                    "gallery_paths": ["Gallery_Match/0_10.jpg"],
                    "probe_paths": ["Probe/7_0.jpg", "Probe/8_1.jpg"],
                },
            ),
            r"no TinyFace probe has a mate: gallery_paths have no image of person 7 "
            r"\(Probe/7_0\.jpg\) or "
            r"any other",
        ),
        (lambda f, p, m: (f, p, m | {"gallery_paths": []}), "gallery_paths is empty"),
        (lambda f, p, m: (f, p, m | {"probe_paths": []}), "probe_paths is empty"),
        (
            lambda f, p, m: (f, p, m | {"distractor_paths": m["probe_paths"]}),
            "Probe/.* is named more than once",
        ),
        (
            lambda f, p, m: (f, p, {"probe_paths": m["probe_paths"]}),
            "no gallery_paths, distractor_paths; there are probe_paths",
        ),
        (lambda f, p, m: (f, [*p[:-1], p[0]], m), "images 0 and 270 have the same path"),
        (lambda f, p, m: (f, p, m, (0, 1)), "rank 0"),
    ],
)
def test_refused(change, message):
    with pytest.raises(InputError, match=message) as error:
        tinyface.evaluate(*change(*random_set()))
    assert "\n" not in str(error.value)
