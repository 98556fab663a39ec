"""Figures with what was asked for beside them: intervals and groups. What the kinds of test sets
share.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from eval.bootstrap import (
    NOBODY,
    Cut,
    PairPeople,
    draw_people,
    interval,
    sample_rates,
    sample_rates_at,
    weigh_impostors,
    with_intervals,
)
from eval.groups import Groups, GroupsOfPeople, compare_groups
from eval.roc import FPRS, Roc, error_figures, roc_curve, threshold_at

COMMON_FMR = 1e-3


class Uncertainty:
    """draws: of the bootstrap, 0 for no intervals; groups: of people, None for none.

    The first rank adds, by (kind, set): samples, {figure's key in the set: (draws,)}; by_group, as
    eval/groups.py describes; and notes, lines for the reader.
    """

    def __init__(self, draws: int = 0, groups: Groups | None = None):
        self.draws = draws
        self.groups = groups
        self.samples: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        self.by_group: dict[tuple[str, str], dict] = {}
        self.notes: list[str] = []

    @property
    def is_asked(self) -> bool:
        return bool(self.draws or self.groups)


class Measurement:
    """The figures of one set, growing: of the whole in ``figures``, of groups in ``by_group``, what
    the draws gave in ``samples``.

    ``people``: how many the set has; ``groups_of``: which group each is in.
    """

    def __init__(
        self,
        name: str,
        uncertainty: Uncertainty,
        people: int,
        groups_of: Callable[[Groups], GroupsOfPeople],
    ):
        self.name = name
        self.uncertainty = uncertainty
        self.counts = draw_people(people, uncertainty.draws) if uncertainty.draws else None
        self.figures: dict = {}
        self.samples: dict[str, np.ndarray] = {}
        self.by_group: dict[str, dict] = {}
        self.common_threshold: float | None = None
        self.groups: list[str] = []
        if uncertainty.groups:
            self.of_people, unmatched = groups_of(uncertainty.groups)
            self.groups = uncertainty.groups.names if self.of_people.max() >= 0 else []
            self.by_group = {group: {} for group in self.groups}
            self.note_people(unmatched)

    def note(self, text: str) -> None:
        self.uncertainty.notes.append(f"{self.name}: --groups: {text}")

    def note_people(self, unmatched: list[str]) -> None:
        if not self.groups:
            self.note("nobody of this set is named: no figures by group")
            return
        named = np.count_nonzero(self.of_people >= 0)
        self.note(f"{named} of {len(self.of_people)} people are in a group")
        if unmatched:
            self.note(f"names that match nothing: {len(unmatched)}, first {unmatched[0]!r}")

    def add(self, figures: dict, samples: dict, group: str | None = None, inner: str = "") -> None:
        """``group``: None for the whole set; ``inner``: a key that all of them stand under."""
        complete = with_intervals(figures, samples)
        target = self.figures if group is None else self.by_group[group]
        target |= {inner: complete} if inner else complete
        if group is None:
            start = f"{inner}." if inner else ""
            self.samples |= {start + key: samples[key] for key in figures if key in samples}

    def parts_of(
        self, people: np.ndarray
    ) -> Iterator[tuple[str | None, np.ndarray, np.ndarray | None]]:
        """For probes that show these people, (P,): None for all and every group, which probes are
        in it (P,) bool, and their weights (chosen, draws), None without draws.
        """
        parts = {None: np.ones(len(people), bool)}
        for number, group in enumerate(self.groups):
            parts[group] = self.of_people[people] == number
        for group, chosen in parts.items():
            weights = self.counts[people[chosen]] if self.counts is not None else None
            yield group, chosen, weights

    def close(self, kind: str) -> dict:
        """The figures; the rest goes to ``uncertainty``."""
        if self.samples:
            self.uncertainty.samples[kind, self.name] = self.samples
        if self.by_group:
            groups = compare_groups(self.by_group, self.common_threshold)
            self.uncertainty.by_group[kind, self.name] = groups
        return self.figures


# --- pairs


class Pairs(NamedTuple):
    """N pairs: what their error rates come from besides scores."""

    same: np.ndarray  # (N,) bool
    people: PairPeople | None  # None: no intervals are asked for
    impostors: np.ndarray | None  # (draws,) their weight
    unit: float  # of the rates: 1, or 100 for percent

    def of(self, pairs: np.ndarray) -> "Pairs":
        """Some of them, by index."""
        people = self.people.of(pairs) if self.people else None
        return make_pairs(self.same[pairs], people, self.unit)

    def sizes(self) -> dict[str, int]:
        genuine = int(np.count_nonzero(self.same))
        return {"genuine_pairs": genuine, "impostor_pairs": len(self.same) - genuine}


def make_pairs(same: np.ndarray, people: PairPeople | None, unit: float) -> Pairs:
    return Pairs(same, people, weigh_impostors(same, people) if people else None, unit)


class ErrorRates(NamedTuple):
    """Of pairs under one score."""

    roc: Roc
    figures: dict[str, float]
    samples: dict[str, np.ndarray]  # {key: (draws,)}, also of TPR and threshold at FPRS
    # {FAR: {"cosine-95": interval, "tar-95": interval}} of thresholds.json
    at_far: dict[float, dict]
    common_threshold: float
    common_thresholds: np.ndarray | None  # (draws,)


class PairMeasurement(Measurement):
    """Of a set whose pairs show the people ``first`` and ``second``, (N,) each.

    ``least``: a group of fewer pairs, or of one kind only, has no figures.
    """

    def __init__(
        self,
        name: str,
        uncertainty: Uncertainty,
        people: int,
        groups_of: Callable[[Groups], GroupsOfPeople],
        same: np.ndarray,
        first: np.ndarray,
        second: np.ndarray,
        unit: float = 1,
        least: int = 2,
    ):
        super().__init__(name, uncertainty, people, groups_of)
        drawn = None
        if self.counts is not None:
            drawn = PairPeople(first, np.where(same, NOBODY, second), self.counts)
        self.pairs = make_pairs(same, drawn, unit)
        # {group: (indices of its pairs, they)}
        self.parts: dict[str, tuple[np.ndarray, Pairs]] = {}
        for number, group in enumerate(self.groups):
            both = (self.of_people[first] == number) & (self.of_people[second] == number)
            chosen = np.flatnonzero(both)
            part = self.pairs.of(chosen)
            sizes = part.sizes()
            self.by_group[group] |= sizes
            if len(chosen) < least or 0 in sizes.values():
                self.note(
                    f"{group} has {sizes['genuine_pairs']} genuine and {sizes['impostor_pairs']} "
                    "impostor pairs: too few, no figures"
                )
            else:
                self.parts[group] = chosen, part

    def add_scores(
        self,
        scores: np.ndarray,
        figures_of: Callable[[ErrorRates, np.ndarray | slice, Pairs], tuple[dict, dict]],
        fars: tuple[float, ...] = (),
    ) -> ErrorRates:
        """``figures_of``: (figures, samples) from the rates of some pairs, their indices, and they
        themselves. The first scores decide the common threshold. ``fars``: see ``measure_errors``.
        """
        whole = measure_errors(scores, self.pairs, fars)
        self.add(*figures_of(whole, slice(None), self.pairs))
        for group, (chosen, part) in self.parts.items():
            rates = measure_errors(scores[chosen], part)
            self.add(*figures_of(rates, chosen, part), group)
            if self.common_threshold is None:
                self.add(*measure_at_common_threshold(scores[chosen], part, whole), group)
        if self.common_threshold is None:
            self.common_threshold = whole.common_threshold
        return whole


def measure_errors(scores: np.ndarray, pairs: Pairs, fars: tuple[float, ...] = ()) -> ErrorRates:
    """The FNMRs and the EER; ``fars``: of ``at_far``, with intervals only."""
    roc = roc_curve(scores, pairs.same)
    figures = error_figures(roc, pairs.unit)
    threshold, _ = threshold_at(roc, COMMON_FMR)
    if pairs.people is None:
        return ErrorRates(roc, figures, {}, {}, threshold, None)
    cuts = [Cut(rate) for rate in (*FPRS, *fars)] + [Cut(fpr, nearest=True) for fpr in FPRS]
    rates = sample_rates(scores, pairs.same, pairs.people, cuts, pairs.impostors)
    samples = {"eer": pairs.unit * rates.eer}
    at_far = {}
    for cut, true_rates, thresholds in zip(cuts, rates.true_rates, rates.thresholds, strict=True):
        if cut.nearest:
            samples[f"tpr_at_fpr_{cut.rate:g}"] = pairs.unit * true_rates
            samples[f"thresh_at_fpr_{cut.rate:g}"] = thresholds
        elif cut.rate in FPRS:
            samples[f"fnmr_at_fmr_{cut.rate:g}"] = pairs.unit * (1 - true_rates)
        if not cut.nearest and cut.rate in fars:
            at_far[cut.rate] = {
                "cosine-95": interval(thresholds),
                "tar-95": interval(true_rates),
            }
    common = rates.thresholds[FPRS.index(COMMON_FMR)]
    return ErrorRates(roc, figures, samples, at_far, threshold, common)


def measure_at_common_threshold(
    scores: np.ndarray, pairs: Pairs, whole: ErrorRates
) -> tuple[dict, dict]:
    """(figures, samples): FMR and FNMR of a group's pairs at the threshold of all pairs.

    ``scores``: of the group's pairs; ``whole``: of all pairs.
    """
    accepted = scores >= whole.common_threshold
    keys = "fmr_at_common_threshold", "fnmr_at_common_threshold"
    rates = accepted[~pairs.same].mean(), 1 - accepted[pairs.same].mean()
    figures = {key: pairs.unit * float(rate) for key, rate in zip(keys, rates, strict=True)}
    if pairs.people is None:
        return figures, {}
    false, true = sample_rates_at(scores, pairs.same, pairs.people, whole.common_thresholds)
    return figures, {keys[0]: pairs.unit * false, keys[1]: pairs.unit * (1 - true)}
