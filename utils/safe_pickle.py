"""Pickles of plain values, numpy arrays and tensors, read without running anything that such a
file could ask for.

A pickle names functions and calls them. None of the names admitted here leads to the real
function: each is answered by a small stand-in, so that nothing in a file reaches numpy's own state
setters, which trust what they are given. ``load_pickle`` reads pair sets (``lfw.bin``, ...),
``load_torch`` what ``torch.save`` wrote.
"""

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from utils.errors import InputError

# of arrays in general: numbers and booleans, strings, and objects that are plain values themselves
DTYPES = re.compile(r"[<|]?(b1|[iu][1248]|f[248]|U\d{1,6}|O8?)")
# of a pair set, without a byte order: every writer of such sets runs on "<" and "|"
PAIR_SET_DTYPES = ("b1", "u1", "i1", "i4", "i8")
# what else a NumPy array of the images may be, by the first letter of its type's name
OTHER_DTYPES = {
    "O": "an array of Python objects",
    "S": "an array of texts of one length, which end at their last byte that is not 0",
    "U": "an array of text, not of encoded images",
    "f": "an array of floats: pixels, or features, not encoded images",
}
# A path on Linux is shorter, and every JPEG or PNG has a control character in it.
LONGEST_NAME = 4096
# of a text that stands where an image should, in messages
SHOWN = 80
MEND = (
    "pickle plain lists, (list of encoded images as bytes, list of booleans), or pack the files "
    "with data/make_rec.py --pairs"
)

# A damaged stream makes the unpickler raise any of these (the pickle documentation promises no
# complete list).
DAMAGED = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
    OverflowError,
    MemoryError,
)


