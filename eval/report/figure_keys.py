"""Single figures by their dotted keys, ``verification.lfw.Accuracy-Flip``: unit, headline, how one
is shown, and which one a person means.
"""

import re
from difflib import get_close_matches
from typing import NamedTuple

from eval.report.tables import limits, mark
from utils.errors import InputError
from utils.files import printable

KINDS = ("verification", "ijb", "tinyface")
FRACTIONS = re.compile(
    r"verification\..+\.(Accuracy-(Flip|Std)|eer|fnmr_at_fmr_[^.]+(\.\d+)?)"
    r"|verification\..+\.fn?mr_at_common_threshold"
    r"|ijb\..+\.1N_.+\.(top\d+|tpir_at_fpir_.+)"
)
PERCENTAGES = re.compile(
    r"ijb\..+_(tpr_at_fpr_.+|fnmr_at_fmr_.+|eer)|ijb\..+\.fn?mr_at_common_threshold"
    r"|tinyface\..+\.rank-\d+"
)
COUNTS = re.compile(r".+\.(genuine_pairs|impostor_pairs|mated|non_mated|probes)")
# behind a figure's key: the limits of its interval
ENDS = ("low", "high")
LIMITS = tuple(f"-95.{end}" for end in ENDS)

# the figures that papers compare, what the heads of columns call them, and two lines above a plot
HEADLINES = (
    (r"verification\.(.+)\.Accuracy-Flip", r"\1", (r"\1", "accuracy (%)")),
    (
        r"ijb\.(.+)\.Norm:True_Det:True_tpr_at_fpr_0\.0001",
        r"\1 1e-4",
        (r"\1", "TAR (%) at FAR 1e-4"),
    ),
    (r"ijb\.(.+)\.Norm:True_Det:True_tpr_at_fpr_1e-05", r"\1 1e-5", (r"\1", "TAR (%) at FAR 1e-5")),
    (r"ijb\.(.+)\.1N_(.+)\.top1", r"\1 \2 rank-1", (r"\1, gallery \2", "rank-1 rate (%)")),
    (r"tinyface\.(.+)\.rank-1", r"\1 rank-1", (r"\1", "rank-1 rate (%)")),
)


class Row(NamedTuple):
    """One evaluated checkpoint. step: None for one without a number, such as best_backbone.pth."""

    name: str
    run: str
    step: int | None
    figures: dict[str, float]


def flatten(results: dict) -> dict[str, float]:
    """Nested figures with dotted keys, sorted; an interval becomes ``k-95.low`` and
    ``k-95.high``.

    Raises InputError for a list of another length.
    """
    flat = {}
    for key, value in results.items():
        # the name of a set is that of a file
        key = printable(key)
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": figure for inner, figure in flatten(value).items()}
        elif isinstance(value, list):
            if len(value) != len(ENDS):
                raise InputError(f"{key} has {len(value)} values, an interval of a figure has two")
            flat |= {f"{key}.{end}": limit for end, limit in zip(ENDS, value, strict=True)}
        else:
            flat[key] = value
    return dict(sorted(flat.items()))


def headlines(keys) -> dict[str, str]:
    """{key: label} of the figures that summaries show, by kind and set."""
    labelled = [
        (KINDS.index(kind_of(key)), match[1], number, key, match.expand(label))
        for key in keys
        for number, (pattern, label, _) in enumerate(HEADLINES)
        if (match := re.fullmatch(pattern, key))
    ]
    return {key: label for *_, key, label in sorted(labelled)}


def is_key(text: str) -> bool:
    return kind_of(text) in KINDS and text.count(".") >= 2


def kind_of(key: str) -> str:
    return key.split(".", 1)[0]


def set_of(key: str) -> str:
    """kind.set of a dotted key; the name of a set and the rate at the end can hold dots
    themselves.
    """
    key = key.removesuffix(LIMITS[0]).removesuffix(LIMITS[1])
    return re.fullmatch(r"(.+?\..+?)\.(1N_.+|[^.]+_at_f(pr|mr)_.+|[^.]+)", key)[1]


