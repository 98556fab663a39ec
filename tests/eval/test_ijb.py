"""IJB's 1:1 and 1:N protocols against golden figures and plain loops in float64."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics

from eval import ijb, ijb_templates
from eval.roc import FPRS, roc_curve
from tests import rounding
from utils.errors import InputError

GOLDEN = Path(__file__).parents[1] / "golden" / "evaluation.npz"
IMAGES = ("embeddings", "faceness_scores", "templates", "medias")
PAIRS = ("label", "p1", "p2")
LISTS = ("gallery_templates", "gallery_subjects", "probe_templates", "probe_subjects")
# Of a score in float32: a product of two features of up to 32 numbers, each of which is the sum of
# some ten images' features.
ROUNDING = rounding.cosine(32) + 2 * 10**0.5 * rounding.U


def golden(prefix: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as archive:
        return {
            key.removeprefix(prefix): archive[key]
            for key in archive.files
            if key.startswith(prefix)
        }


def random_set(
    seed: int = 0,
    images: int = 400,
    templates: int = 60,
    people: int = 15,
    pairs: int = 3000,
    lowest: int = 0,
    step: int = 1,
) -> dict[str, np.ndarray]:
    """Images in random order; a media id occurs in several templates, template ids are lowest,
    lowest + step, …
    """
    rng = np.random.default_rng(seed)
    of_image = np.append(np.arange(templates), rng.integers(0, templates, images - templates))
    rng.shuffle(of_image)
    person = rng.integers(0, people, templates)
    embeddings = rng.normal(size=(people, 24))[person[of_image]] + 4 * rng.normal(size=(images, 24))
    p1, p2 = rng.integers(0, templates, (2, pairs))
    ids = lowest + step * np.arange(templates)
    return {
        "embeddings": (embeddings * rng.uniform(0.1, 4, (images, 1))).astype(np.float32),
        "faceness_scores": rng.uniform(0.2, 1, images).astype(np.float32),
        "templates": ids[of_image],
        "medias": rng.integers(0, 9, images),
        "label": (person[p1] == person[p2]).astype(np.int64),
        "p1": ids[p1],
        "p2": ids[p2],
        "gallery_templates": ids[:12],
        "gallery_subjects": person[:12] + 700,
        "probe_templates": ids[12:],
        "probe_subjects": person[12:] + 700,
    }


def take(data: dict[str, np.ndarray], *groups: tuple[str, ...]) -> list[np.ndarray]:
    return [data[name] for names in groups for name in names]


def slow_features(
    data: dict[str, np.ndarray], variant: str = ijb.VARIANTS[0]
) -> dict[int, np.ndarray]:
    """Template id -> unit feature in float64: mean within each media, sum over media."""
    x = data["embeddings"].astype(np.float64)
    if "Norm:False" in variant:
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    if "Det:True" in variant:
        x = x * data["faceness_scores"][:, None]
    features = {}
    for template in np.unique(data["templates"]):
        mine = data["templates"] == template
        total = sum(
            x[mine & (data["medias"] == media)].mean(axis=0)
            for media in np.unique(data["medias"][mine])
        )
        features[template] = total / np.linalg.norm(total)
    return features


def slow_scores(data: dict[str, np.ndarray], variant: str) -> np.ndarray:
    features = slow_features(data, variant)
    return np.array(
        [features[a] @ features[b] for a, b in zip(data["p1"], data["p2"], strict=True)]
    )


# --- 1:1


def test_golden_verification():
    data = golden("ijb/")
    results = ijb.evaluate(*take(data, IMAGES, PAIRS))
    expected = {
        key.removeprefix("result/"): float(value)
        for key, value in data.items()
        if key.startswith("result/")
    }
    assert results.keys() == expected.keys()
    for key, value in expected.items():  # golden scores are float32, too
        assert results[key] == pytest.approx(
            value, rel=1e-12, abs=2 * ROUNDING if "thresh" in key else 0
        ), key


IDS = {
    "dense": {},
    "negative": dict(lowest=-40),
    "sparse": dict(lowest=-(2**62), step=2**56),
    "extreme": dict(lowest=-(2**63), step=2**57 + 1),
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("rows", [1, 7, 60, 1024])
def test_scores_equal_loops(monkeypatch, ids, rows):
    monkeypatch.setattr(ijb_templates, "ROWS_AT_A_TIME", rows)
    data = random_set(**ids)
    variants = []
    for variant, scores in ijb.compare(*take(data, IMAGES, ("p1", "p2"))):
        variants.append(variant)
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, slow_scores(data, variant), rtol=0, atol=ROUNDING)
    assert tuple(variants) == ijb.VARIANTS


def test_figures_equal_the_published_reading():
    data = random_set(1)
    results = ijb.evaluate(*take(data, IMAGES, PAIRS))
    for variant, scores in ijb.compare(*take(data, IMAGES, ("p1", "p2"))):
        fprs, tprs, thresholds = (
            column[::-1] for column in metrics.roc_curve(data["label"], scores)
        )
        for fpr in FPRS:
            _, position = min(zip(abs(fprs - fpr), range(len(fprs)), strict=True))
            assert results[f"{variant}_tpr_at_fpr_{fpr}"] == pytest.approx(
                100 * tprs[position], rel=1e-12
            )
            assert results[f"{variant}_thresh_at_fpr_{fpr}"] == thresholds[position]
        assert ijb.figures(variant, roc_curve(scores, data["label"])).items() <= results.items()
    assert len(results) == 36 and all(type(value) is float for value in results.values())


def test_order_of_images_and_of_the_two_templates_does_not_matter():
    data = random_set(2)
    _, expected = next(ijb.compare(*take(data, IMAGES, ("p1", "p2"))))
    order = np.random.default_rng(0).permutation(len(data["templates"]))
    _, shuffled = next(ijb.compare(*(data[name][order] for name in IMAGES), data["p1"], data["p2"]))
    np.testing.assert_allclose(shuffled, expected, rtol=0, atol=2 * ROUNDING)
    _, both = next(
        ijb.compare(
            *take(data, IMAGES),
            np.append(data["p1"], data["p2"]),
            np.append(data["p2"], data["p1"]),
        )
    )
    np.testing.assert_array_equal(both[: len(expected)], both[len(expected) :])


def test_few_gallery_templates_against_many_probes():
    """As in IJB: the first of each pair is one of a few.

    Templates that no pair names play no part.
    """
    data = random_set(3)
    data |= {"p1": data["p1"] % 5, "p2": 10 + data["p2"] % 40}
    _, scores = next(ijb.compare(*take(data, IMAGES, ("p1", "p2"))))
    np.testing.assert_allclose(scores, slow_scores(data, ijb.VARIANTS[0]), rtol=0, atol=ROUNDING)


def test_a_media_id_counts_within_its_template():
    """The first template has two images of media 5 and one of media 6, the second one of media
    6.
    """
    x = np.eye(4, dtype=np.float32)
    _, scores = next(
        ijb.compare(
            x,
            np.ones(4),
            np.array([1, 1, 1, 2]),
            np.array([5, 5, 6, 6]),
            np.array([1, 1]),
            np.array([1, 2]),
        )
    )
    assert scores.tolist() == pytest.approx([1, 0])
    x[3] = x[0] + x[2]
    _, scores = next(
        ijb.compare(
            x,
            np.ones(4),
            np.array([1, 1, 1, 2]),
            np.array([5, 5, 6, 6]),
            np.array([1]),
            np.array([2]),
        )
    )
    assert scores.tolist() == pytest.approx([(0.5 + 1) / np.sqrt(1.5) / np.sqrt(2)])


def test_read_only_maps_tensors_and_other_types(tmp_path):
    data = random_set(4)
    expected = ijb.evaluate(*take(data, IMAGES, PAIRS))
    np.save(tmp_path / "features.npy", data["embeddings"])
    mapped = data | {"embeddings": np.load(tmp_path / "features.npy", mmap_mode="r")}
    tensors = {name: torch.from_numpy(value) for name, value in data.items()}
    other = data | {
        "embeddings": np.asfortranarray(data["embeddings"], np.float64),
        "templates": data["templates"].astype(np.uint16),
        "label": data["label"].astype(bool),
    }
    floats = data | {
        name: data[name].astype(np.float64) for name in ("templates", "medias", "label", "p1", "p2")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in (mapped, tensors, other, floats):
            assert ijb.evaluate(*take(kind, IMAGES, PAIRS)) == expected


@pytest.mark.parametrize(
    "name, change, message",
    [
        (
            "faceness_scores",
            lambda x: x[:-1],
            r"faceness_scores of shape \(399,\) do not fit 400 "
            r"embeddings",
        ),
        ("templates", lambda x: x[:-1], r"templates of shape \(399,\) do not fit 400"),
        ("medias", lambda x: np.append(x, 1), r"medias of shape \(401,\) do not fit 400"),
        ("label", lambda x: x[:-1], r"3000 pairs, but labels of shape \(2999,\)"),
        ("p2", lambda x: x[:-1], "3000 first and 2999 second"),
        ("embeddings", lambda x: x[:, 0], r"embeddings of shape \(400,\)"),
        ("embeddings", lambda x: x[:0], r"embeddings of shape \(0, 24\)"),
        (
            "embeddings",
            lambda x: np.where(np.arange(400)[:, None] == 7, np.nan, x),
            "feature of image 7 is not finite",
        ),
        (
            "embeddings",
            lambda x: np.where(np.arange(400)[:, None] == 8, np.inf, x),
            "feature of image 8 is not finite",
        ),
        (
            "embeddings",
            lambda x: np.where(np.arange(400)[:, None] >= 390, 0, x),
            "feature of image 390 is zero.*10 of 400 images",
        ),
        (
            "faceness_scores",
            lambda x: np.where(np.arange(400) == 3, np.nan, x),
            "detector score of image 3 is not finite",
        ),
        (
            "faceness_scores",
            lambda x: 0 * x,
            "Norm:True_Det:True.*template 0 add up to a vector of length 0",
        ),
        (
            "p1",
            lambda x: np.where(np.arange(3000) == 5, 999, x),
            "pair 5 names template 999, which has no images",
        ),
        (
            "p2",
            lambda x: np.where(np.arange(3000) == 6, -1, x),
            "pair 6 names template -1, which has no images",
        ),
        ("p2", lambda x: x / 2, "p2 of shape .* float64: a row of whole numbers"),
        ("label", lambda x: 0 * x, "no genuine pair"),
        ("label", lambda x: 0 * x + 1, "no impostor pair"),
        ("label", lambda x: 2 * x - 1, "the label of pair 0 is"),
    ],
)
def test_refused_verification(name, change, message):
    data = random_set()
    data[name] = change(data[name])
    with pytest.raises(InputError, match=message) as error:
        ijb.evaluate(*take(data, IMAGES, PAIRS))
    assert "\n" not in str(error.value)


def test_an_unknown_template_between_sparse_ids_is_named():
    data = random_set(**IDS["sparse"])
    data["p1"][4] += 1
    with pytest.raises(
        InputError, match=f"pair 4 names template {data['p1'][4]}, which has no images"
    ):
        ijb.compare(*take(data, IMAGES, ("p1", "p2")))  # by the call, before anything is scored


# --- 1:N


@pytest.mark.parametrize("gallery", ["g1", "g2"])
def test_golden_identification(gallery):
    data, lists = golden("ijb/"), golden("ijb1n/")
    result = ijb.evaluate_1n(
        *take(data, IMAGES),
        lists[f"{gallery}_templates"],
        lists[f"{gallery}_subjects"],
        lists["probe_templates"],
        lists["probe_subjects"],
        lists["fars"],
    )
    assert tuple(lists["fars"]) == ijb.FARS
    for name in ("top1", "top5", "top10", "tpir", "mated"):
        np.testing.assert_allclose(result[name], lists[f"{gallery}/{name}"], rtol=1e-12)
    np.testing.assert_allclose(
        result["thresholds"], lists[f"{gallery}/thresholds"], rtol=0, atol=2 * ROUNDING
    )
    assert result["mated"] + result["non_mated"] == len(np.unique(lists["probe_templates"]))


def slow_identification(data: dict[str, np.ndarray], fars) -> dict:
    features = slow_features(data)
    gallery = dict(zip(data["gallery_templates"], data["gallery_subjects"], strict=True))
    ranks, mates, others, maxima = [], [], [], []
    for template, subject in dict(
        zip(data["probe_templates"], data["probe_subjects"], strict=True)
    ).items():
        falling = sorted(
            (
                (features[template] @ features[entry], owner == subject)
                for entry, owner in gallery.items()
            ),
            reverse=True,
        )
        if subject not in gallery.values():
            maxima.append(falling[0][0])
            continue
        before = [is_mate for _, is_mate in falling].index(True)
        ranks.append(before + 1)  # all that stand before the best mate are non-mates
        mates.append(falling[before][0])
        others.append(max(score for score, is_mate in falling if not is_mate))
    ranks, mates, others, maxima = map(
        np.array, (ranks, mates, others, sorted(maxima, reverse=True))
    )
    thresholds = np.array([maxima[max(int(len(maxima) * far) - 1, 0)] for far in fars])
    return {
        "top1": np.mean(ranks <= 1),
        "top5": np.mean(ranks <= 5),
        "top10": np.mean(ranks <= 10),
        "thresholds": thresholds,
        "tpir": np.array(
            [np.mean((mates > threshold) & (mates > others)) for threshold in thresholds]
        ),
        "mated": len(ranks),
        "non_mated": len(maxima),
    }


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("seed", range(3))
def test_identification_equals_loops(ids, seed):
    """Twelve gallery templates of fifteen people: some subjects have two of them."""
    data = random_set(seed, **ids)
    assert len(set(data["gallery_subjects"])) < 12
    fars = (0.01, 0.1, 0.3, 1.0)
    result, expected = (
        ijb.evaluate_1n(*take(data, IMAGES, LISTS), fars),
        slow_identification(data, fars),
    )
    assert result.keys() == expected.keys() and 0 < expected["top1"] < 1
    for name, value in expected.items():
        # shares are the same, thresholds are scores
        np.testing.assert_allclose(
            result[name],
            value,
            rtol=1e-12,
            atol=ROUNDING if name == "thresholds" else 0,
            err_msg=name,
        )


def test_a_hit_lies_strictly_above_threshold_and_non_mates():
    """By hand: the second mate is at the first threshold, the third has a non-mate beside it, the
    fourth one before it.
    """
    result = ijb.identification_figures(
        ijb.Identification(
            np.array([1, 1, 2, 2]), np.array([0.9, 0.5, 0.4, 0.8]), np.array([0.2, 0.5, 0.1, 0.3])
        ),
        (1e-4, 0.25, 0.5, 0.99, 1.0),
    )
    assert result["thresholds"].tolist() == [0.5, 0.5, 0.3, 0.2, 0.1] and result[
        "tpir"
    ].tolist() == [0.25, 0.25, 0.5, 0.5, 0.5]
    assert (result["top1"], result["top5"], result["mated"], result["non_mated"]) == (0.5, 1, 4, 4)


def test_a_mate_as_high_as_the_threshold_but_for_rounding_is_no_hit():
    for mate in (0.5, np.nextafter(0.5, 1), float(np.nextafter(np.float32(0.5), np.float32(1)))):
        assert ijb.tpir_at(
            ijb.Identification(np.array([1]), np.array([mate]), np.array([0.5])), np.array([0.5])
        ) == [0]
    assert ijb.tpir_at(
        ijb.Identification(np.array([1]), np.array([0.500001]), np.array([0.5])), np.array([0.5])
    ) == [1]


@pytest.mark.parametrize(
    "direction", [np.ones(24), np.random.default_rng(9).normal(size=24)], ids=["ones", "random"]
)
def test_a_network_that_sees_no_difference_identifies_nobody(direction):
    """Also where features differ in length, and so in their rounding: templates of one image and of
    many have one direction.
    """
    data = random_set(images=150, templates=60)
    lengths = np.random.default_rng(0).uniform(0.1, 9, (150, 1))
    result = ijb.evaluate_1n(
        *take(data | {"embeddings": (lengths * direction).astype(np.float32)}, IMAGES, LISTS)
    )
    assert result["top1"] == 0 and not result["tpir"].any()
    assert result["thresholds"] == pytest.approx(np.ones(5), abs=1e-6)


def test_rows_of_lists_may_repeat_and_come_in_any_order():
    data = random_set()
    expected = ijb.evaluate_1n(*take(data, IMAGES, LISTS))
    # whole numbers all the same
    data |= {name: data[name].astype(np.float64) for name in ("templates", *LISTS)}
    rng = np.random.default_rng(0)
    for side in ("gallery", "probe"):
        rows = rng.permutation(np.tile(np.arange(len(data[f"{side}_templates"])), 3))
        for name in (f"{side}_templates", f"{side}_subjects"):
            data[name] = data[name][rows]
    result = ijb.evaluate_1n(*take(data, IMAGES, LISTS))
    for name, value in expected.items():
        np.testing.assert_array_equal(result[name], value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"gallery_templates": lambda x: np.append(x[:-1], 999)},
            "the gallery list names template 999, which has no images",
        ),
        (
            {"probe_templates": lambda x: np.append(-5, x[1:])},
            "the probe list names template -5, which has no images",
        ),
        (
            {
                "gallery_templates": lambda x: np.append(x[:-1], x[0]),
                "gallery_subjects": lambda x: np.arange(len(x)),
            },
            "the gallery list gives template 0 two subjects, 0 and 11",
        ),
        ({"probe_subjects": lambda x: x[:-1]}, "the probe list has 48 templates and 47 subjects"),
        (
            {"gallery_templates": lambda x: x[:0], "gallery_subjects": lambda x: x[:0]},
            "the gallery list has 0 templates",
        ),
        ({"gallery_subjects": lambda x: x + 1000}, "no probe's subject is in the gallery"),
        (
            {"gallery_subjects": lambda x: 0 * x, "probe_subjects": lambda x: 0 * x},
            "every probe's subject is in the gallery",
        ),
        ({"gallery_subjects": lambda x: x.astype(str)}, "the gallery list's subjects"),
    ],
)
def test_refused_identification(changes, message):
    data = random_set()
    for name, change in changes.items():
        data[name] = change(data[name])
    with pytest.raises(InputError, match=message) as error:
        ijb.evaluate_1n(*take(data, IMAGES, LISTS))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("far", [0, -1, 1.5, float("nan")])
def test_refused_rates(far):
    data = random_set()
    with pytest.raises(InputError, match="false positive identification rate"):
        ijb.evaluate_1n(*take(data, IMAGES, LISTS), [0.1, far])
