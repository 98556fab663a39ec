"""From image features to the templates of IJB, and from pairs of templates to scores: what the two
protocols of eval/ijb.py share.
"""

import warnings
from typing import NamedTuple

import numpy as np
import torch

from eval.roc import check_norms, to_whole
from utils.errors import InputError

# What the feature of an image is multiplied by: Norm:True leaves its norm, which then acts as a
# weight; Det:True weights by the detector's score.
WEIGHTS = {
    "Norm:True_Det:True": lambda norms, faceness: faceness,
    "Norm:True_Det:False": lambda norms, faceness: np.ones_like(faceness),
    "Norm:False_Det:True": lambda norms, faceness: faceness / norms,
}
# of the score matrix: 95 MB against IJB-C's 23,124 templates
ROWS_AT_A_TIME = 1024
TABLE_SIZE = 2**24  # template ids that span no more are looked up in a table


# --- images to templates


class ImageFeatures(NamedTuple):
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


def group_images(images: ImageFeatures, ids: np.ndarray, asked_by: str) -> Groups:
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


def pool(images: ImageFeatures, variant: str, groups: Groups) -> np.ndarray:
    """Features of the templates, (T, D) float32 of unit length.

    The sum over media of the mean within a media is the sum over images of feature x weight / media
    size: one pass over the images, in any order.
    """
    weights = WEIGHTS[variant](images.norms, images.faceness)[groups.images] / groups.media_sizes
    pooled = torch.nn.functional.embedding_bag(
        torch.from_numpy(groups.images),
        as_tensor(images.embeddings),
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


def as_tensor(array: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        # a memory map; it is only read
        warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
        return torch.from_numpy(array)


# --- templates to scores


def group_pairs(
    images: ImageFeatures, p1: np.ndarray, p2: np.ndarray
) -> tuple[Groups, np.ndarray, np.ndarray]:
    """The templates that occur in pairs, and where among them the two of each pair stand, (P,)
    int32 each.

    Those of ``p1`` come first: in IJB the few gallery templates, so that few rows of the score
    matrix are needed.
    """
    known = np.unique(images.templates)
    first, second = find_positions(p1, known), find_positions(p2, known)
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
        group_images(images, known[order[: np.count_nonzero(place < 2)]], "a pair"),
        new[first],
        new[second],
    )


def find_positions(ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Position of each id in ``known``, which is sorted; -1 if it is not there."""
    low, high = int(known[0]), int(known[-1])
    span = high - low + 1
    if span > TABLE_SIZE:
        position = np.searchsorted(known, ids).clip(max=len(known) - 1)
        return np.where(known[position] == ids, position, -1)
    table = np.full(span + 1, -1, np.int32)
    table[known - low] = np.arange(len(known))
    return table[np.where((ids >= low) & (ids <= high), ids - low, span)]


def cut_into_blocks(
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


def score_pairs(
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


def check_images(
    embeddings: np.ndarray, faceness_scores: np.ndarray, templates: np.ndarray, medias: np.ndarray
) -> ImageFeatures:
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
    return ImageFeatures(
        embeddings,
        check_norms(embeddings),
        faceness,
        check_ids("templates", templates),
        check_ids("medias", medias),
    )


def check_ids(name: str, ids: np.ndarray) -> np.ndarray:
    ids = np.asarray(ids)
    whole = to_whole(ids)
    if ids.ndim != 1 or whole is None:
        raise InputError(
            f"{name} of shape {ids.shape} and type {ids.dtype}: a row of whole numbers is needed"
        )
    return whole
