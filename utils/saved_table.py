"""Folders that Hugging Face's ``datasets`` wrote by ``save_to_disk``, their images still encoded.

Nothing is fetched, written or run.
"""

from collections.abc import Sequence
from pathlib import Path

from utils.errors import InputError, first_line
from utils.files import utf8_path

STATE = "state.json"
INFO = "dataset_info.json"
SPLITS = "dataset_dict.json"
# what datasets and pyarrow raise for folders that lack files, are cut off, damaged or written by
# another program
DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, NotImplementedError)
WHOLE_NUMBERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
STRINGS = ["string", "large_string"]
# column -> (in words, Arrow's types that fit)
SCHEMA = {
    "image": ("image", ["image"]),
    "index": ("whole number", WHOLE_NUMBERS),
    "path": ("string", STRINGS),
    "is_same": ("truth value", ["bool", *WHOLE_NUMBERS]),
    "label": ("whole number or string", [*WHOLE_NUMBERS, *STRINGS]),
}


def is_saved(folder: Path) -> bool:
    """Whether ``datasets`` wrote this folder, or a part of what it writes is there."""
    return any((folder / name).is_file() for name in (STATE, INFO, SPLITS))


def load_table(folder: Path, columns: Sequence[str], what: str, may_lack: bool = False):
    """The folder's ``datasets.Dataset``, images still encoded.

    columns: of SCHEMA, ``image`` among them, that must be there, and complete unless ``may_lack``.
    what: the folder should be, for messages. Raises InputError for a folder of several splits, one
    that is damaged or has other columns, and where the library cannot be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{folder} is a folder of Hugging Face's datasets library, which cannot be loaded "
            f"({first_line(error)}): pip install -r requirements/requirement.txt"
        ) from error
    if (folder / SPLITS).is_file():
        raise InputError(
            f"{folder} holds several splits ({SPLITS}), not one set; save the split "
            "that is the set, or name its folder"
        )
    datasets.disable_progress_bars()
    try:
        table = datasets.load_from_disk(utf8_path(folder.absolute()))
        check_schema(folder, table, columns, what, may_lack)
        return table.cast_column("image", datasets.Image(decode=False)).with_format(None)
    except InputError:
        raise
    except DAMAGED as error:
        raise InputError(
            f"{folder} is no readable folder of datasets' save_to_disk "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def check_schema(folder: Path, table, columns: Sequence[str], what: str, may_lack: bool) -> None:
    """Raises InputError unless ``columns`` are there as in SCHEMA, complete unless ``may_lack``."""
    types = {column: str(table.data.column(column).type) for column in table.column_names}
    if getattr(table.features.get("image"), "_type", "") == "Image":
        types["image"] = "image"
    fits = all(types.get(column) in SCHEMA[column][1] for column in columns)
    known = [column for column in columns if column in types]
    empty = [column for column in known if table.data.column(column).null_count]
    if fits and (may_lack or not empty):
        return
    present = ", ".join(f"{column} ({kind})" for column, kind in types.items())
    expected = ", ".join(f"{column} ({SCHEMA[column][0]})" for column in columns)
    without = f"; rows without {', '.join(empty)}" if empty else ""
    raise InputError(
        f"{folder} is no {what}: its columns are {present}{without}; expected are {expected}"
    )


def encoded_image(folder: Path, record: dict) -> bytes:
    """The image file in a row's ``image``, or the one whose path stands there.

    Raises InputError if there is neither, OSError if the file cannot be read.
    """
    if record["bytes"] is not None:
        return record["bytes"]
    if not record["path"]:
        raise InputError("the record holds neither an image nor the path of one")
    return (folder / record["path"]).read_bytes()
