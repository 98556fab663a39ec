"""RecordIO files as MXNet 1.9.1 writes them: records, indices, and the files of a set."""

from utils.recordio.format import IRHeader, pack, unpack
from utils.recordio.indexed import IndexedRecordIO

__all__ = ["IRHeader", "IndexedRecordIO", "pack", "unpack"]
