"""Whole AdaDistill training steps from a RecordIO file.

iResNet-50 teacher, live or from cached features, MobileFaceNet student, 85,742 classes.
"""

import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from backbones import build_backbone
from bench.data_path import write_set
from bench.plain import PlainAdaDistill, PlainSet
from bench.processes import run_tool
from config.load import parse_arguments
from train import build, start_up
from train.engine import Engine
from train.validation import Validation
from utils import distributed
from utils.dataset.records import MXFaceDataset
from utils.inputs import to_input

D, C = 512, 85_742


def prepare(folder: Path, images: int, device: str) -> None:
    """A set, a teacher with random weights, and its features: they teach nothing and cost as much
    as any.
    """
    write_set(folder, images, C)
    torch.manual_seed(0)
    teacher = build_backbone("iresnet50", D).train()
    for module in teacher.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            # one look at images sets its statistics; with those it begins with, features overflow
            module.momentum = 1.0
    with torch.no_grad():
        teacher(to_input(MXFaceDataset(str(folder)).__getitems__(range(32)).images))
    torch.save(teacher.state_dict(), folder / "teacher.pth")
    run_tool(
        "train/cache_teacher.py",
        f"rec={folder}",
        "num_image=0",
        f"pretrained_teacher_path={folder}/teacher.pth",
        f"device={device}",
        "--output",
        folder / "cache",
    )


def gigaflops(batch: int, live: bool) -> float:
    """Operations of one step's networks in 1e9, two for each multiply-add: student forward and
    backward, and teacher.
    """
    student = build_backbone("mobilefacenet", D)
    teacher = build_backbone("iresnet50", D).eval()
    images = torch.zeros(2, 3, 112, 112)
    with FlopCounterMode(display=False) as counter:
        student(images).sum().backward()
        if live:
            with torch.no_grad():
                teacher(images)
    return counter.get_total_flops() / 2 * batch / 1e9


class Way:
    """``steps``: training steps a call; the first call, in which everything compiles, is not
    counted by those who ask.
    """

    def __init__(
        self, folder: str, device: str, batch: int, workers: int, steps: int, live: bool = True
    ):
        self.folder = Path(folder)
        self.device = torch.device(device)
        self.batch = batch
        self.workers = workers
        self.steps = steps
        self.live = live
        self.open()

    def compare(self) -> dict:
        """Loss and length of the gradient of the first step, on the first images of the set, none
        mirrored.
        """
        loss = self.loss_of_first()
        loss.backward()
        length = torch.nn.utils.get_total_norm([p.grad for p in self.student.parameters()])
        self.student.zero_grad()
        return dict(loss=loss.item(), gradient=length.item())

    def step(self) -> dict:
        self.waited = 0.0
        started = time.perf_counter()
        for _ in range(self.steps):
            loss = self.train_step()
        # a GPU is done then
        float(loss)
        return dict(
            waiting=self.waited / (time.perf_counter() - started),
            peak=torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0,
        )


class Plain(Way):
    def open(self):
        torch.manual_seed(0)
        self.student = build_backbone("mobilefacenet", D).to(self.device).train()
        self.teacher = build_backbone("iresnet50", D).to(self.device).eval()
        self.teacher.load_state_dict(torch.load(self.folder / "teacher.pth", weights_only=True))
        self.header = PlainAdaDistill(D, C).to(self.device)
        self.optimizer = torch.optim.SGD(
            self.student.parameters(), lr=0.1 / 512 * self.batch, momentum=0.9, weight_decay=5e-4
        )
        loader = DataLoader(
            PlainSet(self.folder),
            self.batch,
            shuffle=True,
            drop_last=True,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )
        self.batches = iter(loader)

    def loss_of(self, images, labels):
        images = images.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        with torch.no_grad():
            features_t = self.teacher(images)
        return self.header(self.student(images), labels, features_t)

    def loss_of_first(self):
        first = PlainSet(self.folder, mirrored=0.0)
        images, labels = zip(*(first[index] for index in range(self.batch)), strict=True)
        return self.loss_of(torch.stack(images), torch.stack(labels))

    def train_step(self):
        started = time.perf_counter()
        images, labels = next(self.batches)
        self.waited += time.perf_counter() - started
        loss = self.loss_of(images, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.header.zero_grad()
        return loss.item()


class Ours(Way):
    """The project's own engine, as run_AdaDistill.sh starts it."""

    def open(self):
        teacher = f"teacher_embeddings={self.folder}/cache"
        if self.live:
            teacher = f"pretrained_teacher_path={self.folder}/teacher.pth"
        sys.argv = [
            "train_AdaDistill.py",
            "dataset=emoreIresNet",
            f"rec={self.folder}",
            "num_image=0",
            "val_targets=[]",
            f"output={self.folder}/run_{self.live}",
            f"batch_size={self.batch}",
            f"num_workers={self.workers}",
            "compile=True",
            f"device={self.device.type}",
            teacher,
        ]
        cfg, _ = parse_arguments(__doc__, "AdaDistill")
        self.context = start_up.start(cfg, False)
        run = self.context.__enter__()
        self.dataset = dataset = build.build_dataset(cfg)
        cfg = build.with_classes(cfg, dataset)
        validation = Validation(cfg)
        torch.manual_seed(0)
        student = build.build_student(cfg)
        header = build.build_header(cfg, "AdaDistill")
        teacher = build.open_teacher(cfg, run, dataset)

        def loss_of(student, batch, epoch):
            return header(student(batch.images), batch.labels, teacher(batch), epoch)

        self.engine = Engine(cfg, run, "AdaDistill", dataset, student, header, loss_of, validation)
        self.feed = self.engine.feed
        self.source = self.feed.read(self.engine.position)
        self.student = self.engine.backbone
        self.alone = None

    def loss_of_first(self):
        images = self.dataset.__getitems__(range(self.batch))
        self.feed.cfg.flip = False
        first = self.feed.to_inputs(images, 0, 0)
        self.feed.cfg.flip = True
        return self.engine.loss_of(self.engine.student, first, 0.0)[0]

    def train_step(self):
        before = self.feed.waited
        loss, _ = self.engine.train_step(self.source)
        self.waited += self.feed.waited - before
        self.engine.position.step += 1
        return loss

    def limit(self) -> dict:
        """The student's forward and backward pass alone, on one batch in place."""
        if self.alone is None:
            images = torch.randn(self.batch, 3, 112, 112, device=self.device)
            dtype = build.input_dtype(self.engine.cfg, self.engine.run)
            images = images.to(dtype, memory_format=torch.channels_last)
            self.alone = images, torch.randn(self.batch, D, device=self.device)
        images, direction = self.alone
        for _ in range(self.steps):
            (self.engine.student(images).float() * direction).sum().backward()
            self.engine.optimizer.zero_grad(set_to_none=True)
        return {}

    def matrix_rate(self) -> dict:
        """TFLOP/s of a large bf16 matrix product on this device."""
        n, rounds = (8192, 20) if self.device.type == "cuda" else (2048, 5)
        a = torch.randn(n, n, device=self.device, dtype=torch.bfloat16)
        b = a @ a
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(rounds):
            torch.mm(a, a, out=b)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        return dict(teraflops=2 * n**3 * rounds / seconds / 1e12)

    def close(self):
        self.feed.close()
        distributed.shutdown()
