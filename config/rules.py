"""What the defaults of config.py cannot show: paths, allowed words, bounds, None, combinations.

A key's type is that of its default (``types_of``). Everything else that is known of a key stands
here once.
"""

from pathlib import Path

from backbones import NAMES
from utils.errors import InputError, nearest
from utils.losses import check_options
from utils.losses.margins import MARGINS
from utils.recordio.files import split_paths
from utils.teacher.names import ONNX, TEACHERS

# One path, made absolute against the repository root or, from the command line, the current folder.
PATHS = {
    "output",
    "pretrained_backbone_path",
    "pretrained_header_path",
    "pretrained_teacher_path",
    "pretrained_teacher_header_path",
    "teacher_cache",
    "teacher_embeddings",
    "data_path",
    "stage_to",
    "val_rec",
    "ijb_root",
    "tinyface_root",
}
# One path or several: a list, or one text with commas (unless that is itself a path of something).
PATH_LISTS = {"rec"}
WORDS = {
    "loss": tuple(MARGINS),
    "centers_device": ("auto", "cpu"),
    "centers_precision": ("fp32", "bf16"),
    "header_precision": ("fp32", "tf32"),
    "header_format": ("auto", "file", "shards"),
    "color_space": ("auto", "RGB", "BGR"),
    "schedule": ("step", "poly", "cosine"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "db_file_format": ("rec", "folder"),
    "rec_backend": ("native", "mxnet"),
    "rec_labels": ("auto", "shared", "separate"),
}
# Keys that may be None, with the type they have otherwise.
MAY_BE_NONE = {"m": float, "lr_func": [float]}
# What lr_func takes the place of.
SCHEDULE_KEYS = ("schedule", "milestones", "warmup_epoch")
# Numbers are at least 0, and at least this where it says so.
LEAST = {
    "embedding_size": 1,
    "s": 1e-9,
    "batch_size": 1,
    "accumulate": 1,
    "num_epoch": 1,
    "log_every": 1,
    "state_every": 1,
    "keep_states": 1,
    "val_batch_size": 1,
    "ijb_batch_size": 1,
    "tinyface_batch_size": 1,
}
# What AdaDistill's files set for no warm-up.
NO_WARM_UP = -1
MOST = {"momentum": 1, "t_alpha": 1, "alpha": 1}
# What training with device=mps is limited to: float32, with everything in the memory that its GPU
# and CPU share; torch.compile for it is a prototype.
MPS_TAKES = {
    "precision": ("auto", "fp32"),
    "centers_precision": ("fp32",),
    "centers_device": ("auto",),
    "compile": (False,),
}
# Keys of files that people bring along, and that no longer do anything.
RETIRED = {"geom_margin_mask", "geom_margin_baseline"}
# What an entry of DATASETS may set, and nothing else: config.py sets all other keys above the
# table, and these would win.
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


def types_of(values: dict, datasets: dict) -> dict:
    """{key: type} of all keys, from the defaults; a list stands for itself, as [type of its items].

    values: of config.py; datasets: its DATASETS, whose first entry shows the types of a data set's
    keys.
    """
    defaults = next(iter(datasets.values())) | values
    types = {}
    for key, default in defaults.items():
        if key in MAY_BE_NONE:
            types[key] = MAY_BE_NONE[key]
        else:
            types[key] = [type(default[0])] if isinstance(default, list) else type(default)
    return types


def check_value(key: str, value, kind, base: Path):
    """The value of ``key`` in its type ``kind``, paths absolute from ``base``.

    Raises InputError for another type, a value out of bounds or an unknown word.
    """
    if value is None and key in MAY_BE_NONE:
        return None
    if key in WORDS:
        if value not in WORDS[key]:
            allowed = ", ".join(WORDS[key])
            near = nearest(value, WORDS[key])
            raise InputError(f"{key}={value!r} is unknown{near}; allowed: {allowed}")
        return value
    if key in PATH_LISTS:
        return check_paths(key, value, base)
    if key in PATHS:
        if not isinstance(value, (str, Path)):
            raise wrong(key, value, "a path")
        return absolute(value, base) if str(value) else ""
    if isinstance(kind, list):
        return check_list(key, value, kind[0])
    if key == "teacher" and str(value).startswith(ONNX):
        return ONNX + absolute(value.removeprefix(ONNX), base)
    if kind in (int, float):
        return check_number(key, value, kind)
    if type(value) is not kind:
        raise wrong(key, value, kind.__name__)
    return value


def check_list(key: str, value, item_type: type) -> list:
    if not isinstance(value, (list, tuple)):
        raise wrong(key, value, f"a list of {item_type.__name__}")
    if item_type is float:
        return [check_number(key, item, float) for item in value]
    if any(type(item) is not item_type for item in value):
        raise wrong(key, value, f"a list of {item_type.__name__}")
    return list(value)


def check_number(key: str, value, kind: type) -> int | float:
    """An int, or a float that may be written as an int, within its bounds."""
    if key == "warmup_epoch" and value == NO_WARM_UP:
        return 0
    if kind is float and type(value) is int:
        value = float(value)
    least = LEAST.get(key, 0)
    if type(value) is not kind or not least <= value < float("inf"):
        raise wrong(key, value, f"{kind.__name__} of at least {least:g}")
    if key in MOST and value > MOST[key]:
        raise InputError(f"{key}={value} must be at most {MOST[key]}")
    return value


def check_paths(key: str, value, base: Path) -> str | list[str]:
    """One path as it is, several as a list, absolute."""
    if isinstance(value, (str, Path)):
        value = split_paths(str(value), base)
    if not isinstance(value, (list, tuple)) or not all(isinstance(x, (str, Path)) for x in value):
        raise wrong(key, value, "a path or a list of paths")
    paths = [absolute(item, base) for item in value if str(item)]
    return paths if len(paths) > 1 else "".join(paths)


def absolute(path: str | Path, base: Path) -> str:
    return str(base / Path(path).expanduser())


def wrong(key: str, value, expected: str) -> InputError:
    return InputError(f"{key}={value!r} has the wrong type or value: expected {expected}")


def check_combinations(values: dict, overrides: dict) -> None:
    """Refuse what single values cannot show. Raises InputError.

    overrides: those of ``values`` that the command line has set.
    """
    check_student_and_loss(values)
    check_schedule(values, overrides)
    check_teacher(values)
    check_device(values)
    check_data(values)
    check_evaluation(values)


def check_training(values: dict, method: str) -> None:
    """Refuse what training by ``method`` cannot use, though other commands may. Raises InputError.

    Evaluation, which leaves BatchNorm's statistics alone, takes one image at a time.
    """
    if values["batch_size"] == 1:
        raise InputError(
            "batch_size=1: BatchNorm needs at least two images per process; "
            "set batch_size=2 or more, accumulate makes larger steps"
        )
    if values["cuda_graphs"] and not values["compile"]:
        raise InputError(
            "cuda_graphs=True records what torch.compile makes: set compile=True as well, "
            "or cuda_graphs=False"
        )
    if values["device"] == "mps":
        for key, allowed in MPS_TAKES.items():
            if values[key] not in allowed:
                raise InputError(
                    f"{key}={values[key]} cannot be used with device=mps: "
                    f"set {key}={allowed[-1]}, or another device"
                )
    check_options(**header_options(values), method=method)
    check_learning(values, method)
    if method == "standalone" and values["teacher_embeddings"]:
        raise InputError(
            "teacher_embeddings need a method with a teacher: use AdaDistill or AMLDistill, "
            "or set teacher_embeddings="
        )


def check_learning(values: dict, method: str) -> None:
    """Refuse a network that stands still where nothing moves the class centres either."""
    if method != "AMLDistill" and values["header_weight"]:
        return
    why = "header_weight=0" if method != "AMLDistill" else "AMLDistill"
    if values["freeze"]:
        raise InputError(
            f"freeze={values['freeze']}: in these epochs only the class centres learn, and nothing "
            f"moves them with {why}: set freeze=0"
        )
    if not values["backbone_lr"]:
        raise InputError(
            f"backbone_lr=0: only the class centres learn, and nothing moves them with {why}: set "
            "backbone_lr above 0"
        )


def header_options(values: dict) -> dict:
    """What ``check_options`` takes, but for the method."""
    keys = ("loss", "use_geom_margin", "sample_rate", "header_weight", "feature_weight")
    return {key: values[key] for key in keys}


def check_student_and_loss(values: dict) -> None:
    network = values["network"]
    if not values["output"]:
        raise InputError("output is empty: name the folder of this run")
    if network not in NAMES:
        raise InputError(
            f"network={network!r} is an unknown network{nearest(network, NAMES)}; "
            f"known: {', '.join(NAMES)}"
        )
    if values["SE"] and not network.startswith("iresnet"):
        raise InputError(f"SE=True needs an iresnet, not network={network}")
    check_options(**header_options(values))


def check_schedule(values: dict, overrides: dict) -> None:
    factors, num_epoch = values["lr_func"], values["num_epoch"]
    if factors is not None:
        for key in SCHEDULE_KEYS:
            if key in overrides:
                raise InputError(
                    f"{key}={overrides[key]} does nothing beside lr_func, whose factors are all "
                    "of the schedule: set lr_func=None, or leave it out"
                )
        if len(factors) != num_epoch:
            raise InputError(
                f"lr_func has the factors of {len(factors)} epochs, but num_epoch={num_epoch}: "
                "give one an epoch, or set lr_func=None for the schedule"
            )
    if any(milestone < 1 for milestone in values["milestones"]):
        raise InputError(f"milestones={values['milestones']}: epochs are counted from 1")
    if factors is None and values["warmup_epoch"] >= num_epoch:
        raise InputError(
            f"warmup_epoch={values['warmup_epoch']} leaves nothing of num_epoch={num_epoch}"
        )
    if values["freeze"] >= num_epoch:
        raise InputError(
            f"freeze={values['freeze']} leaves the network nothing of num_epoch={num_epoch}"
        )
    if values["ema"] >= 1:
        raise InputError(f"ema={values['ema']}: the average must move; set it below 1, or 0: none")


def check_teacher(values: dict) -> None:
    teacher = values["teacher"]
    if teacher not in TEACHERS and not teacher.startswith(ONNX):
        raise InputError(
            f"teacher={teacher!r} is unknown{nearest(teacher, TEACHERS)}; "
            f"known: {', '.join(TEACHERS)}, {ONNX}PATH: a ViT, and any other network, exported to "
            "ONNX (docs/teachers.md)"
        )
    if values["teacher_embeddings"] and values["augment"]:
        raise InputError(
            "teacher_embeddings hold the features of the images as they are and mirrored: "
            "set augment=False, or teacher_embeddings= for the live teacher"
        )


def check_device(values: dict) -> None:
    device = values["device"]
    known = device in ("auto", "cpu", "cuda", "mps") or device.removeprefix("cuda:").isdigit()
    if not known:
        raise InputError(f"device={device!r} is unknown: auto, cpu, cuda, cuda:N or mps")


def check_data(values: dict) -> None:
    if values["db_file_format"] == "folder":
        if not values["data_path"]:
            raise InputError("db_file_format='folder' needs data_path, the folder of identities")
        if values["rec_backend"] == "mxnet":
            raise InputError("rec_backend='mxnet' reads records, but db_file_format is 'folder'")
        if values["shuffle_block"]:
            raise InputError(
                "shuffle_block reads records that lie together, but db_file_format is 'folder': "
                "set shuffle_block=0, or pack the folder with data/make_rec.py"
            )
        if values["stage_to"]:
            raise InputError(
                "stage_to copies record files, but db_file_format is 'folder': "
                "set stage_to=, or pack the folder with data/make_rec.py"
            )
    elif not values["rec"]:
        raise InputError("db_file_format='rec' needs rec, the folder of train.rec")
    if values["shuffle_block"] and not values["shuffle"]:
        raise InputError(
            "shuffle_block is a way of shuffling: set shuffle=True, "
            "or shuffle_block=0 for the order of the keys"
        )


def check_evaluation(values: dict) -> None:
    for kind in ("ijb", "tinyface"):
        if values[f"eval_{kind}"] and not (values[f"{kind}_root"] and values[f"{kind}_targets"]):
            raise InputError(
                f"eval_{kind}=True needs {kind}_root, the folder of the sets, "
                f"and {kind}_targets, their names"
            )
    if values["val_targets"] and not values["val_rec"]:
        raise InputError("val_targets need val_rec, the folder of the pair sets")
