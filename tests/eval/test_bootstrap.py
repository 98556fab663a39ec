"""Draws of people: against pairs repeated as often as drawn, scipy, and scores whose answer is
known.
"""

from statistics import NormalDist

import numpy as np
import pytest
from scipy import stats
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from eval import ijb, tinyface, verification
from eval.bootstrap import (
    NOBODY,
    Cut,
    Difference,
    PairPeople,
    connect,
    draw_people,
    interval,
    sample_rates,
    sample_rates_at,
    subtract,
    weigh_impostors,
    with_intervals,
)
from eval.roc import FPRS, error_figures, roc_curve, tpr_at

NORMAL = NormalDist()


def random_pairs(people: int, pairs: int, decimals: int, draws: int, seed: int = 0):
    """(scores, same, PairPeople); few decimals make many ties."""
    rng = np.random.default_rng(seed)
    same = rng.random(pairs) < 0.4
    same[:2] = False, True
    first = rng.integers(0, people, pairs)
    second = np.where(same, NOBODY, (first + rng.integers(1, people, pairs)) % people)
    scores = np.round(rng.normal(1.5 * same, 1), decimals).astype(np.float32)
    return scores, same, PairPeople(first, second, draw_people(people, draws))


def once(people: PairPeople) -> PairPeople:
    """Everybody drawn once, in each of two draws."""
    return people._replace(counts=np.ones((len(people.counts), 2), np.uint8))


# --- people


def test_draws_take_as_many_as_there_are_and_are_repeatable():
    counts = draw_people(50, 200)
    assert counts.shape == (51, 200) and (counts[NOBODY] == 1).all()
    assert (counts[:NOBODY].sum(axis=0) == 50).all()
    np.testing.assert_array_equal(counts, draw_people(50, 200))
    # the first draws do not depend on how many follow
    np.testing.assert_array_equal(counts[:, :20], draw_people(50, 20))
    # a person is drawn once on average: 200 x 50 draws, standard error 0.07
    assert abs(counts[:NOBODY].mean(axis=1) - 1).max() < 5 * 0.07


@pytest.mark.parametrize("edges", [0, 30, 300])
def test_components_equal_scipys(edges):
    rng = np.random.default_rng(edges)
    first, second = rng.integers(0, 200, (2, edges))
    graph = coo_array((np.ones(edges), (first, second)), shape=(200, 200))
    count, labels = connected_components(graph, directed=False)
    components = connect(200, first, second)
    assert components.max() + 1 == count
    assert len(set(zip(components, labels, strict=True))) == count
    # a chain, which takes the most steps
    assert connect(1000, np.arange(999), np.arange(1, 1000)).max() == 0


def test_weights_of_pairs():
    people = PairPeople(np.array([0, 0, 2]), np.array([NOBODY, 1, 0]), draw_people(3, 40))
    n = people.counts.astype(int)
    expected = np.stack([n[0], n[0] * n[1], n[2] * n[0]])
    np.testing.assert_array_equal(people.weights(np.arange(3)), expected)
    totals = weigh_impostors(np.array([True, False, False]), people)
    np.testing.assert_array_equal(totals, expected[1:].sum(axis=0))


# --- rates


@pytest.mark.parametrize("decimals", [1, 6])
@pytest.mark.parametrize("people, pairs", [(3, 12), (12, 300), (200, 300)])
def test_rates_are_those_of_pairs_repeated_as_often_as_drawn(people, pairs, decimals):
    scores, same, of_pairs = random_pairs(people, pairs, decimals, 30)
    cuts = [Cut(rate) for rate in (1e-3, 0.02, 0.1, 0.5)]
    samples = sample_rates(scores, same, of_pairs, cuts)
    weights = of_pairs.weights(np.arange(pairs))
    for draw in range(30):
        drawn, kind = (np.repeat(column, weights[:, draw]) for column in (scores, same))
        if kind.all() or not kind.any():
            assert np.isnan([samples.eer[draw], *samples.true_rates[:, draw]]).all()
            continue
        thresholds = np.append(np.inf, np.unique(drawn)[::-1])
        false, true = (
            (drawn[chosen] >= thresholds[:, None]).mean(axis=1) for chosen in (~kind, kind)
        )
        assert samples.eer[draw] == pytest.approx(np.maximum(false, 1 - true).min(), abs=1e-12)
        for row, cut in enumerate(cuts):
            highest = true[false <= cut.rate * (1 + 1e-9)].max()
            assert samples.true_rates[row, draw] == pytest.approx(highest, abs=1e-12)
            assert samples.thresholds[row, draw] == thresholds[np.argmax(true == highest)]
        at = np.full(30, 0.65)
        rates = [rate[draw] for rate in sample_rates_at(scores, same, of_pairs, at)]
        assert rates == pytest.approx([(drawn[~kind] >= 0.65).mean(), (drawn[kind] >= 0.65).mean()])


