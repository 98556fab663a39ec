"""The way from config.py, another file and the command line to one checked EasyDict.

No default stands here and none in rules.py: they are in config.py, and a key's type is its
default's. A key that config.py does not have, a value of another type and a combination that
makes no sense are errors before anything is built.
"""

import argparse
import ast
import runpy
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

from easydict import EasyDict as edict

from config import rules
from utils.errors import InputError, nearest
from utils.files import read_json

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = ROOT / "config" / "config.py"
# A configuration file is a program of the user's: an error in it is reported with its line.
CONFIG_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


class ConfigFile(NamedTuple):
    """What a configuration file sets itself: its values, and its table of data sets."""

    values: dict
    datasets: dict


def parse_arguments(description: str, method: str) -> tuple[edict, bool]:
    """Read a training script's command line: (resolved configuration, resume?).

    Raises InputError as ``load_config`` does, and for what makes no sense for the method.
    """
    parser = argument_parser(description, "loss=CosFace m=0.35", allow_abbrev=True)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest complete state in the output folder",
    )
    arguments = parser.parse_intermixed_args()
    cfg = load_config(arguments.config, arguments.overrides)
    rules.check_training(cfg, method)
    return cfg, arguments.resume


def argument_parser(
    description: str, example: str, allow_abbrev: bool = False
) -> argparse.ArgumentParser:
    """A parser of ``--config FILE`` and ``key=value`` overrides; example: of these."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=allow_abbrev,
    )
    parser.add_argument(
        "--config",
        default=str(DEFAULTS),
        metavar="FILE",
        help="configuration file (default: config/config.py)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help=f"configuration values, e.g. {example}",
    )
    return parser


def load_config(path: str | Path, overrides=()) -> edict:
    """A configuration file, with ``key=value`` overrides, as one checked EasyDict.

    path: a Python file that defines ``config`` (config/config.py, a copy of it, a file with only
    the changed keys, or one that imports config.config and edits it), or the config.json of a run.
    What a file leaves out comes from config/config.py. Paths become absolute.
    Raises InputError for anything unknown, of a wrong type, or contradictory.
    """
    path = Path(path)
    values, datasets = read_file(DEFAULTS)
    types = rules.types_of(values, datasets)
    if path.resolve() != DEFAULTS:
        own = read_file(path)
        values.update(own.values)
        datasets.update(own.datasets)
    given = parse_overrides(overrides, types)
    of_a_run = path.suffix == ".json"
    if of_a_run and given.get("dataset", values["dataset"]) != values["dataset"]:
        # config.json states the figures of the run's own set; another set brings its own
        values = {key: value for key, value in values.items() if key not in rules.DATASET_KEYS}
    values = check_values(values, types, ROOT) | given

    name = values["dataset"]
    if of_a_run and rules.DATASET_KEYS <= values.keys():
        # the set's entry may have stood in another file: config.json says all of it
        datasets.setdefault(name, {})
    check_dataset(name, datasets, types)
    values = check_values(datasets[name], types, ROOT) | values
    missing = [key for key in types if key not in values]
    if missing:
        raise InputError(
            f"the configuration has no {', '.join(missing)}: set it in config/config.py "
            f"or in its DATASETS entry {name!r}"
        )
    rules.check_combinations(values, given)
    if values["device"] == "mps":
        # BatchNorm's gradient there cannot be computed in this layout before PyTorch 2.13
        values["channels_last"] = False
    return edict(values)


def check_values(values: dict, types: dict, base: Path) -> dict:
    return {
        key: rules.check_value(key, value, type_of(key, types), base)
        for key, value in values.items()
    }


def type_of(key: str, types: dict):
    if key not in types:
        raise InputError(f"unknown configuration key {key!r}{nearest(key, types)}")
    return types[key]


def check_dataset(name: str, datasets: dict, types: dict) -> None:
    """Refuse a data set without an entry, and an entry with keys that belong above the table."""
    if name not in datasets:
        raise InputError(
            f"unknown dataset {name!r}{nearest(name, datasets)}; "
            f"DATASETS in config/config.py has: {', '.join(datasets)}"
        )
    entry = datasets[name]
    misplaced = [key for key in entry if key in types and key not in rules.DATASET_KEYS]
    if misplaced:
        raise InputError(
            f"DATASETS[{name!r}] sets {', '.join(misplaced)}, which belongs above it as "
            f"config.{misplaced[0]}; an entry may set {', '.join(sorted(rules.DATASET_KEYS))}"
        )


# --- files


def read_file(path: Path) -> ConfigFile:
    """The values that a configuration file sets itself, and its DATASETS."""
    if not path.is_file():
        raise InputError(f"no configuration file at {path.absolute()}")
    if path.suffix == ".json":
        values = read_json(path, "a dict of configuration values")
        # which script trained the run is no value of the configuration
        values.pop("method", None)
        return ConfigFile(values, {})
    # a file that imports the defaults and edits them gets fresh ones
    sys.modules.pop("config.config", None)
    try:
        names = runpy.run_path(str(path))
    except CONFIG_ERRORS as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{where_it_failed(error, path)}: {type(error).__name__}: {reason}"
        ) from error
    values = names.get("config")
    datasets = names.get("DATASETS", {})
    if not isinstance(values, dict):
        raise InputError(f"{path} defines no `config`: copy config/config.py and edit it")
    if not isinstance(datasets, dict) or not all(isinstance(x, dict) for x in datasets.values()):
        raise InputError(f"{path}: DATASETS must be a dict of dicts, as in config/config.py")
    return ConfigFile(dict(values), dict(datasets))


def where_it_failed(error: Exception, path: Path) -> str:
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f"{path}, line {lines[-1]}" if lines else str(path)


# --- the command line


def parse_overrides(overrides, types: dict) -> dict:
    """``key=value`` texts as checked values, relative paths from the current directory."""
    values = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"{override!r} is not key=value")
        kind = type_of(key, types)
        values[key] = rules.check_value(key, parse_text(text, kind), kind, Path.cwd())
    return values


def parse_text(text: str, kind):
    """A text of the command line as a value: strings bare, lists by commas, else literals."""
    if kind is str:
        return text
    if isinstance(kind, list) and not text.startswith("[") and text.lower() != "none":
        items = [item.strip() for item in text.split(",") if item.strip()]
        return items if kind[0] is str else [literal(item) for item in items]
    return literal(text)


def literal(text: str):
    """A Python literal, true, false and none in any case; else the text itself."""
    constants = {"true": True, "false": False, "none": None}
    if text.lower() in constants:
        return constants[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError):
        return text
