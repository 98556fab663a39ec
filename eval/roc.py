"""Curves that several benchmarks share: ROC of pairs (1:1 verification), ranks and CMC of probes
(1:N identification).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from utils.errors import InputError

FPRS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
PROBES_AT_A_TIME = 256  # against TinyFace's 157,871 gallery images: 160 MB of scores
# What float32 features resolve of a cosine: two that differ by no more are equal.
TIE = 2.0**-23
# Scores whose standard deviation is less than so many times their rounding, as those of an
# untrained network are, are all computed in float64: most would have to be computed again.
CROWDED = 32
# Gallery entries converted to float64 at a time: 32 MB.
GALLERY_AT_A_TIME = 8192


class Roc(NamedTuple):
    """(K,) float64 each, FPR rising: the share of impostor and of genuine pairs with score >=
    threshold; starts with (0, 0, inf).
    """

    fpr: np.ndarray
    tpr: np.ndarray
    thresholds: np.ndarray
    genuine: int  # pairs of the same person
    impostor: int


class Separation(NamedTuple):
    """How far apart the scores of genuine and impostor pairs lie."""

    # (B + 1,) of the histogram's bins, from the lowest to the highest score
    edges: np.ndarray
    genuine: np.ndarray  # (B,) pairs in each bin
    impostor: np.ndarray  # (B,)
    # (<= k,) indices of the impostor pairs with the highest scores, highest first
    false_accepts: np.ndarray
    # (<= k,) indices of the genuine pairs with the lowest scores, lowest first
    false_rejects: np.ndarray


class Search(NamedTuple):
    """What each probe found in a gallery, (P,) each; a mate is a gallery entry of the probe's
    subject.
    """

    # of the best mate, 1 = first: 1 + the non-mates that score at least as high; G + 1 where the
    # gallery has no mate
    ranks: np.ndarray
    mates: np.ndarray  # gallery index of the best mate, -1 where the gallery has none
    mate_scores: np.ndarray  # -inf where the gallery has none
    others: np.ndarray  # gallery index of the best non-mate, -1 where the gallery has none
    other_scores: np.ndarray  # -inf where the gallery has none


# --- pairs


def roc_curve(scores: np.ndarray, label: np.ndarray) -> Roc:
    """ROC of P pairs: the points that ``sklearn.metrics.roc_curve(label, scores)`` keeps with its
    defaults.

    ``scores``: (P,), higher for more alike; ``label``: (P,) 1 (or True) for the same person, else
    0. There is a point for each distinct score, except where the curve runs straight on from the
    point before to the one after. Raises InputError for unequal lengths, other labels, a score that
    is not finite, no genuine or no impostor pair.
    """
    scores, same = _check_pairs(scores, label)
    thresholds, true_accepts, false_accepts = _count_accepts(scores, same)
    kept = np.ones(len(thresholds), bool)
    kept[1:-1] = (np.diff(true_accepts, 2) != 0) | (np.diff(false_accepts, 2) != 0)
    genuine, impostor = int(true_accepts[-1]), int(false_accepts[-1])
    return Roc(
        np.append(0.0, false_accepts[kept] / impostor),
        np.append(0.0, true_accepts[kept] / genuine),
        np.append(np.inf, thresholds[kept].astype(np.float64)),
        genuine,
        impostor,
    )


def tpr_at(roc: Roc, fprs: tuple[float, ...] = FPRS) -> tuple[np.ndarray, np.ndarray]:
    """TPR (fractions) and threshold, (F,) each, at the points of the curve whose FPR is nearest to
    ``fprs``; of equally near ones the larger TPR.

    A threshold is infinite where nothing is accepted at that point.
    """
    last = len(roc.fpr) - 1
    # backwards: the first of equals has the largest TPR
    nearest = [last - int(np.argmin(np.abs(roc.fpr[::-1] - fpr))) for fpr in fprs]
    return roc.tpr[nearest], roc.thresholds[nearest]


def threshold_at(roc: Roc, fpr: float) -> tuple[float, float]:
    """(threshold, TPR) of the curve's last point whose FPR is at most ``fpr``; an infinite
    threshold accepts nobody.
    """
    last = int(np.searchsorted(roc.fpr, fpr * (1 + 1e-9), side="right")) - 1
    return float(roc.thresholds[last]), float(roc.tpr[last])


def error_figures(roc: Roc, unit: float = 1) -> dict[str, float]:
    """FNMR, the share of genuine pairs that are rejected, at FMRs of at most 1e-6 ... 1e-1, and
    the EER: the lowest rate that one threshold holds both errors down to.

    FMR and FNMR are ISO/IEC 19795-1's words for FPR and 1 - TPR of comparisons. ``unit``: 100 for
    percent.
    """
    figures = {
        f"fnmr_at_fmr_{fmr:g}": unit * (1 - threshold_at(roc, fmr)[1]) for fmr in reversed(FPRS)
    }
    figures["eer"] = unit * float(np.maximum(roc.fpr, 1 - roc.tpr).min())
    return figures


def resolves(fpr: float, impostor: int) -> bool:
    """Whether ``impostor`` pairs can show this FPR: at least one false accept is expected at it."""
    return fpr * impostor > 1 - 1e-9  # 1, but for rounding


def separate(scores: np.ndarray, label: np.ndarray, k: int = 12, bins: int = 100) -> Separation:
    """Histograms of the genuine and the impostor scores, and the k pairs of each kind that are
    hardest to tell apart.

    Arguments and errors as in ``roc_curve``. Of equal scores the pair that comes first counts as
    harder.
    """
    scores, same = _check_pairs(scores, label)
    low, high = scores.min(), scores.max()
    edges = np.linspace(
        *((low, high) if low < high else (low - 0.5, high + 0.5)), bins + 1, dtype=scores.dtype
    )
    genuine, impostor = np.flatnonzero(same), np.flatnonzero(~same)
    return Separation(
        edges,
        _histogram(scores[genuine], edges),
        _histogram(scores[impostor], edges),
        impostor[_smallest(-scores[impostor], k)],
        genuine[_smallest(scores[genuine], k)],
    )


def check_pair_labels(label: np.ndarray, pairs: int) -> np.ndarray:
    """(P,) bool.

    Raises InputError if there are not as many labels as pairs, if one is not 0 or 1, or if one of
    the two kinds is absent.
    """
    label = np.asarray(label)
    if label.shape != (pairs,):
        raise InputError(f"{pairs} pairs, but labels of shape {label.shape}: one a pair is needed")
    same = label == 1
    known = same | (label == 0)
    if not known.all():
        first = int(np.argmin(known))
        raise InputError(
            f"the label of pair {first} is {label[first]}: 1 (same person) or 0 is needed"
        )
    if not same.any() or same.all():
        kind = "impostor" if same.any() else "genuine"
        raise InputError(
            f"no {kind} pair among {pairs}: a ROC needs pairs of the same person "
            "(label 1) and of different people (label 0)"
        )
    return same


def _check_pairs(scores: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores = np.asarray(scores)
    scores = scores.astype(np.result_type(scores, np.float32), copy=False)
    if scores.ndim != 1:
        raise InputError(f"scores of shape {scores.shape}: one a pair is needed")
    same = check_pair_labels(label, len(scores))
    finite = np.isfinite(scores)
    if not finite.all():
        raise InputError(
            f"the score of pair {int(np.argmin(finite))} is not finite (NaN or infinite)"
        )
    return scores, same


def _count_accepts(
    scores: np.ndarray, same: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The K distinct scores, falling, and how many genuine and how many impostor pairs score at
    least that much, (K,) each.
    """
    rising = np.sort(scores)
    # where each distinct score begins
    first = np.flatnonzero(np.append(True, rising[1:] != rising[:-1]))
    distinct = rising[first]
    genuine = np.bincount(np.searchsorted(distinct, np.sort(scores[same])), minlength=len(distinct))
    true_accepts = np.cumsum(genuine[::-1])
    return distinct[::-1], true_accepts, (len(scores) - first)[::-1] - true_accepts


