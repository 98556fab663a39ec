"""The norm of a feature as the quality of its image, which AdaFace trains it to be: what rejecting
the images of the lowest norms does to FNMR.
"""

from typing import NamedTuple

import numpy as np
import torch

from eval.roc import Roc, resolves, threshold_at

# shares of the samples that are rejected
SHARES = np.linspace(0, 0.5, 51)
FMRS = (1e-2, 1e-3, 1e-4)
# genuine pairs that a rate needs
FEWEST_PAIRS = 30


class RejectCurves(NamedTuple):
    """The error-versus-discard characteristic of ISO/IEC 29794-1."""

    samples: str  # what is rejected: "images" or "templates"
    shares: np.ndarray  # (R,) of the samples that are rejected, from 0
    # {FMR: (R,) FNMR of the genuine pairs that are left, at the threshold that gives all pairs this
    # FMR; NaN where fewer than FEWEST_PAIRS are left}
    fnmr: dict[float, np.ndarray]


def mean_norms(plain: torch.Tensor, mirrored: torch.Tensor | None) -> np.ndarray:
    """(N,) mean norm of the features (N, D) of an image and of its mirror image."""
    norms = plain.norm(dim=1)
    return (norms if mirrored is None else (norms + mirrored.norm(dim=1)) / 2).numpy()


def mean_of_templates(norms: np.ndarray, templates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct templates, rising, and the mean norm of the images of each, (T,) both.

    ``norms``, ``templates``: (N,) of the images.
    """
    ids, template, counts = np.unique(templates, return_inverse=True, return_counts=True)
    return ids, np.bincount(template, norms) / counts


def error_versus_reject(
    samples: str,
    qualities: np.ndarray,
    genuine_scores: np.ndarray,
    genuine_qualities: np.ndarray,
    roc: Roc,
) -> RejectCurves:
    """FNMR when the samples of the lowest quality are rejected, and every pair with one of them.

    ``qualities``: (S,) of all samples; ``genuine_scores``: (G,) and ``genuine_qualities``: (G, 2)
    of the genuine pairs; ``roc``: of all pairs, which gives the thresholds. Without a curve where
    there are too few pairs.
    """
    cutoffs = np.sort(qualities)[(SHARES * len(qualities)).astype(int)]
    weaker = genuine_qualities.min(axis=1)

    def count_left(of_pairs: np.ndarray) -> np.ndarray:
        return len(of_pairs) - np.searchsorted(np.sort(of_pairs), cutoffs)

    left = count_left(weaker)
    fnmr = {}
    for fmr in FMRS:
        if resolves(fmr, roc.impostor) and left[0] >= FEWEST_PAIRS:
            errors = count_left(weaker[genuine_scores < threshold_at(roc, fmr)[0]])
            fnmr[fmr] = np.where(left < FEWEST_PAIRS, np.nan, errors / np.maximum(left, 1))
    return RejectCurves(samples, SHARES, fnmr)
