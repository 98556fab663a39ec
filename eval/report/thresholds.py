"""thresholds.json: which similarity to ask for so that at most a chosen share of different people
is accepted. run_full_eval.py writes it, deploy/compare_faces.py reads it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from eval.report.html_report import PairExhibit
from eval.roc import Roc, resolves, threshold_at
from utils.errors import InputError
from utils.files import write_json

FARS = tuple(mantissa * 10.0**-exponent for exponent in range(6, 0, -1) for mantissa in (1, 2, 5))
FILE = "thresholds.json"


class Threshold(NamedTuple):
    """A pair is accepted if its cosine is at least ``cosine``: so were at most the share ``far`` of
    the impostor pairs of ``set``, and the share ``tar`` of the genuine ones.
    """

    set: str
    far: float
    cosine: float
    tar: float


def write_thresholds(
    path: Path, checkpoint: Path, sha256: str, color_space: str, exhibits: Sequence
) -> None:
    """Write the thresholds of all pair sets and of IJB's 1:1 (its first variant) that were
    measured, by write-then-rename.

    color_space: of the images that the network was trained on, as it was measured.
    A false accept rate stands there if the set has enough impostor pairs to show it.
    """
    sets = {}
    for exhibit in exhibits:
        if isinstance(exhibit, PairExhibit) and exhibit.rocs:
            roc = next(iter(exhibit.rocs.values()))
            sets[exhibit.set_name] = list_thresholds(roc, exhibit.intervals)
    content = dict(
        score="cosine",
        checkpoint=checkpoint.name,
        sha256=sha256,
        color_space=color_space,
        sets=sets,
    )
    write_json(path, content)


def list_thresholds(roc: Roc, intervals: dict[float, dict]) -> dict:
    at_far = {}
    for far in FARS:
        cosine, tar = threshold_at(roc, far)
        if resolves(far, roc.impostor) and math.isfinite(cosine):
            at_far[f"{far:g}"] = dict(cosine=cosine, tar=tar) | intervals.get(far, {})
    return dict(genuine_pairs=roc.genuine, impostor_pairs=roc.impostor, at_far=at_far)


def read_threshold(
    path: Path, far: float, name: str | None, digests: Mapping[str, str]
) -> Threshold:
    """The threshold of one set at one false accept rate.

    path: the file, or the folder of the report. name: of the set, None if there is only one.
    digests: {SHA-256: colour order, "" if unknown} of the model and of the checkpoint that it was
    made from. Raises InputError if the file is missing or damaged, of another network, or has no
    such set or rate.
    """
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise InputError(
            f"--report: no {path.absolute()}; eval/run_full_eval.py --report-dir "
            "writes it, or name the cosine with --threshold"
        )
    sets, digest, color_space = read(path)
    if digest not in digests:
        raise InputError(
            f"--report: {path} was measured with another network (SHA-256 "
            f"{digest[:12]}...): evaluate this one with eval/run_full_eval.py --report-dir, "
            "or name the cosine with --threshold"
        )
    if color_space and digests[digest] and digests[digest] != color_space:
        raise InputError(
            f"--report: {path} was measured as a network trained on {color_space} images, this one "
            f"is taken for one of {digests[digest]} images: evaluate it again with --color-space "
            f"{digests[digest]}, or compare with --color-space {color_space}"
        )
    if name is None and len(sets) != 1:
        raise InputError(
            f"--report: {path} has {len(sets)} sets ({', '.join(sets)}): choose one with --set"
        )
    name = name or next(iter(sets))
    if name not in sets:
        raise InputError(f"--set: {path} has no set {name}, only {', '.join(sets)}")
    rates = {float(rate): point for rate, point in sets[name].items()}
    chosen = next((rate for rate in rates if math.isclose(rate, far, rel_tol=1e-6)), None)
    if chosen is None:
        present = ", ".join(f"{rate:g}" for rate in rates) or "none"
        raise InputError(
            f"--far: {path} has no threshold of {name} at {far:g}, only at {present}: a rate needs "
            "as many impostor pairs as show it, and genuine ones that score above them"
        )
    return Threshold(name, chosen, rates[chosen]["cosine"], rates[chosen]["tar"])


def read(path: Path) -> tuple[dict[str, dict], str, str]:
    """({set: {rate: figures}}, SHA-256 of the checkpoint, its colour order) of the file.

    Raises InputError if it is not what ``write_thresholds`` writes.
    """
    try:
        content = json.loads(path.read_bytes())
        sets = {
            name: {
                rate: dict(cosine=float(point["cosine"]), tar=float(point["tar"]))
                for rate, point in figures["at_far"].items()
                if float(rate) > 0
            }
            for name, figures in content["sets"].items()
        }
        return sets, str(content["sha256"]), str(content.get("color_space", ""))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        # no JSON, or of another form
        raise InputError(
            f"--report: {path} holds no thresholds ({type(error).__name__}); "
            f"eval/run_full_eval.py --report-dir writes them into {FILE}"
        ) from error
