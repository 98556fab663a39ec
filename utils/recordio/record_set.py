"""Several ``.rec`` files as one row of images, one file after another."""

import os
from collections.abc import Sequence

import numpy as np

from utils.errors import InputError
from utils.recordio.files import Folder
from utils.recordio.image_records import ImageRecords


class RecordSet:
    """The images of all record files of ``folders``, in their order.

    ``files``: the record files. ``folder_of_file``: (files,) the number of the folder of each.
    ``ends``: (files,) the index after the last image of each. Raises InputError if a file holds no
    image, and as ImageRecords.
    """

    def __init__(self, folders: Sequence[Folder], backend: str):
        self.folders = folders
        self.files = [
            ImageRecords(folder.path, rec, backend) for folder in folders for rec in folder.recs
        ]
        for file in self.files:
            if file.count == 0:
                raise InputError(
                    f"{file.path} holds no image; make the set again with data/make_rec.py or copy "
                    "it again"
                )
        self.folder_of_file = np.repeat(
            np.arange(len(folders)), [len(folder.recs) for folder in folders]
        )
        self.ends = np.cumsum([file.count for file in self.files])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, index: int) -> tuple[ImageRecords, int]:
        """(record file, number of the image in it)."""
        if len(self.files) == 1:
            return self.files[0], index
        number = self._file_number(index)
        file = self.files[number]
        return file, index - int(self.ends[number]) + file.count

    def folder_of(self, index: int) -> int:
        """The number of the folder that holds the image."""
        if len(self.folders) == 1:
            return 0
        return int(self.folder_of_file[self._file_number(index)])

    def _file_number(self, index: int) -> int:
        return int(np.searchsorted(self.ends, index, side="right"))

    def spans(self) -> list[slice]:
        """The indices of each file's images."""
        return [
            slice(int(end) - file.count, int(end))
            for file, end in zip(self.files, self.ends, strict=True)
        ]

    def in_folder(self, folder: int) -> list[ImageRecords]:
        """The record files of one folder."""
        of_file = zip(self.files, self.folder_of_file, strict=True)
        return [file for file, its_folder in of_file if its_folder == folder]

    def name_of(self, index: int) -> int | str:
        """What messages call an image: its key; of several files the file's name, of several
        folders its path, and the key.
        """
        file, at = self.locate(index)
        if len(self.files) == 1:
            return file.key(at)
        name = file.path if len(self.folders) > 1 else os.path.basename(file.path)
        return f"{name}:{file.key(at)}"
