"""The test sets a network is measured on, alike to those who run them: pair sets, IJB and TinyFace.

A test set has ``kind`` ("verification", "ijb", "tinyface": the key of its figures in a report),
``name``, ``images``, ``fingerprint`` (of what decides the features), ``identity`` (of all that
decides the figures) and ``options`` (batch_size, flip, num_workers of ``embed``), and turns
features into figures: ``measure(plain, mirrored, exhibits)``, all (N, D) float32, mirrored None
without flip. ``exhibits``: a list to which it adds what a report page shows, or None. Its class has
``keys`` (of the configuration: root, targets, then what the constructor takes), ``find(root,
name)``, a path, ``load(root, name)``, and ``pattern``, what ``find`` looks for.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from eval import ijb, tinyface, verification
from eval.embed import embed
from eval.feature_store import open_store
from eval.report.html_report import PairExhibit, RankExhibit
from eval.roc import Roc, cmc, roc_curve, separate
from eval.sets.arrow import saved_fingerprint
from eval.sets.folder import check_images
from eval.sets.ijb import IJBSet, find_ijb, load_ijb
from eval.sets.tinyface import TinyFaceSet, find_tinyface, load_tinyface
from utils import distributed
from utils.errors import InputError
from utils.weights.read import sha256

CMC_RANKS = 50
# searches of TinyFace that a page shows
MISSES = 8
# of the TPIR curve
CURVE_FARS = np.geomspace(1e-4, 1, 50)


class PairTestSet:
    """A ``.bin`` file, or an Arrow folder, and the ten-fold protocol of eval/verification.py."""

    kind = "verification"
    pattern = "{}.bin"
    keys = ("val_rec", "val_targets", "val_batch_size")
    find = staticmethod(verification.find_pair_set)

    def __init__(self, name: str, data: tuple[verification.DataSet, str], batch_size: int):
        self.name = name
        (self.images, self.issame), self.fingerprint = data
        self.identity = self.fingerprint
        self.options = dict(batch_size=batch_size, flip=True)

    @staticmethod
    def load(root: str | Path, name: str) -> tuple[verification.DataSet, str]:
        """The set and the SHA-256 of its file, or of what tells its folder from others."""
        path = verification.find_pair_set(root, name)
        digest = saved_fingerprint(path) if path.is_dir() else sha256(path)
        return verification.load_targets(root, [name])[name], digest

    def measure(self, plain, mirrored, exhibits: list | None) -> dict:
        if exhibits is not None:
            exhibits.append(self.exhibit(verification.add_flips((plain, mirrored))))
        return verification.figures((plain, mirrored), self.issame)

    def exhibit(self, embeddings: np.ndarray) -> PairExhibit:
        scores = np.einsum("nd,nd->n", embeddings[0::2], embeddings[1::2])
        return PairExhibit(
            self.name,
            {"cosine": roc_curve(scores, self.issame)},
            separate(scores, self.issame),
            images=lambda pair: (self.images[2 * pair], self.images[2 * pair + 1]),
            captions=lambda pair: f"pair {pair}",
            score_name="cosine similarity",
            scores_of=lambda pair: float(scores[pair]),
        )


class ImageTestSet:
    """What the sets that lie as images in a folder have in common."""

    pattern = "{}"

    def __init__(
        self,
        name: str,
        data: IJBSet | TinyFaceSet,
        batch_size: int,
        num_workers: int,
        flip: bool,
    ):
        self.name = name
        self.set = data
        self.images = data.images
        self.fingerprint = data.fingerprint
        self.identity = data.fingerprint
        self.options = dict(batch_size=batch_size, num_workers=num_workers, flip=flip)


class IJBTestSet(ImageTestSet):
    """IJB-B or IJB-C in either layout: 1:1 in three variants and, where the lists are there, 1:N
    with both galleries.
    """

    kind = "ijb"
    keys = ("ijb_root", "ijb_targets", "ijb_batch_size", "ijb_num_workers", "ijb_flip")
    find = staticmethod(find_ijb)
    load = staticmethod(load_ijb)

    def __init__(self, name: str, data: IJBSet, *options):
        super().__init__(name, data, *options)
        digest = hashlib.sha256(data.fingerprint.encode())
        for templates_and_subjects in (*data.galleries.values(), data.probes or ()):
            for column in templates_and_subjects:
                digest.update(column.tobytes())
        self.identity = digest.hexdigest()

    def measure(self, plain, mirrored, exhibits: list | None) -> dict:
        data = self.set
        rows = (add(plain, mirrored), data.faceness_scores, data.templates, data.medias)
        figures, rocs, first_scores = {}, {}, None
        for variant, scores in ijb.compare(*rows, data.p1, data.p2):
            rocs[variant] = roc_curve(scores, data.label)
            figures |= ijb.figures(variant, rocs[variant])
            first_scores = scores if first_scores is None else first_scores
        figures["genuine_pairs"] = rocs[variant].genuine
        figures["impostor_pairs"] = rocs[variant].impostor
        searches = {}
        for name, gallery in data.galleries.items():
            search = ijb.identify(*rows, *gallery, *data.probes)
            searches[f"1N_{name}"] = search
            figures[f"1N_{name}"] = name_rates(ijb.identification_figures(search, ijb.FARS))
        if exhibits is not None:
            exhibits.append(self.exhibit_pairs(rocs, first_scores))
            if searches:
                exhibits.append(self.exhibit_searches(searches))
        return figures

    def exhibit_pairs(self, rocs: dict[str, Roc], scores: np.ndarray) -> PairExhibit:
        """scores: of the first variant."""
        return PairExhibit(
            self.name,
            rocs,
            separate(scores, self.set.label),
            images=self.show_pair,
            captions=lambda pair: f"templates {self.set.p1[pair]} and {self.set.p2[pair]}",
            score_name=f"score, {ijb.VARIANTS[0]}",
            scores_of=lambda pair: float(scores[pair]),
        )

    def exhibit_searches(self, searches: dict[str, ijb.Identification]) -> RankExhibit:
        cmc_curves, tpir_curves = {}, {}
        for name, search in searches.items():
            tpir = ijb.identification_figures(search, CURVE_FARS)["tpir"]
            cmc_curves[name] = cmc(search.ranks, CMC_RANKS)
            tpir_curves[name] = (CURVE_FARS, np.array(tpir))
        return RankExhibit(self.name, cmc_curves, tpir_curves)

    def show_pair(self, pair: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each template the image that the face detector was surest of."""
        first, second = self.set.p1[pair], self.set.p2[pair]
        return self.images[self.best_image(first)], self.images[self.best_image(second)]

    def best_image(self, template: int) -> int:
        members = np.flatnonzero(self.set.templates == template)
        return int(members[self.set.faceness_scores[members].argmax()])


