"""The sets a network is measured on, alike to those who run them: pair sets, IJB and TinyFace.

A benchmark has ``kind`` ("verification", "ijb", "tinyface": the key of its figures in a report),
``name``, ``images``, ``fingerprint`` (of what decides the features), ``identity`` (of all that
decides the figures) and ``options`` (batch_size, flip, num_workers of ``embed``), and turns
features into figures: ``measure(plain, mirrored, exhibits)``, all (N, D) float32, mirrored None
without flip. ``exhibits``: a list to which it adds what a report page shows, or None.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Subset

from eval import ijb, tinyface, verification
from eval.embed import embed
from eval.feature_store import open_store
from eval.report.html_report import PairExhibit, RankExhibit
from eval.roc import cmc, roc_curve, separate
from eval.sets.folder import check_images
from eval.sets.ijb import IJBSet, find_ijb, load_ijb
from eval.sets.tinyface import TinyFaceSet, find_tinyface, load_tinyface
from utils import distributed
from utils.errors import InputError

CMC_RANKS = 50
MISSES = 8  # searches of TinyFace that a page shows
CURVE_FARS = np.geomspace(1e-4, 1, 50)  # of the TPIR curve


class PairSet:
    """A ``.bin`` file and the ten-fold protocol of eval/verification.py."""

    kind, pattern, find = "verification", "{}.bin", staticmethod(verification.find_bin)
    keys = ("val_rec", "val_targets", "val_batch_size")

    def __init__(self, name: str, data, batch_size: int):
        self.name, ((self.images, self.issame), self.fingerprint) = name, data
        self.identity = self.fingerprint
        self.options = dict(batch_size=batch_size, flip=True)

    @staticmethod
    def load(root: str | Path, name: str) -> tuple[verification.DataSet, str]:
        return verification.load_targets(root, [name])[name], hashlib.sha256(
            verification.find_bin(root, name).read_bytes()
        ).hexdigest()

    def measure(self, plain, mirrored, exhibits: list | None) -> dict:
        if exhibits is not None:
            embeddings = verification.add_flips((plain, mirrored))
            scores = np.einsum("nd,nd->n", embeddings[0::2], embeddings[1::2])
            exhibits.append(
                PairExhibit(
                    self.name,
                    {"cosine": roc_curve(scores, self.issame)},
                    separate(scores, self.issame),
                    images=lambda pair: (self.images[2 * pair], self.images[2 * pair + 1]),
                    captions=lambda pair: f"pair {pair}",
                    score_name="cosine similarity",
                    scores_of=lambda pair: float(scores[pair]),
                )
            )
        return verification.figures((plain, mirrored), self.issame)


class IJB:
    """IJB-B or IJB-C in either layout: 1:1 in three variants and, where the lists are there, 1:N
    with both galleries.
    """

    kind, pattern, find, load = "ijb", "{}", staticmethod(find_ijb), staticmethod(load_ijb)
    keys = ("ijb_root", "ijb_targets", "ijb_batch_size", "ijb_num_workers", "ijb_flip")

    def __init__(self, name: str, data: IJBSet, batch_size: int, num_workers: int, flip: bool):
        self.name = name
        self.set = data
        self.images = data.images
        self.fingerprint = data.fingerprint
        lists = [
            column for rows in (*data.galleries.values(), data.probes or ()) for column in rows
        ]
        self.identity = hashlib.sha256(
            b"".join([data.fingerprint.encode(), *(column.tobytes() for column in lists)])
        ).hexdigest()
        self.options = dict(batch_size=batch_size, num_workers=num_workers, flip=flip)

    def measure(self, plain, mirrored, exhibits: list | None) -> dict:
        data = self.set
        rows = (add(plain, mirrored), data.faceness_scores, data.templates, data.medias)
        figures, rocs, first = {}, {}, None
        for variant, scores in ijb.compare(*rows, data.p1, data.p2):
            rocs[variant] = roc_curve(scores, data.label)
            figures |= ijb.figures(variant, rocs[variant])
            first = scores if first is None else first
        figures |= {
            "genuine_pairs": rocs[variant].genuine,
            "impostor_pairs": rocs[variant].impostor,
        }
        searches = {
            f"1N_{name}": ijb.identify(*rows, *gallery, *data.probes)
            for name, gallery in data.galleries.items()
        }
        for name, search in searches.items():
            figures[name] = name_rates(ijb.identification_figures(search, ijb.FARS))
        if exhibits is not None:
            exhibits.append(
                PairExhibit(
                    self.name,
                    rocs,
                    separate(first, data.label),
                    images=self.show_pair,
                    captions=self.caption,
                    score_name=f"score, {ijb.VARIANTS[0]}",
                    scores_of=lambda pair: float(first[pair]),
                )
            )
            if searches:
                tpir = {
                    name: (
                        CURVE_FARS,
                        np.array(ijb.identification_figures(search, CURVE_FARS)["tpir"]),
                    )
                    for name, search in searches.items()
                }
                exhibits.append(
                    RankExhibit(
                        self.name,
                        {name: cmc(search.ranks, CMC_RANKS) for name, search in searches.items()},
                        tpir,
                    )
                )
        return figures

    def show_pair(self, pair: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each template the image that the face detector was surest of."""
        return tuple(
            self.images[self.best_image(side[pair])] for side in (self.set.p1, self.set.p2)
        )

    def best_image(self, template: int) -> int:
        members = np.flatnonzero(self.set.templates == template)
        return int(members[self.set.faceness_scores[members].argmax()])

    def caption(self, pair: int) -> str:
        return f"templates {self.set.p1[pair]} and {self.set.p2[pair]}"