@pytest.mark.parametrize("pairs", [60, 5000])
def test_everybody_once_gives_the_figures(pairs):
    scores, same, people = random_pairs(40, pairs, 9, 1)
    cuts = [Cut(rate) for rate in FPRS] + [Cut(rate, nearest=True) for rate in FPRS]
    samples = sample_rates(scores, same, once(people), cuts)
    roc = roc_curve(scores, same)
    figures = error_figures(roc)
    assert samples.eer[0] == pytest.approx(figures["eer"], abs=1e-12)
    errors = [figures[f"fnmr_at_fmr_{rate:g}"] for rate in FPRS]
    np.testing.assert_allclose(1 - samples.true_rates[:6, 0], errors, atol=1e-12)
    tpr, thresholds = tpr_at(roc)
    np.testing.assert_allclose(samples.true_rates[6:, 0], tpr, atol=1e-12)
    np.testing.assert_array_equal(samples.thresholds[6:, 0], thresholds)


def test_accuracy_in_a_draw():
    rng = np.random.default_rng(0)
    issame = np.arange(200) % 20 < 10
    person = rng.integers(0, 50, 200)
    second = np.where(issame, NOBODY, (person + 1) % 50)
    people = PairPeople(person, second, draw_people(50, 3))
    embeddings = rng.normal(size=(400, 8)).astype(np.float32)
    embeddings[1::2][issame] = 0.4 * embeddings[1::2][issame] + embeddings[0::2][issame]
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    accuracy = verification.evaluate(embeddings, issame)[2]
    samples = verification.sample_accuracy(embeddings, issame, once(people))
    assert samples == pytest.approx([accuracy.mean()] * 2, abs=1e-12)

    distances = np.square(embeddings[0::2] - embeddings[1::2]).sum(axis=1)
    right = (distances < verification.ACCURACY_THRESHOLDS[:, None]) == issame
    samples = verification.sample_accuracy(embeddings, issame, people)
    for draw, weights in enumerate(people.weights(np.arange(200)).T.astype(float)):
        folds = []
        for fold in np.array_split(np.arange(200), 10):
            others = np.setdiff1d(np.arange(200), fold)
            best = np.argmax((right[:, others] * weights[others]).sum(axis=1))
            if weights[fold].sum():
                folds.append(np.average(right[best, fold], weights=weights[fold]))
        assert samples[draw] == pytest.approx(np.mean(folds), abs=1e-12)


def test_searches_are_those_of_probes_repeated_as_often_as_drawn():
    rng = np.random.default_rng(0)
    ranks, person = rng.geometric(0.4, 120), rng.integers(0, 40, 200)
    search = ijb.Identification(ranks, rng.normal(1, 1, 120), rng.normal(0, 1, 80))
    weights = draw_people(40, 20)[person]
    samples = ijb.sample_identification(search, weights[:120], weights[120:])
    misses = tinyface.sample_figures(ranks, weights[:120])
    for draw in range(20):
        counts = weights[:, draw]
        drawn = ijb.Identification(
            np.repeat(ranks, counts[:120]),
            np.repeat(search.mate_scores, counts[:120]),
            np.repeat(search.non_mated_maxima, counts[120:]),
        )
        figures = ijb.identification_figures(drawn)
        for key in ("top1", "top5", "top10"):
            assert samples[key][draw] == pytest.approx(figures[key])
        for key in ("tpir", "thresholds"):
            of_draw = [of_far[draw] for of_far in samples[key]]
            np.testing.assert_allclose(of_draw, figures[key], rtol=1e-12)
        for key, rate in tinyface.figures(drawn.ranks).items():
            assert misses[key][draw] == pytest.approx(rate)


# --- intervals