class TinyFaceTestSet(ImageTestSet):
    """TinyFace's 1:N identification, in either layout."""

    kind = "tinyface"
    keys = (
        "tinyface_root",
        "tinyface_targets",
        "tinyface_batch_size",
        "tinyface_num_workers",
        "tinyface_flip",
    )
    find = staticmethod(find_tinyface)
    load = staticmethod(load_tinyface)

    def measure(self, plain, mirrored, exhibits: list | None) -> dict:
        ranking = tinyface.rank_probes(add(plain, mirrored), self.set.image_paths, self.set.meta)
        if exhibits is not None:
            curves = {self.name: cmc(ranking.ranks, CMC_RANKS)}
            exhibits.append(RankExhibit(self.name, curves, {}, self.show_misses(ranking)))
        return tinyface.figures(ranking.ranks)

    def show_misses(self, ranking: tinyface.Ranking) -> list[tuple[list[np.ndarray], str]]:
        """The probes whose mate came last: the probe, the wrong image that came first, the mate."""
        missed = np.flatnonzero((ranking.ranks > 1) & (ranking.ranks != tinyface.NO_MATE))
        worst_first = missed[np.argsort(-ranking.ranks[missed], kind="stable")]
        strips = []
        for probe in worst_first[:MISSES]:
            image = int(ranking.probes[probe])
            shown = [self.images[int(index)] for index in (image, *ranking.hardest[probe])]
            caption = (
                f"{self.images.name_of(image)}: wrong first, mate at rank {ranking.ranks[probe]}"
            )
            strips.append((shown, caption))
        return strips