def _histogram(scores: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """``np.histogram(scores, edges)[0]`` by sorting, which is quicker for millions of float32."""
    below = np.searchsorted(np.sort(scores), edges)
    below[-1] = len(scores)  # the last bin holds its upper edge
    return np.diff(below)


def _smallest(values: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k smallest values (all if there are fewer), smallest first, of equals the
    first ones.
    """
    k = min(k, len(values))
    candidates = np.flatnonzero(values <= np.partition(values, k - 1)[k - 1]) if k else np.arange(0)
    return candidates[np.argsort(values[candidates], kind="stable")][:k]


# --- probes


def search(
    probes: np.ndarray,
    gallery: np.ndarray,
    probe_subjects: np.ndarray,
    gallery_subjects: np.ndarray,
) -> Search:
    """Compare every probe with every gallery entry by cosine.

    ``probes``: (P, D) and ``gallery``: (G, D) float32, of unit length; subjects: (P,) and (G,) int.
    A non-mate that scores as high as the best mate (within TIE) ranks before it: a network that
    gives every image the same feature finds nobody. Scores come from a float32 matrix product,
    whose rounding depends on the processor and on where in the matrix an entry lies; those that
    this rounding could put in another order are compared in float64, so ranks do not depend on it.
    """
    # A product of D terms of unit vectors is off by at most D u (u = eps / 2), the vectors' lengths
    # by as much; and two scores are compared.
    slack = 2 * probes.shape[1] * float(np.finfo(np.float32).eps)
    results = []
    for start in range(0, len(probes), PROBES_AT_A_TIME):
        part = slice(start, start + PROBES_AT_A_TIME)
        block = probes[part]
        scores = block @ gallery.T
        crowded = scores[0].std() < CROWDED * slack
        if crowded:
            scores = _cosines(block, gallery)
        for probe, row, subject in zip(block, scores, probe_subjects[part], strict=True):
            exactly = row.take if crowded else partial(_cosines_with, probe, gallery)
            results.append(
                _rank(row, gallery_subjects == subject, TIE if crowded else slack, exactly)
            )
    return Search(*map(np.array, zip(*results, strict=True)))


def cmc(ranks: np.ndarray, up_to: int) -> np.ndarray:
    """Cumulative match characteristic (up_to,).

    The fraction of probes whose mate is at rank 1, ... up_to or better.
    """
    return np.bincount(np.minimum(ranks, up_to + 1), minlength=up_to + 1)[
        1 : up_to + 1
    ].cumsum() / len(ranks)


def _rank(
    scores: np.ndarray,
    is_mate: np.ndarray,
    slack: float,
    exactly: Callable[[np.ndarray], np.ndarray],
) -> tuple[int, int, float, int, float]:
    """The fields of Search for one probe.

    ``scores``: (G,), overwritten, two of which compare rightly if they differ by more than
    ``slack``; ``is_mate``: (G,) bool; ``exactly``: gallery indices (n,) -> their scores in float64.
    """
    mate, mate_score, other, other_score = -1, -np.inf, -1, -np.inf
    mates = np.flatnonzero(is_mate)
    if len(mates):
        mate, mate_score = _best(mates[_close(scores[mates], slack)], exactly)
    scores[mates] = -np.inf
    if len(mates) < len(scores):
        other, other_score = _best(_close(scores, slack), exactly)
    before = np.count_nonzero(scores > mate_score + slack)
    if len(mates):
        in_doubt = np.flatnonzero((scores >= mate_score - slack) & (scores <= mate_score + slack))
        before += np.count_nonzero(exactly(in_doubt) >= mate_score - TIE)
    return 1 + before, mate, mate_score, other, other_score


def _close(scores: np.ndarray, slack: float) -> np.ndarray:
    """Indices of the scores that may be the highest."""
    return np.flatnonzero(scores >= float(scores.max()) - slack)


def _best(close: np.ndarray, exactly: Callable[[np.ndarray], np.ndarray]) -> tuple[int, float]:
    """(the first of the gallery indices ``close`` with the highest score, that score in
    float64).
    """
    exact = exactly(close)
    highest = float(exact.max())
    return close[np.argmax(exact >= highest - TIE)], highest


def _cosines(probes: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """(P, G) float64, whatever the lengths."""
    probes = _unit(probes)
    scores = np.empty((len(probes), len(gallery)))
    for start in range(0, len(gallery), GALLERY_AT_A_TIME):
        part = slice(start, start + GALLERY_AT_A_TIME)
        scores[:, part] = probes @ _unit(gallery[part]).T
    return scores


def _cosines_with(probe: np.ndarray, gallery: np.ndarray, entries: np.ndarray) -> np.ndarray:
    return _cosines(probe[None], gallery[entries])[0]


def _unit(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float64)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def check_norms(features: np.ndarray) -> np.ndarray:
    """L2 norm of each row, (N,).

    Raises InputError, naming the image, for one that is zero or not finite: it was not embedded, or
    wrongly.
    """
    norms = np.sqrt(np.einsum("nd,nd->n", features, features))
    wrong = ~np.isfinite(norms) | (norms == 0)
    if wrong.any():
        first = int(np.argmax(wrong))
        kind = "zero" if norms[first] == 0 else "not finite (NaN or infinite)"
        raise InputError(
            f"the feature of image {first} is {kind}: no usable feature for "
            f"{np.count_nonzero(wrong)} of {len(norms)} images"
        )
    return norms


def to_whole(values: np.ndarray) -> np.ndarray | None:
    """Whole numbers as int64, also those that are stored as floats; None if there are other
    values.
    """
    is_whole = (
        values.dtype.kind in "biu"
        or values.dtype.kind == "f"
        and bool(((np.abs(values) <= 2**53) & (values == np.rint(values))).all())
    )
    return values.astype(np.int64, copy=False) if is_whole else None
