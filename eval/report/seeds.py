"""seeds.md and seeds.csv: the seeds of one method as one row, the mean ± the standard deviation
over them.
"""

import json
import os
import statistics
from pathlib import Path
from typing import NamedTuple

from eval.report.figure_keys import Row, headlines, is_limit, label_of, show
from eval.report.files import table_line, write_table
from utils.files import write_text

# in which the configurations of two seeds of one method may differ
NOT_THE_METHOD = {"seed", "output", "global_step"}
FILES = ("seeds.md", "seeds.csv")


class Method(NamedTuple):
    """The checkpoints of one name in runs that differ in their seed only."""

    runs: str
    checkpoint: str
    seeds: list[int | None]
    rows: list[Row]

    def values(self, key: str) -> list[float]:
        """A figure of every seed; empty if a seed lacks it."""
        values = [row.figures[key] for row in self.rows if key in row.figures]
        return values if len(values) == len(self.rows) else []

    def cells(self) -> list[str]:
        seeds = [str(seed) for seed in self.seeds if seed is not None]
        return [self.runs, self.checkpoint, ", ".join(seeds)]


def group_by_method(rows: list[Row], configurations: list[dict]) -> list[Method]:
    """configurations: what config.json says of each row's run; empty: there is none.

    Rows of one seed are no seeds of a method, whatever else tells their runs apart; nor are runs of
    earlier versions, whose config.json does not say the method.
    """
    all_runs = {row.run for row in rows}
    groups = {}
    for row, configuration in zip(rows, configurations, strict=True):
        values = {k: v for k, v in configuration.items() if k not in NOT_THE_METHOD}
        checkpoint = row.name.removeprefix(f"{row.run}_")
        alone = "" if "method" in configuration else row.run
        key = json.dumps(values, sort_keys=True), checkpoint, alone
        groups.setdefault(key, []).append((row, configuration.get("seed")))
    methods = []
    for (_, checkpoint, _), members in groups.items():
        if len({seed for _, seed in members}) < len(members):
            methods += [Method(row.run, checkpoint, [seed], [row]) for row, seed in members]
            continue
        of_method, seeds = zip(*members, strict=True)
        names = [row.run for row in of_method]
        runs = common_name(names, all_runs.difference(names))
        methods.append(Method(runs, checkpoint, list(seeds), list(of_method)))
    return methods


def common_name(runs: list[str], others: set[str]) -> str:
    """Several names in one: what they begin and end with, and ``*`` between.

    Their list instead where that says nothing, or would name one of the others, too.
    """
    if len(runs) == 1:
        return runs[0]
    start = os.path.commonprefix(runs)
    # backwards, without the start
    rests = [run[len(start) :][::-1] for run in runs]
    end = os.path.commonprefix(rests)[::-1]
    ambiguous = any(name.startswith(start) and name.endswith(end) for name in others)
    if ambiguous or not start + end:
        return ", ".join(runs)
    return f"{start}*{end}"


def write_seeds(folder: Path, methods: list[Method]) -> bool:
    """Write both files if a method has several seeds, else remove those of before; which it was."""
    if all(len(method.rows) == 1 for method in methods):
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        return False
    keys = sorted({key for method in methods for row in method.rows for key in row.figures})
    # limits of one seed's interval have no mean
    keys = [key for key in keys if not is_limit(key)]
    shown = list(headlines(keys)) or keys
    heads = ["runs", "checkpoint", "seeds"]
    text = [
        "Mean ± standard deviation over the seeds of a method; rates in %.",
        "",
        table_line([*heads, *map(label_of, shown)]),
        "|---" * (len(heads) + len(shown)) + "|",
    ]
    table = [(*heads, *(column for key in keys for column in (key, f"{key}-spread")))]
    for method in methods:
        text.append(table_line([*method.cells(), *(show_mean(key, method) for key in shown)]))
        figures = [figure for key in keys for figure in mean_and_spread(method.values(key))]
        cells = ["" if figure is None else f"{figure:.6f}" for figure in figures]
        table.append((*method.cells(), *cells))
    write_text(folder / "seeds.md", "\n".join(text) + "\n")
    write_table(folder / "seeds.csv", table)
    return True


def mean_and_spread(values: list[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation (n - 1); None for what so few values do not have."""
    mean = statistics.fmean(values) if values else None
    spread = statistics.stdev(values) if len(values) > 1 else None
    return mean, spread


def show_mean(key: str, method: Method) -> str:
    mean, spread = mean_and_spread(method.values(key))
    if mean is None:
        return ""
    # of one set for all: its size says whether the figure is marked
    cell = show(key, method.rows[0].figures | {key: mean})
    return cell if spread is None else f"{cell} ± {show(key, {key: spread})}"