def test_intervals_of_genuine_pairs_equal_scipys():
    """The limits are quantiles of 4,000 draws on both sides: the standard error of a 2.5 %
    quantile is sqrt(0.025 * 0.975 / 4000) / (density 0.058 / sd) = 0.042 sd, 0.06 sd of a
    difference; five of them. Its seed is left out, for the argument's name depends on the version.
    """
    rng = np.random.default_rng(0)
    per_person = rng.integers(1, 30, 150)
    person = np.repeat(np.arange(150), per_person)
    scores = rng.normal(size=150)[person] + rng.normal(size=len(person))
    people = PairPeople(person, np.full(len(person), NOBODY), draw_people(150, 4000))
    everything = np.ones(len(person), bool)
    _, rates = sample_rates_at(scores, everything, people, np.full(4000, 0.3))
    accepted = np.bincount(person, weights=scores >= 0.3)
    theirs = stats.bootstrap(
        (accepted, per_person),
        lambda accepted, pairs, axis: accepted.sum(axis) / pairs.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=4000,
    )
    limits = theirs.confidence_interval
    np.testing.assert_allclose(interval(rates), limits, atol=5 * 0.06 * theirs.standard_error)


def simulate(rng, sizes: np.ndarray, impostors: int, of_person: float, of_pair: float):
    """(scores, same, first, second): people of ``sizes`` images, each with the next as a genuine
    pair (mean 2) and ``impostors`` of others (mean 0); standard deviations of what people and pairs
    add to scores.
    """
    people = len(sizes)
    person = np.repeat(np.arange(people), sizes)
    genuine = person[1:][person[1:] == person[:-1]]
    scores = 2 + rng.normal(0, of_person, people)[genuine]
    effect = rng.normal(0, of_person, people)
    first = np.repeat(person, impostors)
    second = (first + rng.integers(1, people, len(first))) % people
    scores = np.append(scores, effect[first] + effect[second])
    scores += rng.normal(0, of_pair, len(scores))
    same = np.arange(len(scores)) < len(genuine)
    nobody = np.full(len(genuine), NOBODY)
    return scores, same, np.append(genuine, first), np.append(nobody, second)


def coverage(people: int, sizes: tuple[int, int], of_person: float, of_pair: float) -> float:
    """The share of 500 intervals of the FNMR at FMR 0.1 that hold its true value."""
    rng = np.random.default_rng(2)
    threshold = NORMAL.inv_cdf(0.9) * np.hypot(np.sqrt(2) * of_person, of_pair)
    truth = NORMAL.cdf((threshold - 2) / np.hypot(of_person, of_pair))
    counts, inside = draw_people(people, 300), 0
    for _ in range(500):
        images = rng.integers(sizes[0], sizes[1] + 1, people)
        scores, same, *ends = simulate(rng, images, 1, of_person, of_pair)
        samples = sample_rates(scores, same, PairPeople(*ends, counts), [Cut(0.1)])
        low, high = interval(1 - samples.true_rates[0])
        inside += low <= truth <= high
    return inside / 500


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of 500 intervals that hold it with 95 %, 1 % is the standard error."""
    assert 0.93 <= coverage(120, (2, 50), 0.55, 0.75) <= 0.97
    # people with one pair of each kind: too long, never too short
    assert coverage(150, (2, 2), 0.2, 1.0) >= 0.97


def test_intervals_beside_figures():
    draws = np.append(np.arange(1, 1001), np.nan)
    assert interval(draws) == [25, 975]
    assert interval(np.full(3, np.nan)) is None
    figures = with_intervals({"a": 0.5, "n": 7}, {"a": draws, "b": draws})
    assert list(figures.items()) == [("a", 0.5), ("a-95", [25, 975]), ("n", 7)]
    # a threshold above all scores
    assert interval(np.full(100, np.inf)) == [np.inf, np.inf]


def test_differences_come_from_the_same_draws():
    """Two checkpoints that differ by little, on people who differ by much: the difference is sure
    though the intervals overlap.
    """
    rng = np.random.default_rng(0)
    hard = rng.normal(0.8, 0.1, 500)
    figures, better = {"a": 0.8, "b": 1.0}, {"a": 0.81, "b": 1.0}
    samples = {"a": hard, "b": hard}, {"a": hard + rng.normal(0.01, 0.001, 500), "c": hard}
    difference = subtract(better, samples[1], figures, samples[0])
    assert difference.keys() == {"a"} and difference["a"].excludes_zero
    assert difference["a"].value == pytest.approx(0.01)
    assert 0.005 < difference["a"].low < difference["a"].high < 0.015
    assert subtract(figures, samples[0], figures, samples[0])["a"] == Difference(0, 0, 0)
    assert not Difference(0, 0, 0).excludes_zero
