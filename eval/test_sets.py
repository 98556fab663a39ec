"""The test sets a network is measured on, alike to those who run them: pair sets, IJB and TinyFace.

A test set has ``kind`` ("verification", "ijb", "tinyface": the key of its figures in a report),
``name``, ``images``, ``fingerprint`` (of what decides the features), ``identity`` (of all that
decides the figures) and ``options`` (batch_size, flip, num_workers of ``embed``), and turns
features into figures: ``measure(plain, mirrored, exhibits, uncertainty)``, all (N, D) float32,
mirrored None without flip. ``exhibits``: a list to which it adds what a report page shows, or None;
``uncertainty``: which intervals and groups are asked for. Its class has
``keys`` (of the configuration: root, targets, then what the constructor takes), ``find(root,
name)``, a path, ``load(root, name)``, and ``pattern``, what ``find`` looks for. ``people`` are
those on its images or templates, ``groups_of`` says which group each is in.
"""

import hashlib
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from eval import ijb, tinyface, verification
from eval.embed import embed
from eval.feature_store import open_store
from eval.groups import Groups, GroupsOfPeople
from eval.quality import mean_norms
from eval.report.exhibits import (
    exhibit_pairs,
    exhibit_ranking,
    exhibit_searches,
    exhibit_templates,
)
from eval.report.thresholds import FARS as THRESHOLD_FARS
from eval.sets.arrow import saved_fingerprint
from eval.sets.folder import check_images
from eval.sets.ijb import IJBSet, find_ijb, load_ijb
from eval.sets.people import (
    TemplatePeople,
    connect_templates,
    find_people,
    names_file,
    read_names,
    spellings,
)
from eval.sets.tinyface import TinyFaceSet, find_tinyface, load_tinyface
from eval.uncertainty import ErrorRates, Measurement, PairMeasurement, Pairs, Uncertainty
from utils import distributed
from utils.errors import InputError
from utils.weights.read import sha256