class TinyFace:
    """TinyFace's 1:N identification, in either layout."""

    kind, pattern, find, load = (
        "tinyface",
        "{}",
        staticmethod(find_tinyface),
        staticmethod(load_tinyface),
    )
    keys = (
        "tinyface_root",
        "tinyface_targets",
        "tinyface_batch_size",
        "tinyface_num_workers",
        "tinyface_flip",
    )

    def __init__(self, name: str, data: TinyFaceSet, batch_size: int, num_workers: int, flip: bool):
        self.name = name
        self.set = data
        self.images = data.images
        self.fingerprint = data.fingerprint
        self.identity = data.fingerprint
        self.options = dict(batch_size=batch_size, num_workers=num_workers, flip=flip)

    def measure(self, plain, mirrored, exhibits: list | None) -> dict:
        ranking = tinyface.rank_probes(add(plain, mirrored), self.set.image_paths, self.set.meta)
        if exhibits is not None:
            exhibits.append(
                RankExhibit(
                    self.name,
                    {self.name: cmc(ranking.ranks, CMC_RANKS)},
                    {},
                    self.show_misses(ranking),
                )
            )
        return tinyface.figures(ranking.ranks)

    def show_misses(self, ranking: tinyface.Ranking) -> list[tuple[list[np.ndarray], str]]:
        """The probes whose mate came last: the probe, the wrong image that came first, the mate."""
        missed = np.flatnonzero((ranking.ranks > 1) & (ranking.ranks != tinyface.NO_MATE))
        return [
            (
                [
                    self.images[int(index)]
                    for index in (ranking.probes[probe], *ranking.hardest[probe])
                ],
                f"{self.images.name_of(int(ranking.probes[probe]))}: wrong first, mate at rank "
                f"{ranking.ranks[probe]}",
            )
            for probe in missed[np.argsort(-ranking.ranks[missed], kind="stable")][:MISSES]
        ]


def add(plain: torch.Tensor, mirrored: torch.Tensor | None) -> np.ndarray:
    return (plain if mirrored is None else plain + mirrored).numpy()


def name_rates(figures: dict) -> dict:
    """The figures of a 1:N search with a name for every rate: tpir and thresholds become
    tpir_at_fpir_0.01, threshold_at_fpir_0.01, ...
    """
    named = {key: value for key, value in figures.items() if key not in ("tpir", "thresholds")}
    for key, name in (("tpir", "tpir_at_fpir"), ("thresholds", "threshold_at_fpir")):
        named |= {
            f"{name}_{far:g}": float(value)
            for far, value in zip(ijb.FARS, figures[key], strict=True)
        }
    return named


# keys: the configuration's root, targets, then what the constructor takes
KINDS = (PairSet, IJB, TinyFace)


def make(kind, name: str, data, cfg):
    """A benchmark of a set that ``kind.load`` has read, run as the configuration says."""
    return kind(name, data, *(cfg[key] for key in kind.keys[2:]))


def benchmarks_of(cfg) -> list:
    """What a training run measures besides its pair sets; all of it is read now, images included,
    for an error after an epoch costs hours.
    """
    asked = [
        kind for kind, wanted in ((IJB, cfg.eval_ijb), (TinyFace, cfg.eval_tinyface)) if wanted
    ]
    found = [
        make(kind, name, kind.load(cfg[kind.keys[0]], name), cfg)
        for kind in asked
        for name in dict.fromkeys(cfg[kind.keys[1]])
    ]
    for benchmark in found:
        distributed.all_succeed(
            lambda: check_images(
                share_of(benchmark.images),
                benchmark.options["num_workers"],
                f"checking {benchmark.name}",
            )
        )
    return found


def share_of(images) -> Subset:
    return Subset(images, range(distributed.rank(), len(images), distributed.world_size()))


def run_benchmark(
    benchmark,
    backbone: torch.nn.Module,
    *,
    device,
    precision: str,
    channels_last: bool,
    features: Path | None = None,
    checkpoint: str = "",
    color_space: str = "RGB",
    exhibits: list | None = None,
) -> dict:
    """Embed a benchmark's images on all ranks and measure on the first; all receive the figures.

    features: a folder that keeps the features of the checkpoint with this SHA-256, taken to be
    trained on images of this colour order; None: they are not kept.
    Raises InputError, on all ranks, naming the benchmark.
    """
    try:
        store = None
        if features:
            store = open_store(
                features,
                checkpoint,
                f"{benchmark.kind}-{benchmark.name}",
                benchmark.fingerprint,
                len(benchmark.images),
                precision,
                benchmark.options["flip"],
                color_space,
            )
        plain, mirrored = embed(
            backbone,
            benchmark.images,
            **benchmark.options,
            device=device,
            precision=precision,
            channels_last=channels_last,
            store=store,
            name=benchmark.name,
        )
        return distributed.main_computes(lambda: benchmark.measure(plain, mirrored, exhibits))
    except InputError as error:
        raise InputError(f"{benchmark.name}: {error}") from error
