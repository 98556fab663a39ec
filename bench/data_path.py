"""Images per second from a RecordIO file to a batch of normalised floats on the device, on one CPU core."""

import os

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader

from bench.plain import PlainSet
from utils.dataset import MXFaceDataset, keep_batch
from utils.images import to_input
from utils.loading import start_worker
from utils.recordio import IndexedRecordIO, IRHeader, pack, write_property

BATCH = 128


def write_set(folder: str, images: int, num_classes: int, distinct: int = 512) -> None:
    """A RecordIO set of 112x112 JPEGs of about 5.5 kB, MS1MV2's size: smooth shapes and some noise, of which ``distinct`` different ones repeat."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(distinct):
        image = cv2.resize(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8), (112, 112), interpolation=cv2.INTER_CUBIC)
        image = np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
        encoded.append(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 93])[1].tobytes())
    os.makedirs(folder, exist_ok=True)
    with IndexedRecordIO(f"{folder}/train.idx", f"{folder}/train.rec", "w") as records:
        for key in range(images):
            records.write_idx(key, pack(IRHeader(0, float(key * 7919 % num_classes), key, 0), encoded[key % distinct]))
    write_property(folder, num_classes)


class Way:
    """Both read the whole set once, shuffled. workers: 1, a reading process that shares the core with the one that trains; 0, none."""

    def __init__(self, folder: str, device: str, workers: int):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
        cv2.setNumThreads(0)
        self.folder, self.device = folder, torch.device(device)
        self.options = dict(num_workers=workers, persistent_workers=workers > 0, pin_memory=device == "cuda")
        self.loader = self.open()

    def step(self) -> dict:
        """The mean of two rows of every image: the same, mirrored or not."""
        total, count = 0.0, 0
        for batch in self.loader:
            images = self.images(batch)
            total, count = total + images[:, :, ::56].double().sum(), count + len(images)
        return dict(mean=float(total) / count, images=count)


class Plain(Way):
    def open(self):
        return DataLoader(PlainSet(self.folder), BATCH, shuffle=True, **self.options)

    def images(self, batch):
        images, labels = batch
        labels.to(self.device, non_blocking=True)
        return images.to(self.device, non_blocking=True)


class Ours(Way):
    def open(self):
        self.dataset = MXFaceDataset(self.folder)
        sampler = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(self.dataset), BATCH, drop_last=False)
        return DataLoader(self.dataset, batch_sampler=sampler, collate_fn=keep_batch, worker_init_fn=start_worker, **self.options)

    def images(self, batch):
        batch.labels.to(self.device, non_blocking=True)
        flip = torch.rand(len(batch.images)) < 0.5
        return to_input(batch.images.to(self.device, non_blocking=True), flip.to(self.device), channels_last=True)

    def limit(self) -> dict:
        """``cv2.imdecode`` alone, the bytes already in memory."""
        if not hasattr(self, "encoded"):
            records = IndexedRecordIO(f"{self.folder}/train.idx", f"{self.folder}/train.rec", "r")
            self.encoded = [np.frombuffer(records.read_idx(key), np.uint8, offset=24) for key in range(len(self.dataset))]
        for encoded in self.encoded:
            cv2.imdecode(encoded, cv2.IMREAD_COLOR)
        return {}
