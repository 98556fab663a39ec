"""Figures by group of people (``--groups FILE``): who is recognised worse, and by how much.

What results hold under ``groups`` -> kind ("verification", "ijb", "tinyface") -> set:

    {"by_group": {group: {"genuine_pairs": n, "impostor_pairs": n, (tinyface: "probes": n)
                          k: value, k-95: [low, high], ...},    # as for the whole set
                  ...},
     "worst": {k: group},            # of the rates alone; 1N_G1.top1 for those of a gallery
     "common_threshold": score,      # of the whole set at FMR 1e-3; pairs only
     "fmr_ratio": 3.2}               # largest / smallest fmr_at_common_threshold, or "unresolved"

Pairs count in a group if both people are in it. Besides the set's own figures a group has
``fmr_at_common_threshold`` and ``fnmr_at_common_threshold`` (in the set's unit; of IJB by its first
variant). A group with too few pairs has its counts only.

FILE has a first line ``name,group``, then a line for each person or image: an image stands for its
person. Images go by their path in the set or their file name, people by the folder of their images
(pair sets), their subject number (IJB) or what the file names begin with (TinyFace). A ``.bin``
file has no names: a file ``<set>.names.csv`` beside ``<set>.bin``, first line ``first,second``,
then a line a pair in the set's order, has its images' paths.
"""

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import InputError
from utils.files import read_text

HEADER = ["name", "group"]
UNRESOLVED = "unresolved"
# the rates of which the lowest, and of which the highest is the worst
HIGH_IS_GOOD = re.compile(r"Accuracy-Flip|rank-\d+|.+_tpr_at_fpr_.+|1N_.+\.(top\d+|tpir_at_.+)")
LOW_IS_GOOD = re.compile(r"(.+_)?(fnmr_at_fmr_.+|eer|fn?mr_at_common_threshold)")


class GroupsOfPeople(NamedTuple):
    """Which group each person of a set is in."""

    # (people,) index of the group, -1 for one that the file does not name, or names in two groups
    numbers: np.ndarray
    unmatched: list[str]  # names in the file that are nobody's and no image's in the set


class Groups(NamedTuple):
    """The content of a file of groups."""

    path: Path
    names: list[str]  # of the groups, sorted
    of_name: dict[str, int]  # {person or image: index in names}

    def of_people(
        self, count: int, people: Iterable[int], names: Iterable[Sequence[str]]
    ) -> GroupsOfPeople:
        """The groups of ``count`` people.

        ``people``, ``names``: the person of each image, and what the image or the person is called.
        """
        numbers = np.full(count, -1)
        in_two, matched = set(), set()
        for person, spellings in zip(people, names, strict=True):
            for name in spellings:
                if name not in self.of_name:
                    continue
                matched.add(name)
                group = self.of_name[name]
                if numbers[person] not in (-1, group):
                    in_two.add(int(person))
                numbers[person] = group
        numbers[list(in_two)] = -1
        return GroupsOfPeople(numbers, [name for name in self.of_name if name not in matched])


def read_groups(path: Path) -> Groups:
    """Raises InputError naming the line that is not ``name,group``, or says another group of a
    name; also if there are fewer than two groups.
    """
    if not path.is_file():
        raise InputError(f"--groups: no file {path.absolute()}")
    group_of = {}
    for number, fields in numbered_rows(path, HEADER, "--groups"):
        name, group = fields
        if group_of.setdefault(name, group) != group:
            raise InputError(
                f"--groups: {path}, line {number}: {name} is in the groups {group_of[name]} and "
                f"{group}: one is needed"
            )
    names = sorted(set(group_of.values()))
    if len(names) < 2:
        raise InputError(
            f"--groups: {path} has the groups {', '.join(names) or 'none'}: two are needed to "
            "compare"
        )
    return Groups(path, names, {name: names.index(group) for name, group in group_of.items()})


def numbered_rows(path: Path, header: list[str], what: str) -> Iterable[tuple[int, list[str]]]:
    """(line number, fields without blanks around them) of a CSV file behind its header.

    Raises InputError if a line has not as many fields as the header, or an empty one.
    """
    rows = csv.reader(read_text(path).splitlines())
    first = [field.strip() for field in next(rows, [])]
    if first != header:
        raise InputError(
            f"{what}: {path} begins with {','.join(first)[:80]!r}, not with the line "
            f"{','.join(header)}"
        )
    for row in rows:
        fields = [field.strip() for field in row]
        if not any(fields):
            continue
        if len(fields) != len(header) or not all(fields):
            raise InputError(
                f"{what}: {path}, line {rows.line_num}: expected {','.join(header)}, got "
                f"{','.join(row)[:80]!r}"
            )
        yield rows.line_num, fields


def check_names(groups: Groups, test_sets: Sequence) -> None:
    """Raises InputError if the file names nobody in any of the test sets."""
    if any((test_set.groups_of(groups).numbers >= 0).any() for test_set in test_sets):
        return
    sets = ", ".join(test_set.name for test_set in test_sets)
    raise InputError(
        f"--groups: {groups.path} names no person and no image of {sets}, for example "
        f"{next(iter(groups.of_name))!r}; a .bin file needs <set>.names.csv beside it, which "
        "data/make_rec.py --pairs writes"
    )


def compare_groups(by_group: dict[str, dict], threshold: float | None = None) -> dict:
    """What results hold about the groups of a set, from the figures of each. ``threshold``: the
    common one.
    """
    comparison = {"by_group": by_group, "worst": find_worst(by_group)}
    if threshold is not None:
        comparison["common_threshold"] = threshold
        comparison["fmr_ratio"] = ratio_of(
            [
                figures["fmr_at_common_threshold"]
                for figures in by_group.values()
                if "fmr_at_common_threshold" in figures
            ]
        )
    return comparison


def find_worst(by_group: dict[str, dict]) -> dict[str, str]:
    """{rate: the group that it is worst for}, of equal ones the first."""
    flat = {group: flatten(figures) for group, figures in by_group.items()}
    worst = {}
    for key in dict.fromkeys(key for figures in flat.values() for key in figures):
        values = {group: figures[key] for group, figures in flat.items() if key in figures}
        if HIGH_IS_GOOD.fullmatch(key):
            worst[key] = min(values, key=values.get)
        elif LOW_IS_GOOD.fullmatch(key):
            worst[key] = max(values, key=values.get)
    return worst


def flatten(figures: dict) -> dict[str, float]:
    """Without intervals; those of a gallery as 1N_G1.top1."""
    flat = {}
    for key, value in figures.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": rate for inner, rate in flatten(value).items()}
        elif not key.endswith("-95"):
            flat[key] = value
    return flat


def ratio_of(rates: list[float]) -> float | str:
    """The largest to the smallest of the FMRs."""
    if len(rates) < 2 or min(rates) == 0:
        return UNRESOLVED
    return max(rates) / min(rates)
