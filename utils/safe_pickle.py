"""Read the pickles that pair sets (``lfw.bin``, …) are, without running anything that such a file
could ask for.

A pickle names functions and calls them. Only the names below are admitted, and none of them leads
to the real function: each is answered by a small stand-in that handles the one thing a pair set
needs - bytes, and flat numpy arrays and scalars of integers and booleans. So nothing in a file
reaches numpy's own state setters, which trust what they are given.
"""

import os
import pickle
from pathlib import Path

import numpy as np

from utils.errors import InputError

# Without a byte order: "<" and "|" are what every writer of pair sets runs on; ">" is refused.
_DTYPES = ("b1", "u1", "i1", "i4", "i8")

# What else a NumPy array of the images may be, by the first letter of its type's name.
_OTHER_DTYPES = {
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
    "with"
    " data/make_rec.py --pairs"
)

# A damaged stream makes the unpickler raise any of these (the pickle documentation promises no
# complete list).
_DAMAGED = (
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

    Protocols 0 to 5, of Python 2 (whose strings become bytes) and 3. Arrays come back flat,
    one-dimensional. Raises InputError naming the file for a missing, damaged or truncated pickle
    and for any other global.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with path.open("rb") as file:
        try:
            return _Unpickler(file, encoding="bytes").load()
        except _DAMAGED as error:
            raise InputError(
                f"{path}: not a readable pair set: {type(error).__name__}: {_one_line(error)}"
            ) from error


def as_plain(value):
    """Return ``value``, or the (n,) array that a pickled numpy array stands for."""
    return value.values if isinstance(value, _Array) else value


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
        if 0 < len(entry) < LONGEST_NAME and _is_text(bytes(entry)):
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


def _is_text(content: bytes) -> bool:
    """Whether these bytes could be the name of a file: no control character among them."""
    return all(byte >= 32 and byte != 127 for byte in content)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> "_Admitted":
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(
                f"refused {module}.{name}: a pair set holds only bytes, booleans and numpy arrays "
                "of"
                f" them; {MEND}"
            )
        return _ADMITTED[module, name]


class _Admitted:
    """A callable that a pickle can call and cannot change: the BUILD opcode writes attributes of
    whatever it is given.
    """

    __slots__ = ("_function",)

    def __init__(self, function):
        self._function = function

    def __call__(self, *arguments):
        return self._function(*arguments)

    def __setstate__(self, state):
        raise pickle.UnpicklingError("refused to change a function")


class _Dtype:
    """Stand-in for numpy.dtype: one of a few simple types."""

    __slots__ = ("name",)

    def __init__(self, name, *_):
        self.name = _text(name).lstrip("<|")
        if self.name not in _DTYPES:
            what = _OTHER_DTYPES.get(self.name[:1], f"known are {', '.join(_DTYPES)}")
            raise pickle.UnpicklingError(f"refused numpy dtype {self.name}, {what}; {MEND}")

    def __setstate__(self, state):
        if _text(state[1]) == ">":
            raise pickle.UnpicklingError("refused big-endian numpy data")


class _Array:
    """Stand-in for numpy.ndarray, which a pickle creates empty and fills afterwards."""

    __slots__ = ("values",)

    def __init__(self, values: np.ndarray = np.empty(0, np.uint8)):
        self.values = values

    def __setstate__(self, state):
        _version, _shape, dtype, _is_fortran, raw = state
        self.values = _from_buffer(raw, dtype)


def _from_buffer(raw, dtype) -> np.ndarray:
    if not isinstance(dtype, _Dtype) or not isinstance(raw, (bytes, bytearray)):
        raise pickle.UnpicklingError(
            "refused a numpy array that is not made of a simple dtype and bytes"
        )
    return np.frombuffer(raw, dtype.name)


def _reconstruct(*_type_and_shape):
    # Protocols 0 to 4: an empty array, filled by the state that follows.
    return _Array()


def _frombuffer(raw, dtype, *_layout):
    # Protocol 5.
    return _Array(_from_buffer(raw, dtype))


def _scalar(dtype, raw):
    return _from_buffer(raw, dtype)[0].item()


def _encode(text, encoding):
    # How Python 3 writes bytes in protocols 0 to 2.
    if _text(encoding) not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("refused an encoding other than latin1")
    return text.encode("latin1")


def _bytes(content=b"", *encoding):
    # Never bytes(n): a pickle of a few bytes could ask for all memory.
    if encoding:
        return _encode(content, *encoding)
    if not isinstance(content, (bytes, bytearray)):
        raise pickle.UnpicklingError("refused bytes made of anything but bytes")
    return bytes(content)


def _text(value) -> str:
    text = value.decode("latin1") if isinstance(value, bytes) else value
    if not isinstance(text, str):
        raise pickle.UnpicklingError("expected a string")
    return text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


_ADMITTED = {
    ("_codecs", "encode"): _Admitted(_encode),
    **{
        (module, name): _Admitted(_bytes)
        for module in ("builtins", "__builtin__")
        for name in ("bytes", "bytearray")
    },
    ("numpy", "dtype"): _Admitted(_Dtype),
    # an argument of the next; harmless when called
    ("numpy", "ndarray"): _Admitted(_reconstruct),
    **{
        (f"numpy.{core}.{module}", name): _Admitted(function)
        for core in ("core", "_core")
        for module, name, function in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _frombuffer),
        )
    },
}
