"""How sure figures are: 95 % intervals from a bootstrap that draws people, not pairs.

The pairs of one person are not independent, and an impostor pair depends on two people. A draw
takes as many people as there are, with replacement; a person drawn n times gives a genuine pair
the weight n, two people an impostor pair the weight n1 * n2, and the figure is computed anew with
these weights, thresholds included. In 1:N the gallery stays, and probes are drawn by person. The
draws depend on the number of people and of draws only: two checkpoints on one set meet the same
ones, so that their figures can be subtracted draw by draw.

Bolle, Ratha, Pankanti, "Error analysis of pattern recognition systems: the subsets bootstrap",
CVIU 2004; Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 2007, which shows that
the product of two people's counts never makes intervals too short on average: where most people
are in one pair only, they are too long.

What results (JSON, and the dict of ``Evaluator.evaluate_checkpoint``) hold:

* beside a figure ``k``, with ``--intervals N``, its interval ``k-95``: [low, high], in the figure's
  unit; null where a limit is infinite (a threshold above all scores);
* pair sets: ``fnmr_at_fmr_0.1`` ... ``fnmr_at_fmr_1e-06`` and ``eer`` (fractions),
  ``genuine_pairs``, ``impostor_pairs``; IJB 1:1: ``<variant>_fnmr_at_fmr_0.1`` ...,
  ``<variant>_eer`` (percent, as its TPR);
* ``groups``, with ``--groups FILE`` only: see eval/groups.py.

In the flat tables (``<name>_metrics.csv``, ``summary.csv``) an interval is two figures,
``<k>-95.low`` and ``<k>-95.high``.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

PERCENTILES = (0.025, 0.975)
SEED = 0
NOBODY = -1
# draws computed side by side, and pairs at a time: 1 MB of weights, which a core's cache holds
DRAWS_AT_A_TIME = 512
PAIRS_AT_A_TIME = 2048


class PairPeople(NamedTuple):
    """The two people of each of N pairs, and how often each draw took whom."""

    first: np.ndarray  # (N,) int, the person of the first image
    second: np.ndarray  # (N,) int, of an impostor pair's second image; of a genuine pair NOBODY
    counts: np.ndarray  # (people + 1, draws) uint, see ``draw_people``

    def of(self, pairs: np.ndarray) -> "PairPeople":
        """Those of some pairs, by index or mask."""
        return PairPeople(self.first[pairs], self.second[pairs], self.counts)

    def parts(self, draws: int) -> Iterator["PairPeople"]:
        """The same with so many draws at a time."""
        for start in range(0, self.counts.shape[1], draws):
            yield self._replace(counts=np.ascontiguousarray(self.counts[:, start : start + draws]))

    def weights(self, pairs: np.ndarray) -> np.ndarray:
        """(pairs, draws): n of genuine pairs, n1 * n2 of impostor pairs."""
        weights = self.counts[self.first[pairs]]
        weights *= self.counts[self.second[pairs]]
        return weights


class Cut(NamedTuple):
    """An operating point: the lowest threshold at a false match rate of at most ``rate``, or, if
    ``nearest``, nearest to it.
    """

    rate: float
    nearest: bool = False


class RateSamples(NamedTuple):
    """Error rates of every draw; NaN in one without genuine or without impostor pairs."""

    true_rates: np.ndarray  # (cuts, draws) share of the genuine pairs that are accepted
    thresholds: np.ndarray  # (cuts, draws), infinite where nothing is accepted
    eer: np.ndarray  # (draws,)


class Difference(NamedTuple):
    """A figure minus that of another checkpoint, and the interval of the difference."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


# --- people


def draw_people(people: int, draws: int) -> np.ndarray:
    """How often each draw takes each person, (people + 1, draws) uint8 (uint16 where a product of
    two would not fit); the last row, NOBODY's, is 1.
    """
    rng = np.random.default_rng(SEED)
    counts = np.ones((draws, people + 1), np.uint16)
    for row in counts:
        row[:people] = np.bincount(rng.integers(0, people, people), minlength=people)
    fits = int(counts.max()) ** 2 <= np.iinfo(np.uint8).max
    return np.ascontiguousarray(counts.T, np.uint8 if fits else np.uint16)


