"""Blocks of records, and a thread that reads them ahead: for disks whose random reads are slow.

A block is a run of records that lie one after another in a file.

The order of an epoch is then a shuffle of blocks (``utils.dataset.order``). While one window of
blocks is trained on, those of the next are read from the disk into the page cache, each in one go,
so that the small reads of the DataLoader's workers find them in memory. The ranks of a machine
share the blocks out and read each once; several machines each read all of them.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from utils.errors import RecordError
from utils.recordio.image_records import ImageRecords

# bytes of one read
AT_ONCE = 1 << 22


class RecordBlocks:
    """The images of ``files``, ``size`` at a time in the order of the files; the last block of a
    file is as small as its rest.
    """

    def __init__(self, files: Sequence[ImageRecords], size: int):
        self.files = files
        self.size = size
        self._orders = [file.file_order() for file in files]
        self._first_image = np.cumsum([0] + [file.count for file in files])
        self._first_block = np.cumsum([0] + [-(-file.count // size) for file in files])
        self.sizes = np.full(self._first_block[-1], size, np.int32)
        for file, end in zip(files, self._first_block[1:], strict=True):
            self.sizes[end - 1] = (file.count - 1) % size + 1

    def __len__(self) -> int:
        return len(self.sizes)

    def _place(self, block: int) -> tuple[int, int, int]:
        """(number of the file, first, end) of a block, counted in the order of the file."""
        number = int(np.searchsorted(self._first_block, block, side="right")) - 1
        first = (block - int(self._first_block[number])) * self.size
        return number, first, min(first + self.size, self.files[number].count)

    def indices(self, block: int) -> np.ndarray:
        """The indices in the data set of the block's images, int64, in the order of the file."""
        number, first, end = self._place(block)
        order = self._orders[number]
        images = np.arange(first, end) if order is None else order[first:end].astype(np.int64)
        return self._first_image[number] + images

    def extent(self, block: int) -> tuple[int, int, int]:
        """(number of the file, start, end): the bytes of the block, to the beginning of the next
        one or, at the last, to the end of its last record.
        """
        number, first, end = self._place(block)
        file = self.files[number]
        start = self._offset(number, first)
        if end < file.count:
            return number, start, self._offset(number, end)
        try:
            return number, start, file.glance(self._image(number, end - 1)).end
        except RecordError:
            return number, start, self._offset(number, end - 1)

    def _image(self, number: int, at: int) -> int:
        order = self._orders[number]
        return at if order is None else int(order[at])

    def _offset(self, number: int, at: int) -> int:
        return self.files[number].offset(self._image(number, at))

    def read(self, block: int) -> None:
        """Read the block from the disk, in one go and for the page cache only."""
        number, start, end = self.extent(block)
        self.files[number].index.records.read_through(start, end, AT_ONCE)


class ReadAhead:
    """Reads blocks in a thread beside the training. part, parts: this rank's share of every window,
    ``part`` of 0 ... ``parts`` - 1.
    """

    def __init__(self, blocks: RecordBlocks, part: int = 0, parts: int = 1):
        self.blocks = blocks
        self.part = part
        self.parts = parts
        self._thread = None
        self._reading = {}

    def start(self, window: int, blocks: np.ndarray) -> None:
        """Begin to read this rank's share of the blocks of ``window``."""
        self._reading[window] = self._submit(np.sort(blocks)[self.part :: self.parts])

    def finish(self, window: int, blocks: np.ndarray) -> None:
        """Wait until this rank's share of ``window`` is read; all of it if it was not begun, so
        that no rank begins among blocks that others still read.

        An unreadable disk is not reported here: the worker that needs a record there will name it.
        """
        for reading in self._reading.pop(window, None) or self._submit(np.sort(blocks)):
            reading.exception()

    def _submit(self, blocks: np.ndarray) -> list[Future]:
        """Reads in the order of the disk."""
        # here and not before: the DataLoader forks its workers first
        self._thread = self._thread or ThreadPoolExecutor(1)
        return [self._thread.submit(self.blocks.read, int(block)) for block in blocks]

    def stop(self) -> None:
        """Forget what is not read yet: the epoch is over, or training ends."""
        for readings in self._reading.values():
            for reading in readings:
                reading.cancel()
        self._reading.clear()
