"""What the page of a checkpoint shows of each kind of test set, from what was measured on it."""

import numpy as np

from eval import ijb, tinyface
from eval.quality import error_versus_reject, mean_of_templates
from eval.report.html_report import PairExhibit, RankExhibit, Strip
from eval.roc import cmc, separate
from eval.sets.ijb import IJBSet
from eval.uncertainty import ErrorRates

CMC_RANKS = 50
# searches of TinyFace that a page shows
MISSES = 8
# of the TPIR curve
CURVE_FARS = np.geomspace(1e-4, 1, 50)


def exhibit_pairs(
    test_set, scores: np.ndarray, rates: ErrorRates, norms: np.ndarray
) -> PairExhibit:
    """``test_set``: a PairTestSet of N pairs; ``scores``: (N,); ``norms``: (2N,) of the images."""
    same = test_set.issame
    rejects = error_versus_reject(
        "images", norms, scores[same], norms.reshape(-1, 2)[same], rates.roc
    )
    return PairExhibit(
        test_set.name,
        {"cosine": rates.roc},
        separate(scores, same),
        images=lambda pair: (test_set.images[2 * pair], test_set.images[2 * pair + 1]),
        captions=lambda pair: f"pair {pair}",
        score_name="cosine similarity",
        scores_of=lambda pair: float(scores[pair]),
        intervals=rates.at_far,
        rejects=rejects,
    )


def exhibit_templates(
    name: str,
    data: IJBSet,
    rates: dict[str, ErrorRates],
    scores: np.ndarray,
    norms: np.ndarray,
) -> PairExhibit:
    """``rates``: of each variant; ``scores``: (P,) of the first; ``norms``: (N,) of the images."""
    rocs = {variant: of_variant.roc for variant, of_variant in rates.items()}
    same = data.label == 1
    templates, qualities = mean_of_templates(norms, data.templates)
    genuine = np.stack([data.p1[same], data.p2[same]], axis=1)
    rejects = error_versus_reject(
        "templates",
        qualities,
        scores[same],
        qualities[np.searchsorted(templates, genuine)],
        rocs[ijb.VARIANTS[0]],
    )

    def best_image(template: int) -> np.ndarray:
        """Of the template the image that the face detector was surest of."""
        members = np.flatnonzero(data.templates == template)
        return data.images[int(members[data.faceness_scores[members].argmax()])]

    return PairExhibit(
        name,
        rocs,
        separate(scores, data.label),
        images=lambda pair: (best_image(data.p1[pair]), best_image(data.p2[pair])),
        captions=lambda pair: f"templates {data.p1[pair]} and {data.p2[pair]}",
        score_name=f"score, {ijb.VARIANTS[0]}",
        scores_of=lambda pair: float(scores[pair]),
        intervals=next(iter(rates.values())).at_far,
        rejects=rejects,
    )


def exhibit_searches(name: str, searches: dict[str, ijb.Identification]) -> RankExhibit:
    """``searches``: of each gallery."""
    cmc_curves, tpir_curves = {}, {}
    for gallery, search in searches.items():
        tpir = ijb.identification_figures(search, CURVE_FARS)["tpir"]
        cmc_curves[gallery] = cmc(search.ranks, CMC_RANKS)
        tpir_curves[gallery] = (CURVE_FARS, np.array(tpir))
    return RankExhibit(name, cmc_curves, tpir_curves)


def exhibit_ranking(name: str, images, ranking: tinyface.Ranking) -> RankExhibit:
    """``images``: of the set, in the order that the ranking counts them."""
    curves = {name: cmc(ranking.ranks, CMC_RANKS)}
    return RankExhibit(name, curves, {}, list_misses(images, ranking))


def list_misses(images, ranking: tinyface.Ranking) -> list[Strip]:
    """The probes whose mate came last: the probe, the wrong image that came first, the mate."""
    missed = np.flatnonzero((ranking.ranks > 1) & (ranking.ranks != tinyface.NO_MATE))
    worst_first = missed[np.argsort(-ranking.ranks[missed], kind="stable")]
    strips = []
    for probe in worst_first[:MISSES]:
        image = int(ranking.probes[probe])
        shown = [images[int(index)] for index in (image, *ranking.hardest[probe])]
        rank = ranking.ranks[probe]
        strips.append((shown, f"{images.name_of(image)}: wrong first, mate at rank {rank}"))
    return strips
