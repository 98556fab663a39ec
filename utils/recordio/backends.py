"""The two ways to read records: our own, and MXNet 1.9.1 itself."""

import os
import struct

from utils.errors import InputError, RecordError
from utils.recordio.format import IRHeader, unpack
from utils.recordio.indexed import IndexedRecordIO


class NativeRecords:
    """Records through ``utils.recordio``."""

    def __init__(self, index: IndexedRecordIO):
        self._index = index

    def read(self, position: int) -> tuple[IRHeader, memoryview]:
        """(header, encoded image) of the record at ``position``; RecordError if damaged."""
        header, encoded = unpack(memoryview(self._index.read_at(position)))
        return header, encoded


class MXNetRecords:
    """Records through MXNet itself, to prove that the native reader agrees.

    It needs Python <= 3.11 and requirements/mxnet.txt.
    """

    def __init__(self, index: IndexedRecordIO):
        try:
            import mxnet
        except (ImportError, OSError, AttributeError) as error:
            # OSError: a library is missing; AttributeError: NumPy has no np.bool
            raise InputError(
                'rec_backend "mxnet" needs MXNet, which does not import here '
                f"({error}); install requirements/mxnet.txt "
                f'in an environment with Python <= 3.11, or use rec_backend="native"'
            ) from None
        if not os.path.isfile(index.idx_path):
            raise InputError(
                f'rec_backend "mxnet" needs {index.idx_path}, and its folder is not '
                'writable; use rec_backend="native"'
            )
        self._keys = index.key_array
        self._records = mxnet.recordio.MXIndexedRecordIO(index.idx_path, index.rec_path, "r")
        self._unpack = mxnet.recordio.unpack
        self._error = mxnet.base.MXNetError

    def read(self, position: int) -> tuple[IRHeader, bytes]:
        """(header, encoded image) of the record at ``position``; RecordError if damaged."""
        key = int(self._keys[position])
        try:
            record = self._records.read_idx(key)
        except self._error as error:
            raise RecordError(f"key {key}: {str(error).strip().splitlines()[-1]}") from None
        if record is None:
            raise RecordError(f"key {key}: truncated, the file ends before it")
        try:
            return self._unpack(record)
        except (struct.error, ValueError) as error:
            raise RecordError(f"key {key}: its image header does not fit ({error})") from None


BACKENDS = {"native": NativeRecords, "mxnet": MXNetRecords}


def open_backend(backend: str, index: IndexedRecordIO) -> NativeRecords | MXNetRecords:
    """The reader named ``backend``: "native" or "mxnet"."""
    if backend not in BACKENDS:
        raise InputError(f"unknown rec_backend {backend!r}; known: {', '.join(BACKENDS)}")
    return BACKENDS[backend](index)