def connect(count: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The connected component of each of ``count`` nodes, numbered from 0, from edges (E,) and
    (E,).
    """
    label = np.arange(count)
    while True:
        ends = label[first], label[second]
        if np.array_equal(*ends):
            return np.unique(label, return_inverse=True)[1]
        lower = np.minimum(*ends)
        for end in ends:
            np.minimum.at(label, end, lower)
        # every label leads to the lowest of its tree
        while not np.array_equal(label, label[label]):
            label = label[label]


# --- pairs


def sample_rates(
    scores: np.ndarray,
    same: np.ndarray,
    people: PairPeople,
    cuts: Sequence[Cut],
    totals: np.ndarray | None = None,
) -> RateSamples:
    """The error rates of N pairs in every draw.

    ``scores``: (N,), higher for more alike; ``same``: (N,) bool; ``totals``: as ``weigh_impostors``
    returns them, which several scores of the same pairs can share.
    """
    if totals is None:
        totals = weigh_impostors(same, people)
    corners = _find_corners(scores, same)
    samples = []
    starts = range(0, len(totals), DRAWS_AT_A_TIME)
    for start, part in zip(starts, people.parts(DRAWS_AT_A_TIME), strict=True):
        weights = totals[start : start + DRAWS_AT_A_TIME]
        samples.append(_sweep(scores, corners, part, weights, cuts))
    return RateSamples(*(np.concatenate(parts, axis=-1) for parts in zip(*samples, strict=True)))


def weigh_impostors(same: np.ndarray, people: PairPeople) -> np.ndarray:
    """The weight of all impostor pairs in each draw, (draws,) float64."""
    size = len(people.counts)
    pairs = np.stack([people.first[~same], people.second[~same]]).astype(np.int64)
    ones = torch.ones(pairs.shape[1])
    # how many pairs each two people have
    between = torch.sparse_coo_tensor(
        torch.from_numpy(pairs), ones, (size, size), check_invariants=True
    ).coalesce()
    totals = []
    for part in people.parts(DRAWS_AT_A_TIME):
        counts = part.counts.astype(np.float32)
        # whole numbers below 2^24, so exact
        others = torch.sparse.mm(between, torch.from_numpy(counts)).numpy()
        totals.append(np.einsum("pd,pd->d", counts, others, dtype=np.float64))
    return np.concatenate(totals)


def sample_rates_at(
    scores: np.ndarray, same: np.ndarray, people: PairPeople, thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The share of the impostor pairs and of the genuine ones that reach a threshold of every draw,
    (draws,) each.
    """
    rates = []
    for kind in (~same, same):
        # no other reaches any threshold
        close = np.flatnonzero(kind & (scores >= thresholds.min()))
        accepted = np.zeros(len(thresholds))
        for start in range(0, len(close), PAIRS_AT_A_TIME):
            pairs = close[start : start + PAIRS_AT_A_TIME]
            reached = scores[pairs][:, None] >= thresholds
            accepted += (people.weights(pairs) * reached).sum(axis=0, dtype=np.int64)
        rates.append(accepted)
    with np.errstate(invalid="ignore", divide="ignore"):
        return rates[0] / weigh_impostors(same, people), rates[1] / weigh_genuines(same, people)


def weigh_genuines(same: np.ndarray, people: PairPeople) -> np.ndarray:
    """The weight of all genuine pairs in each draw, (draws,) float64."""
    pairs = np.bincount(people.first[same], minlength=len(people.counts))
    return pairs.astype(np.float64) @ people.counts


class _Corners(NamedTuple):
    """The corners of the ROC from the highest score down: the last genuine pair before the next
    impostor pair. No other threshold matters to a rate.
    """

    genuine: np.ndarray  # (G,) genuine pairs, scores falling
    impostor: np.ndarray  # (I,) impostor pairs, scores falling
    true_accepts: np.ndarray  # (K + 1,) genuine pairs down to a corner, 0 first
    false_accepts: np.ndarray  # (K + 1,) impostor pairs that score at least as high, 0 first


def _find_corners(scores: np.ndarray, same: np.ndarray) -> _Corners:
    genuine, impostor = np.flatnonzero(same), np.flatnonzero(~same)
    genuine = genuine[np.argsort(-scores[genuine], kind="stable")]
    impostor = impostor[np.argsort(-scores[impostor], kind="stable")]
    above = np.searchsorted(-scores[impostor], -scores[genuine], side="right")
    last = np.flatnonzero(np.append(above[1:] != above[:-1], True))
    return _Corners(genuine, impostor, np.append(0, last + 1), np.append(0, above[last]))


def _sweep(
    scores: np.ndarray,
    corners: _Corners,
    people: PairPeople,
    impostors: np.ndarray,
    cuts: Sequence[Cut],
) -> RateSamples:
    """Lower the threshold from corner to corner until every draw has passed every cut and its EER.

    ``impostors``: (draws,) their weight.
    """
    genuines = weigh_genuines(corners.genuine, people)
    # but for rounding
    limits = np.array([cut.rate for cut in cuts])[:, None] * impostors * (1 + 1e-9)
    accepted, chosen = np.zeros(limits.shape), np.zeros(limits.shape, int)
    eer, reached = np.ones(len(impostors)), np.zeros((1, len(impostors)))
    earlier = np.zeros((1, len(impostors)))
    for first, true, false in _walk(corners, people):
        with np.errstate(invalid="ignore", divide="ignore"):
            eer = np.minimum(eer, np.maximum(false / impostors, 1 - true / genuines).min(axis=0))
        drawn = np.diff(np.vstack([earlier, true]), axis=0) > 0
        earlier = true[-1:]
        # false accepts at the last corner that was drawn, of each corner and of the one before
        reached = np.maximum.accumulate(np.vstack([reached[-1:], false * drawn]))
        middle = (reached[:-1] + false) / 2
        number = np.arange(first, first + len(drawn))[:, None]
        for row, cut in enumerate(cuts):
            passed = drawn & ((middle if cut.nearest else false) <= limits[row])
            accepted[row] = np.maximum(accepted[row], (true * passed).max(axis=0))
            chosen[row] = np.maximum(chosen[row], (number * passed).max(axis=0))
        if (reached[-1] > np.maximum(limits.max(axis=0), eer * impostors)).all():
            break
    with np.errstate(invalid="ignore", divide="ignore"):
        rates = accepted / genuines
    empty = (genuines == 0) | (impostors == 0)
    rates[:, empty] = eer[empty] = np.nan
    return RateSamples(rates, _thresholds(scores, corners, people, chosen), eer)


def _walk(corners: _Corners, people: PairPeople) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Some corners at a time: the number of the first, and the weight of the genuine and of the
    impostor pairs down to each, (corners, draws) each.
    """
    true = false = np.zeros((1, people.counts.shape[1]))
    begin = 1
    while begin < len(corners.true_accepts):
        done = corners.true_accepts[begin - 1], corners.false_accepts[begin - 1]
        near = np.searchsorted(corners.false_accepts, done[1] + PAIRS_AT_A_TIME, side="right")
        part = slice(begin, max(begin + 1, int(near)))
        genuine, impostor = corners.genuine[done[0] :], corners.impostor[done[1] :]
        true = true[-1] + _add_up(people, genuine, corners.true_accepts[part] - done[0])
        false = false[-1] + _add_up(people, impostor, corners.false_accepts[part] - done[1])
        yield begin, true, false
        begin = part.stop


def _add_up(people: PairPeople, pairs: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(ends, draws): the weight of the first ``end`` pairs, for rising ends."""
    sums = np.zeros((len(ends), people.counts.shape[1]))
    before = np.zeros(people.counts.shape[1])
    for start in range(0, ends[-1], PAIRS_AT_A_TIME):
        stop = min(start + PAIRS_AT_A_TIME, ends[-1])
        weights = people.weights(pairs[start:stop])
        inside = slice(*np.searchsorted(ends, (start, stop), side="right"))
        if inside.start == inside.stop:
            before = before + weights.sum(axis=0, dtype=np.int32)
            continue
        added = np.cumsum(weights, axis=0, dtype=np.int32)
        sums[inside] = before + added[ends[inside] - start - 1]
        before = before + added[-1]
    return sums


def _thresholds(
    scores: np.ndarray, corners: _Corners, people: PairPeople, chosen: np.ndarray
) -> np.ndarray:
    """(cuts, draws): the lowest score of the drawn genuine pairs down to the ``chosen`` corners."""
    pair = np.maximum(corners.true_accepts[chosen] - 1, 0)
    draw = np.arange(chosen.shape[1])
    while True:
        person = people.first[corners.genuine[pair]]
        missed = (chosen > 0) & (people.counts[person, draw] == 0)
        if not missed.any():
            return np.where(chosen > 0, scores[corners.genuine[pair]], np.inf)
        pair -= missed


# --- searches in a gallery


def sample_ranks(ranks: np.ndarray, weights: np.ndarray, up_to: Sequence[int]) -> list[np.ndarray]:
    """The share of the probes with rank k or better in every draw, (draws,) for each k.

    ``ranks``: (P,); ``weights``: (P, draws) of the probes.
    """
    totals = weights.sum(axis=0, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return [weights[ranks <= k].sum(axis=0, dtype=np.float64) / totals for k in up_to]


# --- intervals


def interval(samples: np.ndarray) -> list[float] | None:
    """[low, high] that holds 95 % of the draws; None if none says anything."""
    known = samples[~np.isnan(samples)]
    if not len(known):
        return None
    # of the draws themselves: between infinite thresholds nothing can be interpolated
    return [float(limit) for limit in np.quantile(known, PERCENTILES, method="inverted_cdf")]


def with_intervals(figures: dict, samples: dict[str, np.ndarray]) -> dict:
    """The figures, each with ``k-95`` behind it where there are samples of it."""
    complete = {}
    for key, value in figures.items():
        complete[key] = value
        limits = interval(samples[key]) if key in samples else None
        if limits:
            complete[f"{key}-95"] = limits
    return complete


def subtract(
    figures: dict[str, float],
    samples: dict[str, np.ndarray],
    of_other: dict[str, float],
    samples_of_other: dict[str, np.ndarray],
) -> dict[str, Difference]:
    """How far the figures of one checkpoint lie above those of another on the same sets, from the
    same draws.
    """
    differences = {}
    for key in samples.keys() & samples_of_other.keys():
        with np.errstate(invalid="ignore"):
            limits = interval(samples[key] - samples_of_other[key])
        value = figures[key] - of_other[key]
        if limits and np.isfinite(value):
            differences[key] = Difference(value, *limits)
    return dict(sorted(differences.items()))