def is_limit(key: str) -> bool:
    """Of an interval."""
    return key.endswith(LIMITS)


def label_of(key: str) -> str:
    return headlines([key]).get(key) or key.split(".", 1)[1]


def plot_title(key: str) -> tuple[str, str]:
    """The two lines above a plot: the set, the figure and its unit."""
    for pattern, _, (group, figure) in HEADLINES:
        if match := re.fullmatch(pattern, key):
            return match.expand(group), figure
    group = set_of(key)
    unit = " (%)" if is_percentage(key) else ""
    return group.split(".", 1)[1], key.removeprefix(f"{group}.") + unit


def is_accuracy(key: str) -> bool:
    """Of a pair set, where guessing gives 50 %."""
    return kind_of(key) == "verification" and key.endswith(".Accuracy-Flip")


def is_count(key: str) -> bool:
    """The size of a set, which no checkpoint changes."""
    return bool(COUNTS.fullmatch(key))


def is_percentage(key: str) -> bool:
    return bool(FRACTIONS.fullmatch(key) or PERCENTAGES.fullmatch(key))


def scaled(key: str, value: float) -> float:
    """Rates in percent, whichever way the result holds them; all else as it is."""
    return 100 * value if FRACTIONS.fullmatch(key) else value


def show(key: str, figures: dict[str, float]) -> str:
    """One figure of a checkpoint as a cell: rates in percent with two decimals, marked if need be;
    "" if the checkpoint lacks it.
    """
    if key not in figures:
        return ""
    if is_count(key):
        return f"{figures[key]:,.0f}"
    form = "{:.2f}" if is_percentage(key) else "{:.4g}"
    return form.format(scaled(key, figures[key])) + mark_of(key, figures)


def show_limits(key: str, figures: dict[str, float]) -> str:
    """`` [low, high]`` of a figure's interval, "" if there is none."""
    nested = {key: figures.get(key), f"{key}-95": [figures.get(key + limit) for limit in LIMITS]}
    if None in nested[f"{key}-95"]:
        return ""
    factor = 100 if FRACTIONS.fullmatch(key) else 1
    return limits(nested, key, factor, 2 if is_percentage(key) else 4)


def mark_of(key: str, figures: dict[str, float]) -> str:
    match = re.fullmatch(r"(.+\.)[^.]+_at_f(?:pi?r|mr)_(.+)", key)
    if match is None:
        return ""
    count = "non_mated" if "_at_fpir_" in key else "impostor_pairs"
    return mark(float(match[2]), figures.get(match[1] + count))


def find_metric(name: str, keys) -> str:
    """The key that a person means: the key itself, the label of a headline (lfw, IJBC 1e-4), a set
    with one headline, or the end of one key (lfw.XNorm).

    Raises InputError that lists the nearest keys if there is none, and the candidates if there are
    several.
    """
    labels = headlines(keys)
    if name in keys:
        return name
    meant = (
        [key for key, label in labels.items() if label == name]
        or [key for key in keys if key.endswith(name) and key[-len(name) - 1] in "._:"]
        or [key for key in labels if key.split(".", 1)[1].startswith(f"{name}.")]
    )
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise InputError(f"--sort-by {name!r} is ambiguous: {listing(meant)}")
    near = nearest_keys(name, keys)
    advice = f"the nearest: {listing(near)}" if near else f"there are: {listing(list(keys))}"
    raise InputError(f"--sort-by {name!r}: no such figure; {advice}")


def nearest_keys(name: str, keys) -> list[str]:
    """The keys that are, or whose parts or labels are, spelled much like a name."""
    key_of = {}
    for key in keys:
        for spelling in (key, *key.split("."), label_of(key)):
            key_of[spelling.lower()] = key
    matches = get_close_matches(name.lower(), key_of, 5, 0.4)
    return list(dict.fromkeys(key_of[match] for match in matches))


def listing(keys: list[str], most: int = 8) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