def load_pickle(path: Path):
    """Load a pickle of plain containers, strings, numbers, bytes and numpy arrays or scalars of
    simple types.

    Protocols 0 to 5, of Python 2 (whose strings become bytes) and 3. Raises InputError naming the
    file for a missing, damaged or truncated pickle and for any other global.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with path.open("rb") as file:
        try:
            return PairSetUnpickler(file, encoding="bytes").load()
        except DAMAGED as error:
            message = " ".join(str(error).split())
            raise InputError(
                f"{path}: not a readable pair set: {type(error).__name__}: {message}"
            ) from error


def load_torch(path: Path, stand_ins: dict[str, Callable]):
    """What ``torch.save`` wrote, on the CPU: tensors and plain values, and whatever ``stand_ins``
    make of the names they stand for.

    Raises what ``torch.load`` does, see ``refused_name``.
    """
    admitted = [(stand_in, name) for name, stand_in in stand_ins.items()]
    with torch.serialization.safe_globals(admitted):
        return torch.load(path, map_location="cpu", weights_only=True)


def refused_name(error: pickle.UnpicklingError) -> str:
    """The name that torch.load refused, "" if the file is merely damaged."""
    name = re.search(r"GLOBAL ([\w.]+)", str(error))
    return name[1] if name else ""


# --- pair sets


def as_plain(value):
    """Return ``value``, or the (n,) array that a pickled numpy array stands for."""
    return value.values.reshape(-1) if isinstance(value, Array) else value


def refuse_one_kind(same, where: str) -> None:
    """Raises InputError if all pairs are of one kind: accepting all, or none, would be right.

    same: whether each pair shows one person. where: begins the message.
    """
    if all(same) or not any(same):
        kind = "the same person" if any(same) else "different people"
        raise InputError(
            f"{where}: all {len(same)} pairs are of {kind}, so that any network would reach about"
            " 100 %; pairs of both kinds are needed"
        )


def encoded_image(entry, where: str) -> bytes | bytearray | np.ndarray:
    """The bytes of an image of a pair set. Raises InputError if the entry is anything else.

    where: begins the message.
    """
    entry = as_plain(entry)
    if isinstance(entry, np.ndarray) and entry.dtype == np.uint8:
        return entry
    if isinstance(entry, (bytes, bytearray)):
        # a pickle of Python 2 gives its texts as bytes
        if 0 < len(entry) < LONGEST_NAME and is_text(bytes(entry)):
            entry = os.fsdecode(bytes(entry))
        else:
            return entry
    if isinstance(entry, str):
        shown = entry if len(entry) <= SHOWN else f"{entry[:SHOWN]}..."
        what = f"text ({shown!r})"
    elif isinstance(entry, np.ndarray):
        what = f"a numpy array of {entry.dtype}"
    elif entry is None:
        what = "None"
    else:
        what = f"of the type {type(entry).__name__}"
    raise InputError(
        f"{where} is {what}, not an encoded image: data/make_rec.py --pairs packs the files"
    )


def is_text(content: bytes) -> bool:
    """Whether these bytes could be the name of a file: no control character among them."""
    return all(byte >= 32 and byte != 127 for byte in content)


class PairSetUnpickler(pickle.Unpickler):
    """Admits the names of ``PAIR_SET`` only."""

    def find_class(self, module: str, name: str) -> "Admitted":
        stand_in = PAIR_SET.get(f"{module}.{name}")
        if stand_in is None:
            raise pickle.UnpicklingError(
                f"refused {module}.{name}: a pair set holds only bytes, booleans and numpy arrays "
                f"of them; {MEND}"
            )
        return Admitted(stand_in)


class Admitted:
    """A callable that a pickle cannot change: the BUILD opcode writes attributes of anything."""

    __slots__ = ("_function",)

    def __init__(self, function):
        self._function = function

    def __call__(self, *arguments):
        return self._function(*arguments)

    def __setstate__(self, state):
        raise pickle.UnpicklingError("refused to change a function")


# --- stand-ins


class Ignored:
    """Takes whatever a pickle gives to an object, keeps and does nothing."""

    __slots__ = ()

    def __new__(cls, *_arguments):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


class Dtype:
    """Stand-in for numpy.dtype: a simple type, without numpy's __setstate__, by which a file could
    declare its bytes to be pointers.

    ``dtype``: None for other types, the content of which is passed over.
    """

    __slots__ = ("name", "dtype")

    def __init__(self, name, *_):
        self.name = as_text(name)
        self.dtype = np.dtype(self.name) if DTYPES.fullmatch(self.name) else None

    def __setstate__(self, state):
        if as_text(state[1]) == ">":
            self.name = f"big-endian {self.name}"
            self.dtype = None


class PairSetDtype(Dtype):
    """One of the few types that a pair set needs; any other is refused at once."""

    __slots__ = ()

    def __init__(self, name, *_):
        super().__init__(name)
        plain = self.name.lstrip("<|")
        if self.dtype is None or plain not in PAIR_SET_DTYPES:
            what = OTHER_DTYPES.get(plain[:1], f"known are {', '.join(PAIR_SET_DTYPES)}")
            raise pickle.UnpicklingError(f"refused numpy dtype {plain}, {what}; {MEND}")

    def __setstate__(self, state):
        super().__setstate__(state)
        if self.dtype is None:
            raise pickle.UnpicklingError("refused big-endian numpy data")


class Array:
    """Stand-in for numpy.ndarray, which a pickle creates empty and fills afterwards.

    ``values``: an array, the list that an array of objects is, or the Dtype of an array that was
    passed over.
    """

    __slots__ = ("values",)

    def __init__(self, *_type_and_shape):
        self.values = np.empty(0, np.uint8)

    def __setstate__(self, state):
        _version, shape, dtype, _is_fortran, content = state
        self.values = array_of(content, dtype, shape)


def array_of(content, dtype, shape: tuple):
    """What the state of a numpy array stands for, see ``Array.values``."""
    if not isinstance(dtype, Dtype):
        raise pickle.UnpicklingError(
            "refused a numpy array that is not made of a simple dtype and bytes"
        )
    if dtype.dtype is None:
        return dtype
    # strings, at best: the unpickler has let only plain values pass
    if dtype.dtype == object:
        if not isinstance(content, list):
            raise InputError("it holds a numpy array of objects that is no list")
        return content
    if not isinstance(content, (bytes, bytearray)):
        raise InputError("it holds a numpy array that is not made of bytes")
    return np.frombuffer(content, dtype.dtype).reshape(shape)


def array_from_buffer(content, dtype, shape, *_order) -> Array:
    """How protocol 5 writes an array."""
    array = Array()
    array.values = array_of(content, dtype, shape)
    return array


def scalar(dtype, content):
    """A single number or string, as Python's."""
    values = array_of(content, dtype, (1,))
    return values[0].item() if isinstance(values, np.ndarray) else values


def encode(text, encoding) -> bytes:
    """How Python 3 writes bytes in protocols 0 to 2."""
    if as_text(encoding) not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("refused an encoding other than latin1")
    return text.encode("latin1")


def plain_bytes(content=b"", *encoding) -> bytes:
    """Never ``bytes(n)``: a pickle of a few bytes could ask for all memory."""
    if encoding:
        return encode(content, *encoding)
    if not isinstance(content, (bytes, bytearray)):
        raise pickle.UnpicklingError("refused bytes made of anything but bytes")
    return bytes(content)


def as_text(value) -> str:
    text = value.decode("latin1") if isinstance(value, bytes) else value
    if not isinstance(text, str):
        raise pickle.UnpicklingError("expected a string")
    return text


# the names that files hold, as numpy 1 (core) and numpy 2 (_core) write them
NUMPY = {
    "numpy.dtype": Dtype,
    "numpy.ndarray": Array,
    "numpy.core.multiarray._reconstruct": Array,
    "numpy._core.multiarray._reconstruct": Array,
    "numpy.core.multiarray.scalar": scalar,
    "numpy._core.multiarray.scalar": scalar,
}
PAIR_SET = NUMPY | {
    "numpy.dtype": PairSetDtype,
    "numpy.core.numeric._frombuffer": array_from_buffer,
    "numpy._core.numeric._frombuffer": array_from_buffer,
    "_codecs.encode": encode,
    "builtins.bytes": plain_bytes,
    "builtins.bytearray": plain_bytes,
    "__builtin__.bytes": plain_bytes,
    "__builtin__.bytearray": plain_bytes,
}
