"""A training set that Hugging Face's ``datasets`` saved: rows with ``image`` and ``label``.

No command.
"""

from collections.abc import Iterator
from pathlib import Path

from data.packing import BadImage
from data.record_stream import Sample, typed_label
from utils.errors import InputError
from utils.saved_table import DAMAGED, SPLITS, STATE, encoded_image, is_saved, load_table

SPLIT = "train"
ROWS_AT_A_TIME = 1000


class ArrowRows:
    """The rows of a folder, in their order: a source of ``data/record_stream.py``."""

    unit = "img"

    def __init__(self, folder: Path):
        """folder: of ``save_to_disk``; of several splits the one that is called train.

        Raises InputError if it is none, damaged, or has other columns.
        """
        if (folder / SPLITS).is_file() and (folder / SPLIT).is_dir():
            folder = folder / SPLIT
        if not is_saved(folder):
            raise InputError(
                f"{folder.absolute()} is no folder of datasets' save_to_disk: it has no {STATE}"
            )
        self.folder = folder
        self.table = load_table(folder, ("image", "label"), "training set", may_lack=True)
        # of datasets: a class that is not known
        self.no_label = -1 if hasattr(self.table.features["label"], "names") else None
        self.table = self.table.select_columns(["image", "label"])
        self.parts = range(0, len(self.table), ROWS_AT_A_TIME)
        self.sizes = [min(ROWS_AT_A_TIME, len(self.table) - first) for first in self.parts]

    def described(self) -> list:
        """What tells this folder from others: its state holds a fingerprint of all rows."""
        return [str(self.folder.absolute()), (self.folder / STATE).read_text(), len(self.table)]

    def samples(self, part: int) -> Iterator[tuple[tuple, int]]:
        """((row, its values), rows of the part read so far)."""
        first = self.parts[part]
        try:
            rows = self.table[first : first + ROWS_AT_A_TIME]
        except DAMAGED as error:
            raise InputError(f"{self.folder}: rows from {first} cannot be read: {error}") from error
        pairs = zip(rows["image"], rows["label"], strict=True)
        for number, (image, label) in enumerate(pairs):
            yield (f"row {first + number}", image, label), number + 1

    def read(self, sample: tuple[str, dict, int | str]) -> Sample:
        """Raises BadImage if the row lacks its image or label, or the label is no word."""
        name, image, label = sample
        if image is None or label is None or label == self.no_label:
            raise BadImage(f"{self.folder}, {name} has no {'image' if image is None else 'label'}")
        try:
            return Sample(name, encoded_image(self.folder, image), typed_label(label, name))
        except DAMAGED as error:
            raise BadImage(f"{self.folder}, {name}: {error}") from error
