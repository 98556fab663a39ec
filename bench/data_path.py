"""From a RecordIO file to a batch of normalised floats on the device, on one CPU core."""

import os

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader

from bench.plain import PlainSet
from utils.dataset.loader import open_loader
from utils.dataset.order import EpochBatches, mirrored
from utils.dataset.records import MXFaceDataset
from utils.inputs import to_input
from utils.precision import PRECISIONS, choose_precision
from utils.recordio.format import IRHeader, pack
from utils.recordio.indexed import IndexedRecordIO
from utils.recordio.writer import write_property

BATCH = 128


def write_set(folder: str, images: int, num_classes: int, distinct: int = 512) -> None:
    """A RecordIO set of 112x112 JPEGs of about 5.5 kB, MS1MV2's size: smooth shapes and some noise,
    of which ``distinct`` different ones repeat.
    """
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(distinct):
        small = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        image = cv2.resize(small, (112, 112), interpolation=cv2.INTER_CUBIC)
        image = np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
        encoded.append(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 93])[1].tobytes())
    os.makedirs(folder, exist_ok=True)
    with IndexedRecordIO(f"{folder}/train.idx", f"{folder}/train.rec", "w") as records:
        for key in range(images):
            header = IRHeader(0, float(key * 7919 % num_classes), key, 0)
            records.write_idx(key, pack(header, encoded[key % distinct]))
    write_property(folder, num_classes)


class Way:
    """Both read the whole set once, shuffled. workers: 1, a reading process that shares the core
    with the one that trains; 0, none.
    """

    def __init__(self, folder: str, device: str, workers: int, precision: str = "auto"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
        cv2.setNumThreads(0)
        self.folder = folder
        self.device = torch.device(device)
        # ours: what training feeds its networks on this device
        self.dtype = PRECISIONS[choose_precision(precision, self.device)] or torch.float32
        self.workers = workers
        self.loader = self.open()

    def step(self) -> dict:
        """The sums of two pixels of all images, by channel: of both ends of a row, the same
        mirrored or not.
        """
        total = torch.zeros(3, dtype=torch.float64, device=self.device)
        count = 0
        for batch in self.loader:
            ends = self.images(batch)[:, :, 56, ::111]
            total += ends.sum((0, 2), dtype=torch.float64)
            count += len(batch[0])
        red, green, blue = total.tolist()
        return dict(red=red, green=green, blue=blue, images=count)


class Plain(Way):
    def open(self):
        return DataLoader(
            PlainSet(self.folder),
            BATCH,
            shuffle=True,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self.device.type == "cuda",
        )

    def images(self, batch):
        images, labels = batch
        labels.to(self.device, non_blocking=True)
        return images.to(self.device, non_blocking=True)


class Ours(Way):
    def open(self):
        self.dataset = MXFaceDataset(self.folder)
        return open_loader(
            self.dataset,
            EpochBatches(len(self.dataset), BATCH, 0, 1, seed=0),
            BATCH,
            self.workers,
            self.device,
        )

    def images(self, batch):
        batch.labels.to(self.device, non_blocking=True)
        flip = mirrored(0, 0, 0, len(batch.images)).to(self.device)
        return to_input(
            batch.images.to(self.device, non_blocking=True),
            flip,
            channels_last=True,
            dtype=self.dtype,
        )

    def limit(self) -> dict:
        """``cv2.imdecode`` alone, the bytes already in memory."""
        if not hasattr(self, "encoded"):
            records = IndexedRecordIO(f"{self.folder}/train.idx", f"{self.folder}/train.rec", "r")
            self.encoded = [
                np.frombuffer(records.read_idx(key), np.uint8, offset=24)
                for key in range(len(self.dataset))
            ]
        for encoded in self.encoded:
            cv2.imdecode(encoded, cv2.IMREAD_COLOR)
        return {}
