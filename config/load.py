"""The way from config.py, another file and the command line to one checked EasyDict.

No default stands here and none in rules.py: they are in config.py, and a key's type is its
default's. A key that config.py does not have, a value of another type and a combination that
makes no sense are errors before anything is built.
"""

import argparse
import ast
import logging
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

from easydict import EasyDict as edict

from config import rules
from utils.command_line import command_parser
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


log = logging.getLogger(__name__)


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
        help="go on from the newest complete state in the output folder; also --resume 0|1",
    )
    parser.add_argument(
        "--local-rank",
        "--local_rank",
        type=int,
        metavar="N",
        help="of torch.distributed.launch, which says the same in LOCAL_RANK",
    )
    arguments = parser.parse_intermixed_args(resume_as_flag(sys.argv[1:]))
    local_rank = arguments.local_rank
    if local_rank is not None and str(local_rank) != os.environ.get("LOCAL_RANK", "0"):
        warn(f"--local_rank {local_rank} chooses no GPU: set device=cuda:{local_rank}")
    cfg = load_config(arguments.config, arguments.overrides)
    rules.check_training(cfg, method)
    return cfg, arguments.resume


def resume_as_flag(arguments: list[str]) -> list[str]:
    """The arguments with ``--resume 1`` (AdaDistill's) as ``--resume``, without ``--resume 0``."""
    flags = []
    for argument in arguments:
        if argument in ("0", "1") and flags[-1:] == ["--resume"]:
            flags[-1] += f"={argument}"
        else:
            flags.append(argument)
    return ["--resume" if x == "--resume=1" else x for x in flags if x != "--resume=0"]


def warn(message: str) -> None:
    """Say it once: this process has not joined the other ranks yet."""
    if os.environ.get("RANK", "0") == "0":
        log.warning(message)


def argument_parser(
    description: str, example: str, allow_abbrev: bool = False
) -> argparse.ArgumentParser:
    """A parser of ``--config FILE`` and ``key=value`` overrides; example: of these."""
    parser = command_parser(description, allow_abbrev)
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
    the changed keys, one that imports config.config and edits it, or AdaDistill's), or the
    config.json of a run. What a file leaves out comes from config/config.py, but one that sets
    ``rec`` finds its pair sets there. Paths become absolute; a function ``lr_func`` becomes the
    list of its values.
    Raises InputError for anything unknown, of a wrong type, or contradictory.
    """
    path = Path(path)
    values, datasets = read_defaults()
    types = rules.types_of(values, datasets)
    given = parse_overrides(overrides, types)
    of_a_run = path.suffix == ".json"
    own = ConfigFile({}, {})
    if path.resolve() != DEFAULTS:
        own = read_file(path)
        values.update(own.values)
        datasets.update(own.datasets)
        if not of_a_run:
            check_choice(own, given, path)
    lr_func = None
    if callable(values["lr_func"]):
        # num_epoch, which its values depend on, is known last
        lr_func, values["lr_func"] = values["lr_func"], None
    if of_a_run and given.get("dataset", values["dataset"]) != values["dataset"]:
        # config.json states the figures of the run's own set; another set brings its own
        values = {key: value for key, value in values.items() if key not in rules.DATASET_KEYS}
    values = check_values(values, types, ROOT) | given

    name = values["dataset"]
    if of_a_run and rules.DATASET_KEYS <= values.keys():
        # the set's entry may have stood in another file: config.json says all of it
        datasets.setdefault(name, {})
    check_dataset(name, datasets, types)
    if own.values.get("rec") and "val_rec" not in own.datasets.get(name, {}):
        values.setdefault("val_rec", folder_of(values["rec"]))
    values = check_values(datasets[name], types, ROOT) | values
    missing = [key for key in types if key not in values]
    if missing:
        raise InputError(
            f"the configuration has no {', '.join(missing)}: set it in config/config.py "
            f"or in its DATASETS entry {name!r}"
        )
    if lr_func and "lr_func" not in given:
        factors = factors_of(lr_func, values["num_epoch"], path)
        values["lr_func"] = rules.check_value("lr_func", factors, types["lr_func"], ROOT)
    rules.check_combinations(values, given)
    if values["device"] == "mps":
        # BatchNorm's gradient there cannot be computed in this layout before PyTorch 2.13
        values["channels_last"] = False
    return edict(values)


def check_choice(own: ConfigFile, given: dict, path: Path) -> None:
    """Refuse another data set than a file has set its values for, by ``if config.dataset == ...``:
    the file cannot be asked again.
    """
    if "dataset" not in own.values or own.datasets:
        return
    chosen = own.values["dataset"]
    other = given.get("dataset", chosen)
    own_classes = "num_classes" in own.values and "num_classes" not in given
    if other != chosen and own_classes:
        raise InputError(
            f"dataset={other}: {path} has set num_classes and more for {chosen!r} itself; "
            "change config.dataset there"
        )


def folder_of(rec: str | list[str]) -> str:
    """The first folder that ``rec`` names, also by a .rec file in it."""
    first = Path(rec if isinstance(rec, str) else rec[0])
    return str(first.parent if first.suffix == ".rec" else first)


def factors_of(lr_func, num_epoch: int, path: Path) -> list:
    """A file's learning-rate function as a list: its value for every epoch, counted from 0."""
    try:
        return [lr_func(epoch) for epoch in range(num_epoch)]
    except CONFIG_ERRORS as error:
        raise InputError(described(error, path)) from error


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


def read_defaults() -> ConfigFile:
    """What config/config.py sets. Raises InputError if another repository's lies in its place."""
    defaults = read_file(DEFAULTS)
    if not defaults.datasets:
        raise InputError(
            f"{DEFAULTS} has no DATASETS: is it another repository's? Put ours back "
            "(git checkout config/config.py) and give that one by --config FILE"
        )
    return defaults


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
        raise InputError(described(error, path)) from error
    values = names.get("config")
    datasets = names.get("DATASETS", {})
    if not isinstance(values, dict):
        raise InputError(f"{path} defines no `config`: copy config/config.py and edit it")
    if not isinstance(datasets, dict) or not all(isinstance(x, dict) for x in datasets.values()):
        raise InputError(f"{path}: DATASETS must be a dict of dicts, as in config/config.py")
    for key in rules.RETIRED & values.keys():
        warn_of_retired(key)
    values = {key: value for key, value in values.items() if key not in rules.RETIRED}
    return ConfigFile(values, dict(datasets))


def warn_of_retired(key: str) -> None:
    warn(f"{key} does nothing: the geometry margin goes by the teacher's confidence instead")


def described(error: Exception, path: Path) -> str:
    """What has failed in a configuration file, and where, in one line."""
    reason = " ".join(str(error).split())
    return f"{where_it_failed(error, path)}: {type(error).__name__}: {reason}"


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
        if key in rules.RETIRED:
            warn_of_retired(key)
            continue
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
