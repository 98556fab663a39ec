"""Evaluation the plain way, as published evaluators do it: loops over templates, media, pairs,
probes, thresholds and folds. For comparison only.
"""

from pathlib import Path

import numpy as np
from sklearn.metrics import roc_curve

from eval import ijb
from eval.roc import FPRS


def verification(embeddings: np.ndarray, issame: np.ndarray) -> dict:
    """Ten folds; every one of 400 thresholds on every training fold, and of 4,000 for the true
    accept rate at FAR 1e-3.
    """
    distances = np.sum(np.square(embeddings[0::2] - embeddings[1::2]), axis=1)
    coarse, fine = np.arange(0, 4, 0.01), np.arange(0, 4, 0.001)
    pairs = np.arange(len(issame))
    accuracies, vals = [], []
    for fold in np.array_split(pairs, 10):
        training = np.setdiff1d(pairs, fold)
        known, same = distances[training], issame[training]
        correct = [accuracy_at(threshold, known, same) for threshold in coarse]
        best = coarse[np.argmax(correct)]
        accuracies.append(accuracy_at(best, distances[fold], issame[fold]))
        rates = np.array([far_at(threshold, known, same) for threshold in fine])
        threshold = fine[np.nonzero(rates <= 1e-3)[0][-1]]
        vals.append(np.sum((distances[fold] < threshold) & issame[fold]) / np.sum(issame[fold]))
    return {"accuracy": np.array(accuracies), "val": np.mean(vals)}


def accuracy_at(threshold: float, distances: np.ndarray, issame: np.ndarray) -> float:
    accepted = distances < threshold
    true_accepts = np.sum(np.logical_and(accepted, issame))
    true_rejects = np.sum(np.logical_and(np.logical_not(accepted), np.logical_not(issame)))
    return float(true_accepts + true_rejects) / len(issame)


def far_at(threshold: float, distances: np.ndarray, issame: np.ndarray) -> float:
    impostors = np.logical_not(issame)
    return np.sum(np.logical_and(distances < threshold, impostors)) / np.sum(impostors)


def intervals(variants: list, issame: np.ndarray, first, second, counts) -> dict:
    """FNMR at six FMRs in every draw, each by a ROC of all pairs with their weights."""
    figures = {}
    for variant, scores in enumerate(variants):
        draws = []
        for count in counts.T.astype(float):
            weights = np.where(issame, count[first], count[first] * count[second])
            fpr, tpr, _ = roc_curve(issame, scores, sample_weight=weights)
            draws.append([1 - tpr[fpr <= fmr * (1 + 1e-9)][-1] for fmr in FPRS])
        for fmr, of_draws in zip(FPRS, np.transpose(draws), strict=True):
            figures[f"variant {variant} fnmr_at_fmr_{fmr:g}"] = of_draws
    return figures


def template_features(
    embeddings: np.ndarray, templates: np.ndarray, medias: np.ndarray, ids: np.ndarray
) -> np.ndarray:
    features = np.zeros((len(ids), embeddings.shape[1]))
    for row, template in enumerate(ids):
        members = np.where(templates == template)[0]
        for media in np.unique(medias[members]):
            features[row] += embeddings[members[medias[members] == media]].mean(axis=0)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def ijb_1to1(embeddings, faceness_scores, templates, medias, label, p1, p2) -> dict:
    figures = {}
    for variant in ijb.VARIANTS:
        weighted = embeddings
        if "Norm:False" in variant:
            weighted = weighted / np.linalg.norm(weighted, axis=1, keepdims=True)
        if "Det:True" in variant:
            weighted = weighted * faceness_scores[:, None]
        ids = np.unique(templates)
        features = template_features(weighted, templates, medias, ids)
        row = np.zeros(ids.max() + 1, int)
        row[ids] = np.arange(len(ids))
        scores = np.zeros(len(p1))
        for start in range(0, len(p1), 100_000):
            part = slice(start, start + 100_000)
            scores[part] = np.sum(features[row[p1[part]]] * features[row[p2[part]]], axis=1)
        fpr, tpr, thresholds = (column[::-1] for column in roc_curve(label, scores))
        for far in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
            nearest = np.argmin(abs(fpr - far))
            figures[f"{variant}_tpr_at_fpr_{far}"] = 100 * tpr[nearest]
            figures[f"{variant}_thresh_at_fpr_{far}"] = thresholds[nearest]
    return figures


def ijb_1ton(
    embeddings,
    faceness_scores,
    templates,
    medias,
    gallery,
    gallery_subjects,
    probes,
    probe_subjects,
) -> dict:
    weighted = embeddings * faceness_scores[:, None]
    probe_features = template_features(weighted, templates, medias, probes)
    gallery_features = template_features(weighted, templates, medias, gallery)
    scores = probe_features @ gallery_features.T
    ranks, mates, others, maxima = [], [], [], []
    for row, subject in zip(scores, probe_subjects, strict=True):
        falling = np.argsort(-row)
        is_mate = gallery_subjects[falling] == subject
        if is_mate.any():
            ranks.append(np.where(is_mate)[0][0] + 1)
            mates.append(row[falling[is_mate]][0])
            others.append(row[falling[~is_mate]][0])
        else:
            maxima.append(row[falling[0]])
    ranks, mates, others = np.array(ranks), np.array(mates), np.array(others)
    maxima.sort(reverse=True)
    thresholds = [maxima[max(int(len(maxima) * far) - 1, 0)] for far in ijb.FARS]
    return {
        "top1": np.mean(ranks <= 1),
        "top5": np.mean(ranks <= 5),
        "top10": np.mean(ranks <= 10),
        "thresholds": thresholds,
        "tpir": [np.mean((mates > threshold) & (mates > others)) for threshold in thresholds],
        "mated": len(ranks),
        "non_mated": len(maxima),
    }


def tinyface(features: np.ndarray, paths: list[str], meta: dict) -> dict:
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    by_key = {Path(path).stem: feature for path, feature in zip(paths, features, strict=True)}
    named = meta["probe_paths"] + meta["gallery_paths"]
    person = {path: int(Path(path).name.split("_")[0]) for path in named}
    gallery = meta["gallery_paths"] + meta["distractor_paths"]
    of_gallery = np.array([person.get(path, -100) for path in gallery])
    probe_features = np.stack([by_key[Path(path).stem] for path in meta["probe_paths"]])
    gallery_features = np.stack([by_key[Path(path).stem] for path in gallery])
    ranks = []
    for path, row in zip(meta["probe_paths"], probe_features @ gallery_features.T, strict=True):
        is_mate = of_gallery[np.argsort(-row)] == person[path]
        ranks.append(np.where(is_mate)[0][0] + 1)
    return {f"rank-{rank}": 100 * np.mean(np.array(ranks) <= rank) for rank in (1, 5, 20)}