KINDS = (PairTestSet, IJBTestSet, TinyFaceTestSet)


def add(plain: torch.Tensor, mirrored: torch.Tensor | None) -> np.ndarray:
    return (plain if mirrored is None else plain + mirrored).numpy()


def name_rates(figures: dict) -> dict:
    """The figures of a 1:N search with a name for every rate: tpir and thresholds become
    tpir_at_fpir_0.01, threshold_at_fpir_0.01, ...
    """
    named = {key: value for key, value in figures.items() if key not in ("tpir", "thresholds")}
    for key, name in (("tpir", "tpir_at_fpir"), ("thresholds", "threshold_at_fpir")):
        for far, value in zip(ijb.FARS, figures[key], strict=True):
            named[f"{name}_{far:g}"] = float(value)
    return named


def make(kind, name: str, data, cfg):
    """A test set that ``kind.load`` has read, run as the configuration says."""
    return kind(name, data, *(cfg[key] for key in kind.keys[2:]))


def test_sets_of(cfg) -> list:
    """What a training run measures besides its pair sets; all of it is read now, images included,
    for an error after an epoch costs hours.
    """
    kinds = [IJBTestSet] * bool(cfg.eval_ijb) + [TinyFaceTestSet] * bool(cfg.eval_tinyface)
    test_sets = []
    for kind in kinds:
        root_key, targets_key, *_ = kind.keys
        for name in dict.fromkeys(cfg[targets_key]):
            test_sets.append(make(kind, name, kind.load(cfg[root_key], name), cfg))
    for test_set in test_sets:
        check_share(test_set)
    return test_sets


def check_share(test_set: ImageTestSet) -> None:
    """Read every image once, each rank a share. Raises InputError, on all ranks."""
    share = share_of(test_set.images)
    num_workers = test_set.options["num_workers"]
    distributed.all_succeed(lambda: check_images(share, num_workers, f"checking {test_set.name}"))


def share_of(images: Dataset) -> Subset:
    return Subset(images, range(distributed.rank(), len(images), distributed.world_size()))


def run_test_set(
    test_set,
    backbone: torch.nn.Module,
    *,
    device,
    precision: str,
    channels_last: bool,
    feature_folder: Path | None = None,
    checkpoint: str = "",
    color_space: str = "RGB",
    exhibits: list | None = None,
) -> dict:
    """Embed a test set's images on all ranks and measure on the first; all receive the figures.

    feature_folder: keeps the features of the checkpoint with this SHA-256, taken to be trained on
    images of this colour order; None: they are not kept. Raises InputError, on all ranks, naming
    the test set.
    """
    try:
        store = None
        if feature_folder:
            store = open_store(
                feature_folder,
                checkpoint,
                f"{test_set.kind}-{test_set.name}",
                test_set.fingerprint,
                len(test_set.images),
                precision,
                test_set.options["flip"],
                color_space,
            )
        plain, mirrored = embed(
            backbone,
            test_set.images,
            **test_set.options,
            device=device,
            precision=precision,
            channels_last=channels_last,
            store=store,
            name=test_set.name,
        )
        return distributed.main_computes(lambda: test_set.measure(plain, mirrored, exhibits))
    except InputError as error:
        raise InputError(f"{test_set.name}: {error}") from error
