"""Every key of the configuration with its type, and the way from file and command line to one
checked EasyDict.

No defaults stand here: they are in config.py. A key that is not listed, a value of another type and
a combination that makes no sense are errors before anything is built.
"""

import argparse
import ast
import json
import runpy
import sys
import traceback
from pathlib import Path

from easydict import EasyDict as edict

from backbones import NAMES
from utils.errors import InputError, nearest
from utils.recordio.files import LABELS, split_paths
from utils.teacher.load import ONNX, TEACHERS

ROOT = Path(__file__).resolve().parents[1]
LOSSES = ("MLLoss", "CosFace", "ArcFace", "AdaFace")


class PathText(str):
    """A path: made absolute against the repository root or, from the command line, the current
    directory.
    """


class PathsText(str):
    """A path, or several: a list, or one text with commas between them (unless that is itself the
    path of something).
    """


# key: type, (type, smallest value), or a tuple of the allowed words
KEYS = {
    "dataset": str,
    "output": PathText,
    "seed": (int, 0),
    "device": str,
    "global_step": (int, 0),
    "network": str,
    "embedding_size": (int, 1),
    "SE": bool,
    "pretrained_backbone_path": PathText,
    "pretrained_header_path": PathText,
    "loss": LOSSES,
    "s": (float, 1e-9),
    "m": (float, 0),
    "h": (float, 0),
    "t_alpha": (float, 0),
    "adaptive_alpha": bool,
    "use_geom_margin": bool,
    "geom_margin_w": (float, 0),
    "geom_margin_k": (float, 0),
    "geom_margin_warmup_epoch": (float, 0),
    "sample_rate": (float, 0),
    "centers_device": ("auto", "cpu"),
    "centers_precision": ("fp32", "bf16"),
    "header_format": ("auto", "file", "shards"),
    "timeout": (float, 0),
    "teacher": str,
    "pretrained_teacher_path": PathText,
    "pretrained_teacher_header_path": PathText,
    "teacher_repo_id": str,
    "teacher_cache": PathText,
    "teacher_embeddings": PathText,
    "color_space": ("auto", "RGB", "BGR"),
    "batch_size": (int, 1),
    "accumulate": (int, 1),
    "lr": (float, 0),
    "momentum": (float, 0),
    "weight_decay": (float, 0),
    "grad_clip": (float, 0),
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "channels_last": bool,
    "compile": bool,
    "db_file_format": ("rec", "folder"),
    "rec": PathsText,
    "data_path": PathText,
    "sample": (int, 0),
    "num_classes": (int, 0),
    "num_image": (int, 0),
    "rec_backend": ("native", "mxnet"),
    "num_workers": (int, 0),
    "rec_labels": LABELS,
    "stage_to": PathText,
    "shuffle": bool,
    "shuffle_block": (int, 0),
    "flip": bool,
    "augment": bool,
    "max_bad_records": (int, 0),
    "num_epoch": (int, 1),
    "warmup_epoch": (int, 0),
    "milestones": [int],
    "log_every": (int, 1),
    "state_every": (int, 1),
    "keep_states": (int, 1),
    "val_rec": PathText,
    "val_targets": [str],
    "eval_step": (int, 0),
    "val_eval_every_n_epoch": (int, 0),
    "val_batch_size": (int, 1),
    "run_eval_at_start": bool,
    "eval_every_n_epoch": (int, 0),
    "eval_ijb": bool,
    "ijb_root": PathText,
    "ijb_targets": [str],
    "ijb_batch_size": (int, 1),
    "ijb_num_workers": (int, 0),
    "ijb_flip": bool,
    "eval_tinyface": bool,
    "tinyface_root": PathText,
    "tinyface_targets": [str],
    "tinyface_batch_size": (int, 1),
    "tinyface_num_workers": (int, 0),
    "tinyface_flip": bool,
}
MAY_BE_NONE = {"m"}
# what a DATASETS entry may set, and nothing else: the block of config.py has all other keys and
# would win
DATASET_KEYS = {
    "db_file_format",
    "rec",
    "data_path",
    "sample",
    "num_classes",
    "num_image",
    "num_epoch",
    "warmup_epoch",
    "milestones",
    "val_rec",
    "val_targets",
}
# What training with device=mps is limited to: float32, with everything in the memory that its GPU
# and CPU share; torch.compile for it is a prototype.
MPS_TAKES = {
    "precision": ("auto", "fp32"),
    "centers_precision": ("fp32",),
    "centers_device": ("auto",),
    "compile": (False,),
}
# a configuration file is a program of the user's: whatever goes wrong in it is told with its line
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


