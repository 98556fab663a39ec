"""The images of one ``.rec``: which of its records they are, and how one is read."""

import logging
import os

import numpy as np

from utils.errors import InputError, RecordError
from utils.recordio.backends import open_backend
from utils.recordio.files import stem
from utils.recordio.format import MAGIC_BYTES, IRHeader, unpack
from utils.recordio.idx_file import rebuild_hint
from utils.recordio.indexed import IndexedRecordIO
from utils.recordio.reader import Glance

# offsets of every file that are looked at when it is opened
OFFSETS_LOOKED_AT = 64

# so many wrong ones show that the index is another file's; fewer are damaged records
FEWEST_WRONG = 4

# so many damaged records in a row are a damaged file: stop looking for a neighbour
LONGEST_HOLE = 1000

log = logging.getLogger(__name__)


class ImageRecords:
    """One ``.rec``: its index and which of its records are images.

    These are at the positions ``first`` ... ``first + count - 1``.
    Raises InputError if its ``.idx`` is another file's, or if its record 0 is.
    """

    def __init__(self, folder: str, rec: str, backend: str):
        self.path = os.path.join(folder, rec)
        self.index = IndexedRecordIO(os.path.join(folder, f"{stem(rec)}.idx"), self.path, "r")
        self._refuse_foreign_index()
        self.records = open_backend(backend, self.index)
        self.insightface, self.first, self.count = self._images()

    def _refuse_foreign_index(self) -> None:
        """Look at some offsets: in another file's index hardly any is where a record begins."""
        keys, offsets = self.index.key_array, self.index.index.offsets
        positions = sampled(len(keys), OFFSETS_LOOKED_AT)
        # what lies beyond a file that is cut off was reported when the index was opened
        positions = positions[offsets[positions] < os.path.getsize(self.path)]
        wrong = [
            position
            for position in positions
            if self.index.records.pread(4, int(offsets[position])) != MAGIC_BYTES
        ]
        if len(wrong) >= FEWEST_WRONG and 2 * len(wrong) > len(positions):
            raise InputError(
                f"{self.index.idx_path} is not the index of {self.path}: no record begins at "
                f"{len(wrong)} of {len(positions)} offsets that were looked at (the first: key "
                f"{keys[wrong[0]]}, offset {offsets[wrong[0]]}); "
                f"{rebuild_hint(self.index.idx_path)}, or copy both again"
            )

    def _images(self) -> tuple[bool, int, int]:
        """(whether the layout is InsightFace's, first position, number) of the images.

        InsightFace's record 0 tells the keys of the images, which the identities' records follow.
        Where the index has lost it, these tell themselves. Elsewhere all records are images.
        """
        keys = self.index.key_array
        if len(keys) == 0:
            return False, 0, 0
        if keys[0] != 0:
            end = self._first_identity(len(keys))
            if end == len(keys):
                return False, 0, end
            log.warning(
                "%s does not list record 0, which tells images from InsightFace's identity "
                "records: the %d records from key %d on, which hold ranges of keys and no image, "
                "are left out",
                self.index.idx_path,
                len(keys) - end,
                keys[end],
            )
            return True, 0, end
        glance = self.index.glance_at(0)
        if not glance.holds_keys:
            return False, 0, len(keys)
        return True, 1, self._end_of_images(glance.label) - 1

    def _end_of_images(self, first_identity: float) -> int:
        """The position after the last image. first_identity: which key is none, says record 0."""
        keys = self.index.key_array
        if not first_identity > 1:
            return 1
        end = len(keys)
        if first_identity <= keys[-1]:
            end = int(np.searchsorted(keys, keys.dtype.type(np.ceil(first_identity))))
            if self._has_image(end):
                raise InputError(
                    f"{self.path}: record 0 says that no image follows key {keys[end - 1]}, but "
                    f"key {keys[end]} is one: record 0 or {self.index.idx_path} is of another set; "
                    "copy both again, or pack the set again"
                )
        images = self._first_identity(end)
        if images < end:
            log.warning(
                "%s: record 0 says that images end before key %g, but the %d records from key %d "
                "on hold ranges of keys and no image: they are left out",
                self.path,
                first_identity,
                end - images,
                keys[images],
            )
        elif end - 1 < first_identity - 1:
            log.warning(
                "%s names %d of the %d images that record 0 of %s counts; %s",
                self.index.idx_path,
                end - 1,
                first_identity - 1,
                self.path,
                rebuild_hint(self.index.idx_path),
            )
        return images

    def _has_image(self, position: int) -> bool:
        try:
            return self.index.glance_at(position).has_image
        except RecordError:
            return False

    def _first_identity(self, end: int) -> int:
        """The position of the first identity record before ``end``; ``end``: there is none.

        All of them follow the images.
        """
        if not self._holds_range(end - 1):
            return end
        images, identities = 0, end - 1
        while images < identities:
            middle = (images + identities) // 2
            if self._holds_range(middle):
                identities = middle
            else:
                images = middle + 1
        return identities

    def _holds_range(self, position: int) -> bool:
        """Whether the record is one of InsightFace's identities: a range of keys, and no image.

        A damaged record is taken for what the one before it is.
        """
        for at in range(position, max(position - LONGEST_HOLE, -1), -1):
            try:
                header, encoded = unpack(self.index.read_at(at))
            except RecordError:
                continue
            if header.flag != 2 or len(encoded):
                return False
            start, end = header.label
            return bool(1 <= start <= end <= self.index.key_array[at])
        return False

    def key(self, at: int) -> int:
        return int(self.index.key_array[self.first + at])

    def offset(self, at: int) -> int:
        return int(self.index.index.offsets[self.first + at])

    def read(self, at: int) -> tuple[IRHeader, bytes]:
        """(header, encoded image) of the ``at``-th image; RecordError if it is damaged."""
        return self.records.read(self.first + at)

    def glance(self, at: int) -> Glance:
        """The start of the ``at``-th image's record; RecordError if it is damaged."""
        return self.index.glance_at(self.first + at)

    def label(self, at: int) -> float | None:
        """The label of the ``at``-th image; None if its header cannot be read."""
        try:
            glance = self.glance(at)
        except RecordError:
            return None
        return None if glance.id < 0 else glance.label

    def file_order(self) -> np.ndarray | None:
        """Numbers of the images in the order in which they lie in the file; None: as they are
        counted.
        """
        offsets = self.index.index.offsets[self.first : self.first + self.count]
        if bool((offsets[1:] > offsets[:-1]).all()):
            return None
        known = self.index.index.by_offset
        if known is None or len(known) != self.count:
            return np.argsort(offsets, kind="stable").astype(np.uint32)
        return known


def sampled(length: int, count: int) -> np.ndarray:
    """At most ``count`` indices spread evenly over 0 ... length - 1, both ends among them."""
    return np.unique(np.linspace(0, length - 1, min(length, count)).round().astype(np.int64))
