"""ROC, histograms, ranks and CMC against scikit-learn and plain loops."""

import re

import numpy as np
import pytest
from sklearn import metrics

from eval.roc import (
    FPRS,
    TIE,
    check_norms,
    cmc,
    resolves,
    roc_curve,
    search,
    separate,
    to_whole,
    tpr_at,
)
from tests.conftest import ROOT
from tests.rounding import cosine
from utils.errors import InputError


def random_pairs(
    pairs: int, decimals: int, share: float, dtype=np.float32, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels; few decimals make many ties."""
    rng = np.random.default_rng(seed)
    label = (rng.random(pairs) < share).astype(np.int64)
    label[:2] = 0, 1
    return np.round(rng.normal(0.5 * label, 0.3), decimals).astype(dtype), label


def published_point(label: np.ndarray, scores: np.ndarray, fpr: float) -> tuple[float, float]:
    """As published evaluations read a curve: backwards, the smallest of (distance, position)."""
    fprs, tprs, thresholds = (column[::-1] for column in metrics.roc_curve(label, scores))
    _, position = min(zip(abs(fprs - fpr), range(len(fprs)), strict=True))
    return tprs[position], thresholds[position]


# --- ROC


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("share", [0.002, 0.5, 0.99])
@pytest.mark.parametrize(
    "pairs, decimals",
    [(2, 1), (3, 0), (50, 1), (3000, 0), (3000, 2), (3000, 7), (200_000, 3), (200_000, 7)],
)
def test_curve_equals_scikit_learn(pairs, decimals, share, dtype):
    scores, label = random_pairs(pairs, decimals, share, dtype)
    roc = roc_curve(scores, label)
    fpr, tpr, thresholds = metrics.roc_curve(label, scores)
    np.testing.assert_array_equal(roc.fpr, fpr)
    np.testing.assert_array_equal(roc.tpr, tpr)
    np.testing.assert_array_equal(roc.thresholds, thresholds)
    assert (roc.genuine, roc.impostor) == (label.sum(), (label == 0).sum())
    for reference, *point in zip(FPRS, *tpr_at(roc), strict=True):
        assert tuple(point) == published_point(label, scores, reference)


def test_dropped_points_decide_which_fpr_is_nearest():
    """Scores 9 … 0, genuine only at both ends: of the points between, on one line, scikit-learn
    keeps the last, so FPR 0.4 is nearest to 0.
    """
    scores, label = np.arange(9, -1, -1.0), np.array([1, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    tpr, thresholds = tpr_at(roc_curve(scores, label), [0.4, 0.6])
    assert list(tpr) == [0.5, 1] and list(thresholds) == [9, 0]


def test_of_equally_near_rates_the_larger_tpr():
    scores, label = np.array([4, 3, 2, 1, 0.0]), np.array([1, 0, 1, 0, 1])
    # FPR 0 and 0.5 are as near to 0.25
    tpr, thresholds = tpr_at(roc_curve(scores, label), [0.25, 0.0])
    assert list(thresholds) == [2, 4] and list(tpr) == pytest.approx([2 / 3, 1 / 3])


def test_nothing_is_accepted_where_an_impostor_scores_highest():
    tpr, thresholds = tpr_at(roc_curve(np.array([3, 2, 1.0]), np.array([0, 1, 0])), [1e-6])
    assert tpr[0] == 0 and thresholds[0] == np.inf


@pytest.mark.parametrize("kind", [bool, np.uint8, float, list])
def test_label_and_score_types(kind):
    scores, label = random_pairs(100, 1, 0.5)
    roc = roc_curve(scores, label.tolist() if kind is list else label.astype(kind))
    np.testing.assert_array_equal(roc.tpr, roc_curve(scores, label).tpr)
    np.testing.assert_array_equal(
        roc_curve((10 * scores).astype(np.int8), label).fpr,
        metrics.roc_curve(label, (10 * scores).astype(np.int8))[0],
    )


def test_whether_pairs_resolve_a_rate():
    assert [resolves(1e-6, count) for count in (10**6, 10**6 - 1, 1, 10**7)] == [
        True,
        False,
        False,
        True,
    ]
    assert all(resolves(fpr, round(1 / fpr)) for fpr in FPRS)


@pytest.mark.parametrize(
    "scores, label, message",
    [
        ([1.0, 2.0], [0, 1, 1], r"2 pairs.*shape \(3,\)"),
        ([1.0, 2.0, 3.0], [0, 2, 1], "label of pair 1 is 2"),
        ([1.0, 2.0, 3.0], [0, 1, np.nan], "label of pair 2 is nan"),
        ([1.0, 2.0], [0, 0], "no genuine pair among 2"),
        ([1.0, 2.0], [1, 1], "no impostor pair among 2"),
        ([], [], "no genuine pair among 0"),
        ([1.0, np.nan], [0, 1], "score of pair 1 is not finite"),
        ([-np.inf, 1.0], [0, 1], "score of pair 0 is not finite"),
        ([[1.0], [2.0]], [0, 1], r"scores of shape \(2, 1\)"),
    ],
)
def test_refused_pairs(scores, label, message):
    for function in (roc_curve, separate):
        with pytest.raises(InputError, match=message) as error:
            function(np.array(scores, np.float32), np.array(label))
        assert "\n" not in str(error.value)


# --- separation


@pytest.mark.parametrize(
    "pairs, decimals, k", [(5000, 7, 12), (5000, 1, 12), (30, 2, 12), (2, 1, 5), (100, 2, 0)]
)
def test_separation_equals_histogram_and_sort(pairs, decimals, k):
    scores, label = random_pairs(pairs, decimals, 0.3)
    result = separate(scores, label, k, bins=17)
    for counts, kind in ((result.genuine, 1), (result.impostor, 0)):
        np.testing.assert_array_equal(counts, np.histogram(scores[label == kind], result.edges)[0])
    assert result.genuine.sum() + result.impostor.sum() == pairs and len(result.edges) == 18
    accepts = sorted(np.flatnonzero(label == 0), key=lambda pair: -scores[pair])[:k]
    rejects = sorted(np.flatnonzero(label == 1), key=lambda pair: scores[pair])[:k]
    np.testing.assert_array_equal(result.false_accepts, accepts)
    np.testing.assert_array_equal(result.false_rejects, rejects)


def test_separation_of_equal_scores():
    result = separate(np.full(9, 0.5, np.float32), np.arange(9) % 2)
    assert (
        result.genuine.sum() == 4
        and result.impostor.sum() == 5
        and np.all(np.diff(result.edges) > 0)
    )
    assert result.false_accepts.tolist() == [0, 2, 4, 6, 8]


# --- search


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize(
    "probes, gallery, people", [(300, 70, 20), (5, 1, 2), (1, 40, 3), (600, 9, 200)]
)
def test_search_equals_a_loop(probes, gallery, people):
    rng = np.random.default_rng(probes)
    p, g = unit(rng, probes, 16), unit(rng, gallery, 16)
    of_probe, of_gallery = rng.integers(0, people, probes), rng.integers(0, people, gallery)
    actual = search(p, g, of_probe, of_gallery)
    for index in range(probes):
        falling = sorted(
            range(gallery),
            key=lambda entry: -float(p[index].astype(np.float64) @ g[entry].astype(np.float64)),
        )
        mates = [entry for entry in falling if of_gallery[entry] == of_probe[index]]
        others = [entry for entry in falling if of_gallery[entry] != of_probe[index]]
        assert actual.mates[index] == (mates[0] if mates else -1) and actual.others[index] == (
            others[0] if others else -1
        )
        assert actual.ranks[index] == (
            1 + sum(falling.index(entry) < falling.index(mates[0]) for entry in others)
            if mates
            else gallery + 1
        )
        assert actual.mate_scores[index] == (
            pytest.approx(p[index] @ g[mates[0]], abs=cosine(16)) if mates else -np.inf
        )
        assert actual.other_scores[index] == (
            pytest.approx(p[index] @ g[others[0]], abs=cosine(16)) if others else -np.inf
        )


def test_a_network_that_sees_no_difference_finds_nobody():
    same = np.full((6, 4), 0.5, np.float32)
    assert search(
        same[:2], same, np.array([0, 1]), np.array([0, 0, 1, 2, 3, 4])
    ).ranks.tolist() == [5, 6]


@pytest.mark.parametrize("spread", [1e-6, 1e-3, 1])
def test_ranks_do_not_depend_on_the_rounding_of_the_products(spread):
    """Scores that are off by as much as float32 can be (a product of 512 terms by 512 eps / 2):
    ranks are those of float64, also of features that hardly differ.
    """
    rng = np.random.default_rng(0)
    p, g = (rng.normal(size=512) + spread * rng.normal(size=(count, 512)) for count in (20, 300))
    p, g = (np.float32(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in (p, g))
    of_probe, of_gallery = rng.integers(0, 30, 20), rng.integers(0, 30, 300)
    exact = (
        (p.astype(np.float64) @ g.T.astype(np.float64))
        / np.linalg.norm(p.astype(np.float64), axis=1)[:, None]
        / np.linalg.norm(g.astype(np.float64), axis=1)
    )

    class Rounded(np.ndarray):
        """A matrix whose float32 products come with noise."""

        def __matmul__(self, other):
            product = np.asarray(self) @ np.asarray(other)
            return (
                product + np.float32(rng.uniform(-1, 1, product.shape) * 256 * 2**-23)
                if product.dtype == np.float32
                else product
            )

    actual = search(p.view(Rounded), g, of_probe, of_gallery)
    for row, subject, rank, mate_score, other_score in zip(
        exact, of_probe, actual.ranks, actual.mate_scores, actual.other_scores, strict=True
    ):
        mates, others = row[of_gallery == subject], row[of_gallery != subject]
        best = mates.max(initial=-np.inf)
        assert (
            rank == 1 + np.count_nonzero(others >= best - TIE)
            and mate_score == pytest.approx(best, abs=1e-12)
            and other_score == pytest.approx(others.max(), abs=1e-12)
        )


def test_cmc_is_the_share_of_ranks_up_to():
    assert cmc(np.array([1, 3, 3, 9]), 4).tolist() == [0.25, 0.25, 0.75, 0.75]
    assert cmc(np.array([2]), 1).tolist() == [0]
    # a miss, in no more memory than the others
    assert cmc(np.array([1, 2**31 - 1]), 3).tolist() == [0.5, 0.5, 0.5]


def test_whole_numbers_of_any_type():
    for values in (
        [1, -2],
        np.array([3, 4], np.uint8),
        [1.0, -(2.0**53)],
        np.array([7, 8], np.float32),
        [True, False],
        [],
    ):
        actual = to_whole(np.array(values))
        assert actual.dtype == np.int64 and actual.tolist() == np.array(values).tolist()
    for values in ([1.5], [np.nan], [np.inf], [2.0**53 + 2], ["1"], [None], [1j]):
        assert to_whole(np.array(values)) is None


def test_norms_name_the_image_that_has_none():
    features = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    np.testing.assert_allclose(
        check_norms(features), np.linalg.norm(features, axis=1), rtol=cosine(5)
    )
    for value, message in (
        (0, "feature of image 4 is zero"),
        (np.nan, "feature of image 4 is not finite"),
        (-np.inf, "not finite.*usable feature for 1 of 9 images"),
    ):
        broken = features.copy()
        broken[4] = value
        with pytest.raises(InputError, match=message):
            check_norms(broken)


def test_evaluation_does_not_need_scikit_learn():
    for path in (ROOT / "eval").glob("*.py"):
        assert not re.search(r"^\s*(import|from) sklearn", path.read_text(), re.MULTILINE), path
