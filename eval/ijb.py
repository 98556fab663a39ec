"""IJB-B and IJB-C from given features: 1:1 verification of templates (three weighting variants) and
1:N identification.

A template is one or more images of a person; images of one media (a photograph, or the frames of a
video) share a media id. Its feature is the sum over its media of the mean feature within the media,
scaled to unit length; two templates compare by dot product. Following Whitelam et al., "IARPA Janus
Benchmark-B", 2017, Maze et al., "IARPA Janus Benchmark-C", 2018, and InsightFace's evaluation of
them, which weights features.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from eval.bootstrap import sample_ranks
from eval.ijb_templates import (
    WEIGHTS,
    check_ids,
    check_images,
    cut_into_blocks,
    group_images,
    group_pairs,
    pool,
    score_pairs,
)
from eval.roc import FPRS, TIE, Roc, check_pair_labels, cmc, roc_curve, search, tpr_at
from utils.errors import InputError

VARIANTS = tuple(WEIGHTS)
FARS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # false positive identification rates of 1:N


class Identification(NamedTuple):
    """1:N search of the probes whose subject is in the gallery (mated) and of those whose subject
    is not, each in the order of their template ids.
    """

    ranks: np.ndarray  # (mated,) int, of the best mate; 1 = first
    mate_scores: np.ndarray  # (mated,) of the best mate
    non_mated_maxima: np.ndarray  # (non_mated,) the highest score of any gallery template


# --- 1:1


def evaluate(
    embeddings: np.ndarray,
    faceness_scores: np.ndarray,
    templates: np.ndarray,
    medias: np.ndarray,
    label: np.ndarray,
    p1: np.ndarray,
    p2: np.ndarray,
) -> dict[str, float]:
    """TPR at six FPRs and their thresholds in the three variants.

    ``embeddings``: (N, D) float32, not normalised, both flips added; ``faceness_scores``: (N,)
    detector scores; ``templates``, ``medias``: (N,) ids (whole numbers of any type), a media id
    counting within its template; ``p1``, ``p2``: (P,) template ids of the pairs; ``label``: (P,) 1
    for the same person, else 0. Returns percent under ``Norm:True_Det:True_tpr_at_fpr_0.0001`` and
    so on, the score to reach under ``..._thresh_at_fpr_0.0001`` (infinite where the TPR is 0
    because an impostor pair scores highest). Raises InputError, naming what is wrong, for unequal
    lengths, a feature that is zero or not finite, a pair of a template without images, a template
    whose images cancel out, labels other than 0 and 1, no genuine or no impostor pair.
    """
    check_pair_labels(label, len(p1))
    results = {}
    for variant, scores in compare(embeddings, faceness_scores, templates, medias, p1, p2):
        results |= figures(variant, roc_curve(scores, label))
    return results


def compare(
    embeddings: np.ndarray,
    faceness_scores: np.ndarray,
    templates: np.ndarray,
    medias: np.ndarray,
    p1: np.ndarray,
    p2: np.ndarray,
) -> Iterator[tuple[str, np.ndarray]]:
    """Score the pairs in each variant, one variant at a time: yields (variant, (P,) float32).

    Arguments and errors as in ``evaluate``.
    """
    images = check_images(embeddings, faceness_scores, templates, medias)
    p1, p2 = check_ids("p1", p1), check_ids("p2", p2)
    if len(p1) != len(p2) or not len(p1):
        raise InputError(
            f"{len(p1)} first and {len(p2)} second templates of pairs: as many of "
            "both, and at least one, are needed"
        )
    groups, first, second = group_pairs(images, p1, p2)
    blocks = cut_into_blocks(first, second, len(groups.ids))

    def score() -> Iterator[tuple[str, np.ndarray]]:
        for variant in VARIANTS:
            yield variant, score_pairs(pool(images, variant, groups), blocks, len(p1))

    # a generator of its own, so that wrong input is refused by the call and not by the first step
    return score()


def figures(variant: str, roc: Roc) -> dict[str, float]:
    """The twelve figures that ``evaluate`` gives for a variant."""
    results = {}
    for fpr, tpr, threshold in zip(FPRS, *tpr_at(roc), strict=True):
        results[f"{variant}_tpr_at_fpr_{fpr}"] = 100 * float(tpr)
        results[f"{variant}_thresh_at_fpr_{fpr}"] = float(threshold)
    return results


# --- 1:N


def evaluate_1n(
    embeddings: np.ndarray,
    faceness_scores: np.ndarray,
    templates: np.ndarray,
    medias: np.ndarray,
    gallery_templates: np.ndarray,
    gallery_subjects: np.ndarray,
    probe_templates: np.ndarray,
    probe_subjects: np.ndarray,
    fars: Sequence[float] = FARS,
) -> dict:
    """Search one gallery for every probe template, features weighted as in Norm:True_Det:True.

    The lists give (template, subject) ids in rows that may repeat (the protocol's files have a row
    for each image); a subject may have several templates in the gallery, of which the best counts.
    The other arguments are those of ``evaluate``. Returns fractions top1, top5, top10 of the mated
    probes (those whose subject is in the gallery); tpir and thresholds, a value for each of
    ``fars``; counts mated, non_mated. Raises InputError, as in ``evaluate`` and ``identify``.
    """
    return identification_figures(
        identify(
            embeddings,
            faceness_scores,
            templates,
            medias,
            gallery_templates,
            gallery_subjects,
            probe_templates,
            probe_subjects,
        ),
        fars,
    )


def identify(
    embeddings: np.ndarray,
    faceness_scores: np.ndarray,
    templates: np.ndarray,
    medias: np.ndarray,
    gallery_templates: np.ndarray,
    gallery_subjects: np.ndarray,
    probe_templates: np.ndarray,
    probe_subjects: np.ndarray,
) -> Identification:
    """Ranks and scores behind ``evaluate_1n``, same arguments.

    Raises InputError also for a listed template without images or with two subjects, an empty list,
    no mated or no non-mated probe.
    """
    images = check_images(embeddings, faceness_scores, templates, medias)
    probe_ids, probe_subjects = list_templates("the probe list", probe_templates, probe_subjects)
    gallery_ids, gallery_subjects = list_templates(
        "the gallery list", gallery_templates, gallery_subjects
    )
    probes = pool(images, "Norm:True_Det:True", group_images(images, probe_ids, "the probe list"))
    gallery = pool(
        images, "Norm:True_Det:True", group_images(images, gallery_ids, "the gallery list")
    )
    hits = search(probes, gallery, probe_subjects, gallery_subjects)
    mated = hits.mates >= 0
    check_mated(mated)
    return Identification(hits.ranks[mated], hits.mate_scores[mated], hits.other_scores[~mated])


def identification_figures(identification: Identification, fars: Sequence[float] = FARS) -> dict:
    """The dict of ``evaluate_1n``."""
    top = cmc(identification.ranks, 10)
    thresholds = np.array([_threshold_at(identification.non_mated_maxima, far) for far in fars])
    return {
        "top1": float(top[0]),
        "top5": float(top[4]),
        "top10": float(top[9]),
        "tpir": tpir_at(identification, thresholds),
        "thresholds": thresholds,
        "mated": len(identification.ranks),
        "non_mated": len(identification.non_mated_maxima),
    }


def choose(
    identification: Identification, mated: np.ndarray, non_mated: np.ndarray
) -> Identification:
    """Of some probes, by masks."""
    ranks, mate_scores, maxima = identification
    return Identification(ranks[mated], mate_scores[mated], maxima[non_mated])


def sample_identification(
    identification: Identification,
    mated_weights: np.ndarray,
    non_mated_weights: np.ndarray,
    fars: Sequence[float] = FARS,
) -> dict:
    """The rates and thresholds of ``evaluate_1n`` in every draw of people, (draws,) each; weights:
    (mated, draws) and (non_mated, draws).
    """
    ranks, mate_scores, maxima = identification
    top = sample_ranks(ranks, mated_weights, (1, 5, 10))
    hits = np.flatnonzero(ranks == 1)
    hits = hits[np.argsort(-mate_scores[hits], kind="stable")]
    draws = np.arange(mated_weights.shape[1])
    hit_weights = np.cumsum(mated_weights[hits], axis=0, dtype=np.int64)
    hit_weights = np.vstack([np.zeros((1, len(draws)), int), hit_weights])
    falling = np.argsort(-maxima, kind="stable")
    above = np.cumsum(non_mated_weights[falling], axis=0, dtype=np.int64)
    mated = mated_weights.sum(axis=0, dtype=np.float64)
    tpir, thresholds = [], []
    for far in fars:
        # as _threshold_at chooses among the maxima that were drawn
        needed = np.maximum((above[-1] * far).astype(int), 1)
        position = (above < needed).sum(axis=0)
        threshold = np.append(maxima[falling], np.nan)[position]
        accepted = np.searchsorted(-mate_scores[hits], -(threshold + TIE), side="left")
        with np.errstate(invalid="ignore"):
            rate = hit_weights[accepted, draws] / mated
        tpir.append(np.where(np.isnan(threshold), np.nan, rate))
        thresholds.append(threshold)
    return dict(top1=top[0], top5=top[1], top10=top[2], tpir=tpir, thresholds=thresholds)


def tpir_at(identification: Identification, thresholds: np.ndarray) -> np.ndarray:
    """True positive identification rate at each threshold: the fraction of mated probes whose mate
    scores above it and above every non-mate.

    Above is by more than TIE: a mate that scores as high as a non-mate, or as the threshold, is no
    hit.
    """
    hits = np.sort(identification.mate_scores[identification.ranks == 1])
    return (len(hits) - np.searchsorted(hits, np.asarray(thresholds) + TIE, side="right")) / len(
        identification.ranks
    )


def _threshold_at(non_mated_maxima: np.ndarray, far: float) -> float:
    if not 0 < far <= 1:
        raise InputError(
            f"a false positive identification rate of {far}: it lies above 0 and at most at 1"
        )
    falling = np.sort(non_mated_maxima)[::-1]
    return float(falling[max(int(len(falling) * far) - 1, 0)])


def check_mated(mated: np.ndarray, where: str = "") -> None:
    """Raises InputError unless of the probe templates, ``mated`` (P,) bool, some have their
    subject in the gallery and some have not.
    """
    if not mated.any() or mated.all():
        raise InputError(
            f"{where}{'every' if mated.any() else 'no'} probe's subject is in the "
            f"gallery: of {len(mated)} probe templates some must be mated "
            "(for the ranks) and some not (for the thresholds)"
        )


def list_templates(
    name: str, ids: np.ndarray, subjects: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The distinct templates of a list, rising, and the subject of each.

    Raises InputError for a template with two; ``name``: the list's, for messages.
    """
    ids, subjects = (
        check_ids(f"{name}'s templates", ids),
        check_ids(f"{name}'s subjects", subjects),
    )
    if len(ids) != len(subjects) or not len(ids):
        raise InputError(
            f"{name} has {len(ids)} templates and {len(subjects)} subjects: as many "
            "of both, and at least one, are needed"
        )
    distinct, first, row = np.unique(ids, return_index=True, return_inverse=True)
    other = subjects != subjects[first][row]
    if other.any():
        at = int(np.argmax(other))
        raise InputError(
            f"{name} gives template {ids[at]} two subjects, "
            f"{subjects[first][row[at]]} and {subjects[at]}"
        )
    return distinct, subjects[first]
