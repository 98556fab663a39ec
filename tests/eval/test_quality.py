"""Error versus reject against a loop over pairs."""

import numpy as np
import torch

from eval.quality import FEWEST_PAIRS, error_versus_reject, mean_norms, mean_of_templates
from eval.roc import roc_curve, threshold_at


def test_error_versus_reject_against_a_loop():
    random = np.random.default_rng(0)
    qualities = random.permutation(2000).astype(float)
    pairs = random.integers(0, 2000, (1000, 2))
    same = np.arange(1000) < 400
    # a bad image makes a bad genuine score
    is_bad = qualities[pairs].min(axis=1) < 500
    scores = same * (4 - 3 * is_bad) + random.standard_normal(1000)
    roc = roc_curve(scores, same)
    genuine = pairs[same]
    curves = error_versus_reject("images", qualities, scores[same], qualities[genuine], roc)
    # 600 impostor pairs show no FMR of 1e-3
    assert curves.samples == "images" and list(curves.fnmr) == [1e-2]
    threshold = threshold_at(roc, 1e-2)[0]
    for share, rate in zip(curves.shares, curves.fnmr[1e-2], strict=True):
        kept = set(np.argsort(qualities)[int(share * 2000) :])
        left = [
            score
            for (first, second), score in zip(genuine, scores[same], strict=True)
            if first in kept and second in kept
        ]
        if len(left) < FEWEST_PAIRS:
            assert np.isnan(rate)
        else:
            assert rate == np.mean(np.array(left) < threshold)
    assert curves.shares[0] == 0 and curves.fnmr[1e-2][0] == 1 - threshold_at(roc, 1e-2)[1]
    assert np.nanmin(curves.fnmr[1e-2]) < 0.7 * curves.fnmr[1e-2][0]


def test_too_few_pairs_show_nothing():
    scores, same = np.arange(200.0), np.arange(200) >= 190
    curves = error_versus_reject(
        "images", np.arange(400.0), scores[same], np.ones((10, 2)), roc_curve(scores, same)
    )
    assert curves.fnmr == {}


def test_norms():
    plain, mirrored = torch.eye(3) * 2, torch.eye(3) * 4
    np.testing.assert_array_equal(mean_norms(plain, mirrored), [3, 3, 3])
    np.testing.assert_array_equal(mean_norms(plain, None), [2, 2, 2])
    ids, means = mean_of_templates(np.array([1.0, 5.0, 3.0]), np.array([7, 2, 7]))
    assert ids.tolist() == [2, 7] and means.tolist() == [5, 2]