class PairTestSet:
    """A ``.bin`` file, or an Arrow folder, and the ten-fold protocol of eval/verification.py."""

    kind = "verification"
    pattern = "{}.bin"
    keys = ("val_rec", "val_targets", "val_batch_size")
    find = staticmethod(verification.find_pair_set)

    def __init__(self, name: str, data: tuple, batch_size: int):
        self.name = name
        (self.images, self.issame), self.fingerprint, self.names = data
        self.identity = self.fingerprint
        self.options = dict(batch_size=batch_size, flip=True)

    @staticmethod
    def load(root: str | Path, name: str) -> tuple[verification.DataSet, str, list[str]]:
        """The set, the SHA-256 of its file (or of what tells its folder from others), and the names
        of its images ([] if it has none).
        """
        path = verification.find_pair_set(root, name)
        digest = saved_fingerprint(path) if path.is_dir() else sha256(path)
        data = verification.load_targets(root, [name])[name]
        return data, digest, read_names(names_file(root, name), len(data[1]))

    @cached_property
    def people(self) -> np.ndarray:
        """(2N,) the person of each image."""
        return find_people(self.images, self.issame, self.names)

    def groups_of(self, groups: Groups) -> GroupsOfPeople:
        named = self.people[: len(self.names)]
        return groups.of_people(self.people.max() + 1, named, map(spellings, self.names))

    def measure(self, plain, mirrored, exhibits: list | None, uncertainty: Uncertainty) -> dict:
        flips = torch.stack([plain, mirrored])
        embeddings = verification.add_flips(flips)
        scores = np.einsum("nd,nd->n", embeddings[0::2], embeddings[1::2])
        people = self.people if uncertainty.is_asked else np.zeros(len(self.images), int)
        measurement = PairMeasurement(
            self.name,
            uncertainty,
            people.max() + 1,
            self.groups_of,
            self.issame,
            people[0::2],
            people[1::2],
            least=verification.FOLDS,
        )

        def figures_of(rates: ErrorRates, chosen, pairs: Pairs) -> tuple[dict, dict]:
            of_pairs = tuple(flips.unflatten(1, (-1, 2))[:, chosen].flatten(1, 2))
            figures = verification.figures(of_pairs, pairs.same) | rates.figures | pairs.sizes()
            samples = dict(rates.samples)
            if pairs.people:
                samples["Accuracy-Flip"] = verification.sample_accuracy(
                    verification.add_flips(of_pairs), pairs.same, pairs.people
                )
            return figures, samples

        fars = THRESHOLD_FARS if exhibits is not None else ()
        whole = measurement.add_scores(scores, figures_of, fars)
        if exhibits is not None:
            exhibits.append(exhibit_pairs(self, scores, whole, mean_norms(plain, mirrored)))
        return measurement.close(self.kind)


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

    def measure(self, plain, mirrored, exhibits: list | None, uncertainty: Uncertainty) -> dict:
        data = self.set
        rows = (add(plain, mirrored), data.faceness_scores, data.templates, data.medias)
        measurement = PairMeasurement(
            self.name,
            uncertainty,
            self.people.count,
            self.groups_of,
            data.label == 1,
            self.people.of(data.p1),
            self.people.of(data.p2),
            unit=100,
        )
        rates, first_scores = {}, None
        for variant, scores in ijb.compare(*rows, data.p1, data.p2):
            fars = THRESHOLD_FARS if exhibits is not None and not rates else ()
            rates[variant] = measurement.add_scores(scores, partial(variant_figures, variant), fars)
            first_scores = scores if first_scores is None else first_scores
        measurement.add(measurement.pairs.sizes(), {})
        searches = {
            f"1N_{name}": self.search(f"1N_{name}", rows, gallery, measurement)
            for name, gallery in data.galleries.items()
        }
        if exhibits is not None:
            norms = mean_norms(plain, mirrored)
            exhibits.append(exhibit_templates(self.name, data, rates, first_scores, norms))
            if searches:
                exhibits.append(exhibit_searches(self.name, searches))
        return measurement.close(self.kind)

    @cached_property
    def people(self) -> TemplatePeople:
        data = self.set
        same = data.label == 1
        return connect_templates(data.templates, data.p1[same], data.p2[same], self.lists)

    @property
    def lists(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(templates, subjects) of the galleries and the probes."""
        return [rows for rows in (*self.set.galleries.values(), self.set.probes) if rows]

    def groups_of(self, groups: Groups) -> GroupsOfPeople:
        data = self.set
        people = [self.people.of(data.templates)]
        names = [spellings(self.images.name_of(index)) for index in range(len(self.images))]
        for templates, subjects in self.lists:
            people.append(self.people.of(templates))
            names += [(str(subject),) for subject in subjects]
        return groups.of_people(self.people.count, np.concatenate(people), names)

    def search(self, key: str, rows: tuple, gallery: tuple, measurement: Measurement):
        """Search a gallery for the probes, and add the figures under ``key``."""
        search = ijb.identify(*rows, *gallery, *self.set.probes)
        templates, subjects = ijb.list_templates("the probe list", *self.set.probes)
        mated = np.isin(subjects, gallery[1])
        for group, chosen, weights in measurement.parts_of(self.people.of(templates)):
            part = ijb.choose(search, chosen[mated], chosen[~mated])
            if not (len(part.ranks) and len(part.non_mated_maxima)):
                measurement.note(
                    f"{key}: {group} has {len(part.ranks)} probes with and "
                    f"{len(part.non_mated_maxima)} without a mate: too few, no figures"
                )
                continue
            samples = {}
            if weights is not None:
                samples = ijb.sample_identification(
                    part, weights[mated[chosen]], weights[~mated[chosen]]
                )
            figures = ijb.identification_figures(part, ijb.FARS)
            measurement.add(name_rates(figures), name_rates(samples), group, key)
        return search


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

    def measure(self, plain, mirrored, exhibits: list | None, uncertainty: Uncertainty) -> dict:
        ranking = tinyface.rank_probes(add(plain, mirrored), self.set.image_paths, self.set.meta)
        if exhibits is not None:
            exhibits.append(exhibit_ranking(self.name, self.images, ranking))
        people = self.people
        measurement = Measurement(self.name, uncertainty, people.max() + 1, self.groups_of)
        for group, chosen, weights in measurement.parts_of(people):
            ranks = ranking.ranks[chosen]
            if group is not None:
                measurement.add({"probes": len(ranks)}, {}, group)
            if not len(ranks):
                measurement.note(f"{group} has no probes: no figures")
                continue
            samples = tinyface.sample_figures(ranks, weights) if weights is not None else {}
            measurement.add(tinyface.figures(ranks), samples, group)
        return measurement.close(self.kind)

    @cached_property
    def people(self) -> np.ndarray:
        """(probes,) the person of each, numbered from 0."""
        identities = [tinyface.identity_of(path) for path in self.set.meta["probe_paths"]]
        return np.unique(identities, return_inverse=True)[1]

    def groups_of(self, groups: Groups) -> GroupsOfPeople:
        paths = self.set.meta["probe_paths"]
        names = [(*spellings(path), tinyface.identity_of(path)) for path in paths]
        return groups.of_people(self.people.max() + 1, self.people, names)


KINDS = (PairTestSet, IJBTestSet, TinyFaceTestSet)


def add(plain: torch.Tensor, mirrored: torch.Tensor | None) -> np.ndarray:
    return (plain if mirrored is None else plain + mirrored).numpy()


def variant_figures(variant: str, rates: ErrorRates, *_) -> tuple[dict, dict]:
    """(figures, samples) of IJB's 1:1 in one variant."""
    figures = {f"{variant}_{key}": value for key, value in rates.figures.items()}
    samples = {f"{variant}_{key}": value for key, value in rates.samples.items()}
    return ijb.figures(variant, rates.roc) | figures, samples


def name_rates(figures: dict) -> dict:
    """The figures of a 1:N search, or what draws gave, with a name for every rate: tpir and
    thresholds become tpir_at_fpir_0.01, threshold_at_fpir_0.01, ...
    """
    named = {key: value for key, value in figures.items() if key not in ("tpir", "thresholds")}
    for key, name in (("tpir", "tpir_at_fpir"), ("thresholds", "threshold_at_fpir")):
        if key in figures:
            rates = zip(ijb.FARS, figures[key], strict=True)
            named |= {f"{name}_{far:g}": value for far, value in rates}
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
    uncertainty: Uncertainty | None = None,
) -> dict:
    """Embed a test set's images on all ranks and measure on the first; all receive the figures.

    uncertainty: which intervals and groups are asked for. feature_folder: keeps the features of the
    checkpoint with this SHA-256, taken to be trained on images of this colour order; None: they are
    not kept. Raises InputError, on all ranks, naming the test set.
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
        uncertainty = uncertainty or Uncertainty()
        return distributed.main_computes(
            lambda: test_set.measure(plain, mirrored, exhibits, uncertainty)
        )
    except InputError as error:
        raise InputError(f"{test_set.name}: {error}") from error
