"""IJB-B and IJB-C from given features: 1:1 verification of templates (three weighting variants) and
1:N identification.

A template is one or more images of a person; images of one media (a photograph, or the frames of a
video) share a media id. Its feature is the sum over its media of the mean feature within the media,
scaled to unit length; two templates compare by dot product. Following Whitelam et al., "IARPA Janus
Benchmark-B", 2017, Maze et al., "IARPA Janus Benchmark-C", 2018, and InsightFace's evaluation of
them, which weights features.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from eval.roc import (
    FPRS,
    TIE,
    Roc,
    check_labels,
    check_norms,
    cmc,
    roc_curve,
    search,
    to_whole,
    tpr_at,
)
from utils.errors import InputError

# What the feature of an image is multiplied by: Norm:True leaves its norm, which then acts as a
# weight; Det:True weights by the detector's score.
WEIGHTS = {
    "Norm:True_Det:True": lambda norms, faceness: faceness,
    "Norm:True_Det:False": lambda norms, faceness: np.ones_like(faceness),
    "Norm:False_Det:True": lambda norms, faceness: faceness / norms,
}
VARIANTS = tuple(WEIGHTS)
FARS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # false positive identification rates of 1:N
# of the score matrix: 95 MB against IJB-C's 23,124 templates
ROWS_AT_A_TIME = 1024
TABLE_SIZE = 2**24  # template ids that span no more are looked up in a table


class Identification(NamedTuple):
    """1:N search of the probes whose subject is in the gallery (mated) and of those whose subject
    is not, each in the order of their template ids.
    """

    ranks: np.ndarray  # (mated,) int, of the best mate; 1 = first
    mate_scores: np.ndarray  # (mated,) of the best mate
    non_mated_maxima: np.ndarray  # (non_mated,) the highest score of any gallery template


# --- 1:1
# --------------------------------------------------


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
    so on, the score to reach under ``…_thresh_at_fpr_0.0001`` (infinite where the TPR is 0 because
    an impostor pair scores highest). Raises InputError, naming what is wrong, for unequal lengths,
    a feature that is zero or not finite, a pair of a template without images, a template whose
    images cancel out, labels other than 0 and 1, no genuine or no impostor pair.
    """
    check_labels(label, len(p1))
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
    images = _check_images(embeddings, faceness_scores, templates, medias)
    p1, p2 = _check_ids("p1", p1), _check_ids("p2", p2)
    if len(p1) != len(p2) or not len(p1):
        raise InputError(
            f"{len(p1)} first and {len(p2)} second templates of pairs: as many of "
            "both, and at least one, are needed"
        )
    groups, first, second = _group_pairs(images, p1, p2)
    blocks = _cut_into_blocks(first, second, len(groups.ids))

    def score() -> Iterator[tuple[str, np.ndarray]]:
        for variant in VARIANTS:
            yield variant, _score_pairs(_pool(images, variant, groups), blocks, len(p1))

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
# --------------------------------------------------


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
    ``fars``; counts mated, non_mated. Errors: InputError, as in ``evaluate`` and ``identify``.
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
    images = _check_images(embeddings, faceness_scores, templates, medias)
    probe_ids, probe_subjects = list_templates("the probe list", probe_templates, probe_subjects)
    gallery_ids, gallery_subjects = list_templates(
        "the gallery list", gallery_templates, gallery_subjects
    )
    probes = _pool(images, "Norm:True_Det:True", _group_images(images, probe_ids, "the probe list"))
    gallery = _pool(
        images, "Norm:True_Det:True", _group_images(images, gallery_ids, "the gallery list")
    )
    found = search(probes, gallery, probe_subjects, gallery_subjects)
    mated = found.mates >= 0
    check_mated(mated)
    return Identification(found.ranks[mated], found.mate_scores[mated], found.other_scores[~mated])


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
    """Errors: InputError unless of the probe templates, ``mated`` (P,) bool, some have their
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

    Errors: InputError for a template with two; ``name``: the list's, for messages.
    """
    ids, subjects = (
        _check_ids(f"{name}'s templates", ids),
        _check_ids(f"{name}'s subjects", subjects),
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


# --- images to templates
# --------------------------------------------------


class Images(NamedTuple):
    """The N images of a set, checked."""

    embeddings: np.ndarray  # (N, D) float32
    norms: np.ndarray  # (N,) float32, none is 0
    faceness: np.ndarray  # (N,) float32
    templates: np.ndarray  # (N,) int64
    medias: np.ndarray  # (N,) int64


class Groups(NamedTuple):
    """Which images make up which template."""

    ids: np.ndarray  # (T,) template ids
    images: np.ndarray  # (M,) image indices, template after template
    starts: np.ndarray  # (T,) where each template's images begin
    media_sizes: np.ndarray  # (M,) how many images of the template are of this image's media


def _group_images(images: Images, ids: np.ndarray, asked_by: str) -> Groups:
    """Find the images of the templates ``ids``, which are distinct.

    Raises InputError for one without images; ``asked_by`` says who needs it.
    """
    order = np.argsort(ids)
    template = order[np.searchsorted(ids, images.templates, sorter=order).clip(max=len(ids) - 1)]
    members = np.flatnonzero(ids[template] == images.templates)
    members = members[np.lexsort((images.medias[members], template[members]))]
    template, media = template[members], images.medias[members]
    counts = np.bincount(template, minlength=len(ids))
    if not counts.all():
        raise InputError(f"{asked_by} names template {ids[np.argmin(counts)]}, which has no images")
    # a new one where template or media changes
    group = np.cumsum(np.append(False, (np.diff(template) != 0) | (np.diff(media) != 0)))
    return Groups(ids, members, np.cumsum(counts) - counts, np.bincount(group)[group])


def _pool(images: Images, variant: str, groups: Groups) -> np.ndarray:
    """Features of the templates, (T, D) float32 of unit length.

    The sum over media of the mean within a media is the sum over images of feature x weight / media
    size: one pass over the images, in any order.
    """
    weights = WEIGHTS[variant](images.norms, images.faceness)[groups.images] / groups.media_sizes
    pooled = torch.nn.functional.embedding_bag(
        torch.from_numpy(groups.images),
        _as_tensor(images.embeddings),
        torch.from_numpy(groups.starts),
        mode="sum",
        per_sample_weights=torch.from_numpy(weights.astype(np.float32)),
    ).numpy()
    lengths = np.linalg.norm(pooled, axis=1, keepdims=True)
    usable = np.isfinite(lengths) & (lengths > 0)
    if not usable.all():
        first = int(np.argmin(usable))
        raise InputError(
            f"{variant}: the weighted features of template {groups.ids[first]} add up "
            f"to a vector of length {lengths[first, 0]}, "
            "which has no direction"
        )
    return pooled / lengths


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        # a memory map; it is only read
        warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
        return torch.from_numpy(array)


# --- templates to scores
# --------------------------------------------------


def _group_pairs(
    images: Images, p1: np.ndarray, p2: np.ndarray
) -> tuple[Groups, np.ndarray, np.ndarray]:
    """The templates that occur in pairs, and where among them the two of each pair stand, (P,)
    int32 each.

    Those of ``p1`` come first: in IJB the few gallery templates, so that few rows of the score
    matrix are needed.
    """
    known = np.unique(images.templates)
    first, second = _find(p1, known), _find(p2, known)
    for ids, positions in ((p1, first), (p2, second)):
        if positions.min() < 0:
            pair = int(np.argmin(positions))
            raise InputError(f"pair {pair} names template {ids[pair]}, which has no images")
    place = np.full(len(known), 2)
    place[second] = 1
    place[first] = 0
    order = np.argsort(place, kind="stable")
    new = np.empty(len(known), np.int32)
    new[order] = np.arange(len(known))
    return (
        _group_images(images, known[order[: np.count_nonzero(place < 2)]], "a pair"),
        new[first],
        new[second],
    )


def _find(ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Position of each id in ``known``, which is sorted; -1 if it is not there."""
    low, high = int(known[0]), int(known[-1])
    span = high - low + 1
    if span > TABLE_SIZE:
        position = np.searchsorted(known, ids).clip(max=len(known) - 1)
        return np.where(known[position] == ids, position, -1)
    table = np.full(span + 1, -1, np.int32)
    table[known - low] = np.arange(len(known))
    return table[np.where((ids >= low) & (ids <= high), ids - low, span)]


def _cut_into_blocks(
    first: np.ndarray, second: np.ndarray, count: int
) -> list[tuple[slice, np.ndarray, np.ndarray]]:
    """Sort the pairs by blocks of rows of the (T, T) score matrix: for each block its rows, its
    pairs and their cells in it.

    The matrix is symmetric, so a pair is looked up above the diagonal, and a block starts at the
    diagonal.
    """
    row, column = np.minimum(first, second), np.maximum(first, second)
    block_of = row // ROWS_AT_A_TIME
    order = np.argsort(block_of.astype(np.uint16), kind="stable")  # 16 bits: a radix sort
    ends = np.cumsum(np.bincount(block_of, minlength=-(-count // ROWS_AT_A_TIME)))
    blocks = []
    for block, (begin, end) in enumerate(zip(np.append(0, ends), ends, strict=False)):
        if begin < end:
            start = block * ROWS_AT_A_TIME
            pairs = order[begin:end]
            blocks.append(
                (
                    slice(start, start + ROWS_AT_A_TIME),
                    pairs,
                    (row[pairs] - start) * (count - start) + column[pairs] - start,
                )
            )
    return blocks


def _score_pairs(
    features: np.ndarray, blocks: list[tuple[slice, np.ndarray, np.ndarray]], pairs: int
) -> np.ndarray:
    """Dot product of the two templates of each pair, (P,) float32.

    Matrix products of all with all cost less than fetching two rows for each pair, of which IJB-C
    has 700 a template.
    """
    scores = np.empty(pairs, np.float32)
    for rows, chosen, cells in blocks:
        scores[chosen] = (features[rows] @ features[rows.start :].T).reshape(-1)[cells]
    return scores


# --- input
# --------------------------------------------------


def _check_images(
    embeddings: np.ndarray, faceness_scores: np.ndarray, templates: np.ndarray, medias: np.ndarray
) -> Images:
    embeddings, faceness = (
        np.ascontiguousarray(embeddings, np.float32),
        np.asarray(faceness_scores, np.float32),
    )
    if embeddings.ndim != 2 or not len(embeddings):
        raise InputError(f"embeddings of shape {embeddings.shape}: a row for each image is needed")
    for name, array in (
        ("faceness_scores", faceness),
        ("templates", np.asarray(templates)),
        ("medias", np.asarray(medias)),
    ):
        if array.shape != (len(embeddings),):
            raise InputError(
                f"{name} of shape {array.shape} do not fit {len(embeddings)} "
                "embeddings: one an image is needed"
            )
    if not np.isfinite(faceness).all():
        raise InputError(
            f"the detector score of image {int(np.argmin(np.isfinite(faceness)))} is "
            "not finite (NaN or infinite)"
        )
    return Images(
        embeddings,
        check_norms(embeddings),
        faceness,
        _check_ids("templates", templates),
        _check_ids("medias", medias),
    )


def _check_ids(name: str, ids: np.ndarray) -> np.ndarray:
    ids = np.asarray(ids)
    whole = to_whole(ids)
    if ids.ndim != 1 or whole is None:
        raise InputError(
            f"{name} of shape {ids.shape} and type {ids.dtype}: a row of whole numbers is needed"
        )
    return whole