def parse_arguments(description: str, method: str) -> tuple[edict, bool]:
    """Read a training script's command line: (resolved configuration, resume?). Errors: as
    ``load_config``, and what makes no sense for the method.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        default=str(ROOT / "config" / "config.py"),
        metavar="FILE",
        help="configuration file (default: config/config.py)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest complete state in the output folder",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="configuration values, e.g. loss=CosFace m=0.35",
    )
    arguments = parser.parse_intermixed_args()
    cfg = load_config(arguments.config, arguments.overrides)
    # of training only: evaluation, which leaves BatchNorm's statistics alone, takes one image at a
    # time
    if cfg.batch_size == 1:
        raise InputError(
            "batch_size=1: BatchNorm needs at least two images per process; set "
            "batch_size=2 or more, accumulate makes larger steps"
        )
    for key, allowed in (MPS_TAKES if cfg.device == "mps" else {}).items():
        if cfg[key] not in allowed:
            raise InputError(
                f"{key}={cfg[key]} cannot be used with device=mps: set "
                f"{key}={allowed[-1]}, or another device"
            )
    if cfg.use_geom_margin and method == "standalone":
        raise InputError(
            "use_geom_margin needs a teacher: use AdaDistill or AMLDistill, or set "
            "use_geom_margin=False"
        )
    if cfg.teacher_embeddings and method == "standalone":
        raise InputError(
            "teacher_embeddings need a method with a teacher: use AdaDistill or "
            "AMLDistill, or set teacher_embeddings="
        )
    return cfg, arguments.resume


def load_config(path: str | Path, overrides=()) -> edict:
    """A configuration file, with ``key=value`` overrides, as one checked EasyDict with absolute
    paths.

    path: a Python file that defines ``config`` (config/config.py, a copy of it, a file with only
    the changed keys, or one that imports config.config and edits it), or the config.json of a run.
    What a file leaves out comes from config/config.py. Errors: InputError for anything unknown, of
    a wrong type, or contradictory.
    """
    values, datasets = read_file(ROOT / "config" / "config.py")
    if Path(path).resolve() != ROOT / "config" / "config.py":
        from_file, own_datasets = read_file(Path(path))
        values.update(from_file)
        datasets.update(own_datasets)
    given = parse_overrides(overrides)
    if (
        Path(path).suffix == ".json"
        and given.get("dataset", values["dataset"]) != values["dataset"]
    ):
        # a run's config.json states the figures of its own set; another set brings its own
        values = {key: value for key, value in values.items() if key not in DATASET_KEYS}
    values = {key: check_value(key, value, ROOT) for key, value in values.items()} | given

    name = values["dataset"]
    if Path(path).suffix == ".json" and DATASET_KEYS <= values.keys():
        # the set of a run whose DATASETS entry stood in another file; the json says all of it
        datasets.setdefault(name, {})
    if name not in datasets:
        raise InputError(
            f"unknown dataset {name!r}{nearest(name, datasets)}; DATASETS in "
            f"config/config.py has: {', '.join(datasets)}"
        )
    misplaced = [key for key in datasets[name] if key in KEYS and key not in DATASET_KEYS]
    if misplaced:
        raise InputError(
            f"DATASETS[{name!r}] sets {', '.join(misplaced)}, which belongs above it "
            f"as config.{misplaced[0]}; an entry may set {', '.join(sorted(DATASET_KEYS))}"
        )
    values = {key: check_value(key, value, ROOT) for key, value in datasets[name].items()} | values
    missing = [key for key in KEYS if key not in values]
    if missing:
        raise InputError(
            f"the configuration has no {', '.join(missing)}: set it in "
            f"config/config.py or in its DATASETS entry {values['dataset']!r}"
        )
    check_combinations(values)
    # BatchNorm's gradient on MPS cannot be computed in this layout before PyTorch 2.13
    values["channels_last"] = values["channels_last"] and values["device"] != "mps"
    return edict(values)


def parse_overrides(overrides) -> dict:
    """The command line's ``key=value`` words, checked, their relative paths made absolute from the
    current directory.
    """
    values = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"{override!r} is not key=value")
        values[key] = check_value(key, parse_text(key, text), Path.cwd())
    return values


def read_file(path: Path) -> tuple[dict, dict]:
    """The values a configuration file sets itself, and its DATASETS."""
    if not path.is_file():
        raise InputError(f"no configuration file at {path.absolute()}")
    if path.suffix == ".json":
        return read_json(path), {}
    # a file that imports the defaults and edits them gets fresh ones
    sys.modules.pop("config.config", None)
    try:
        found = runpy.run_path(str(path))
    except CONFIG_ERRORS as error:
        raise InputError(
            f"{where_it_failed(error, path)}: {type(error).__name__}: "
            f"{' '.join(str(error).split())}"
        ) from error
    values, datasets = found.get("config"), found.get("DATASETS", {})
    if not isinstance(values, dict):
        raise InputError(f"{path} defines no `config`: copy config/config.py and edit it")
    if not isinstance(datasets, dict) or not all(
        isinstance(entry, dict) for entry in datasets.values()
    ):
        raise InputError(f"{path}: DATASETS must be a dict of dicts, as in config/config.py")
    return dict(values), dict(datasets)


def where_it_failed(error: Exception, path: Path) -> str:
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}, line {error.lineno}"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(path)
    ]
    return f"{path}, line {lines[-1]}" if lines else str(path)


def read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:  # of syntax or encoding
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(
            f"{path} holds a {type(values).__name__}, not a dict of configuration values"
        )
    return values


def parse_text(key: str, text: str):
    """The command line's words as the key's type: Python literals, bare words for strings, commas
    for lists.
    """
    kind = expected(key)
    if isinstance(kind, list) and not text.startswith("["):
        words = [word.strip() for word in text.split(",") if word.strip()]
        return [
            kind[0](word) if kind[0] is str or word.lstrip("-").isdecimal() else word
            for word in words
        ]
    if kind in (str, PathText, PathsText) or isinstance(kind, tuple) and isinstance(kind[0], str):
        return text
    try:
        return ast.literal_eval(
            {"true": "True", "false": "False", "none": "None"}.get(text.lower(), text)
        )
    except (ValueError, TypeError, SyntaxError):
        return text


def expected(key: str):
    if key not in KEYS:
        raise InputError(f"unknown configuration key {key!r}{nearest(key, KEYS)}")
    return KEYS[key]


def check_value(key: str, value, base: Path):
    """The value in the key's type, paths absolute; InputError for another type, a value too small
    or an unknown word.
    """
    kind = expected(key)
    wrong = InputError(f"{key}={value!r} has the wrong type or value: expected {describe(kind)}")
    if value is None and key in MAY_BE_NONE:
        return None
    if isinstance(kind, list):
        if not isinstance(value, (list, tuple)) or any(type(item) is not kind[0] for item in value):
            raise wrong
        return list(value)
    if isinstance(kind, tuple) and isinstance(kind[0], str):
        if value not in kind:
            raise InputError(
                f"{key}={value!r} is unknown{nearest(value, kind)}; allowed: {', '.join(kind)}"
            )
        return value
    kind, smallest = kind if isinstance(kind, tuple) else (kind, None)
    if key == "teacher" and str(value).startswith(ONNX):
        return ONNX + str(base / Path(value.removeprefix(ONNX)).expanduser())
    if kind is PathsText:
        return check_paths(value, base, wrong)
    if kind is PathText:
        if not isinstance(value, (str, Path)):
            raise wrong
        return str(base / Path(value).expanduser()) if str(value) else ""
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or smallest is not None and not smallest <= value < float("inf"):
        raise wrong
    return value


def check_paths(value, base: Path, wrong: InputError) -> str | list[str]:
    """One path as it is, several as a list, absolute."""
    if isinstance(value, (str, Path)):
        value = split_paths(str(value), base)
    if not isinstance(value, (list, tuple)) or not all(
        isinstance(item, (str, Path)) for item in value
    ):
        raise wrong
    paths = [str(base / Path(item).expanduser()) for item in value if str(item)]
    return paths if len(paths) > 1 else "".join(paths)


def describe(kind) -> str:
    if isinstance(kind, list):
        return f"a list of {kind[0].__name__}"
    if isinstance(kind, tuple):
        if isinstance(kind[0], str):
            return " or ".join(kind)
        return f"{kind[0].__name__} of at least {kind[1]:g}"
    return {PathText: "a path", PathsText: "a path or a list of paths"}.get(kind, kind.__name__)


def check_combinations(values: dict) -> None:
    """Refuse what single values cannot show."""
    if not values["output"]:
        raise InputError("output is empty: name the folder of this run")
    if values["network"] not in NAMES:
        raise InputError(
            f"network={values['network']!r} is an unknown "
            f"network{nearest(values['network'], NAMES)}; known: {', '.join(NAMES)}"
        )
    teacher = values["teacher"]
    if teacher not in TEACHERS and not teacher.startswith(ONNX):
        raise InputError(
            f"teacher={teacher!r} is unknown{nearest(teacher, TEACHERS)}; known: "
            f"{', '.join(TEACHERS)}, {ONNX}PATH"
        )
    if values["teacher_embeddings"] and values["augment"]:
        raise InputError(
            "teacher_embeddings hold the features of the images as they are and "
            "mirrored: set augment=False, or teacher_embeddings= for the live teacher"
        )
    if (
        values["device"] not in ("auto", "cpu", "cuda", "mps")
        and not values["device"].removeprefix("cuda:").isdigit()
    ):
        raise InputError(f"device={values['device']!r} is unknown: auto, cpu, cuda, cuda:N or mps")
    if values["use_geom_margin"] and values["loss"] == "MLLoss":
        raise InputError(
            "use_geom_margin widens a margin and MLLoss has none: choose ArcFace, "
            "CosFace or AdaFace"
        )
    if any(milestone < 1 for milestone in values["milestones"]):
        raise InputError(f"milestones={values['milestones']}: epochs are counted from 1")
    for key in ("momentum", "t_alpha"):
        if values[key] > 1:
            raise InputError(f"{key}={values[key]} must be at most 1")
    if values["SE"] and not values["network"].startswith("iresnet"):
        raise InputError(f"SE=True needs an iresnet, not network={values['network']}")
    if values["db_file_format"] == "folder" and not values["data_path"]:
        raise InputError("db_file_format='folder' needs data_path, the folder of identities")
    if values["db_file_format"] == "folder" and values["rec_backend"] == "mxnet":
        raise InputError("rec_backend='mxnet' reads records, but db_file_format is 'folder'")
    if values["db_file_format"] == "rec" and not values["rec"]:
        raise InputError("db_file_format='rec' needs rec, the folder of train.rec")
    if values["shuffle_block"] and values["db_file_format"] == "folder":
        raise InputError(
            "shuffle_block reads records that lie together, but db_file_format is "
            "'folder': set shuffle_block=0, or pack the folder with data/make_rec.py"
        )
    if values["shuffle_block"] and not values["shuffle"]:
        raise InputError(
            "shuffle_block is a way of shuffling: set shuffle=True, or "
            "shuffle_block=0 for the order of the keys"
        )
    if values["stage_to"] and values["db_file_format"] == "folder":
        raise InputError(
            "stage_to copies record files, but db_file_format is 'folder': set "
            "stage_to=, or pack the folder with data/make_rec.py"
        )
    if values["warmup_epoch"] >= values["num_epoch"]:
        raise InputError(
            f"warmup_epoch={values['warmup_epoch']} leaves nothing of "
            f"num_epoch={values['num_epoch']}"
        )
    if not 0 < values["sample_rate"] <= 1:
        raise InputError(f"sample_rate={values['sample_rate']} must be above 0 and at most 1")
    for kind in ("ijb", "tinyface"):
        if values[f"eval_{kind}"] and not (values[f"{kind}_root"] and values[f"{kind}_targets"]):
            raise InputError(
                f"eval_{kind}=True needs {kind}_root, the folder of the sets, and "
                f"{kind}_targets, their names"
            )
    if values["val_targets"] and not values["val_rec"]:
        raise InputError("val_targets need val_rec, the folder of the .bin files")
