"""Whole AdaDistill training steps from a RecordIO file: iResNet-50 teacher, live or from cached features, MobileFaceNet student, 85,742 classes."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from backbones import build_backbone
from bench.data_path import write_set
from bench.plain import PlainAdaDistill, PlainSet
from bench.processes import ROOT
from config.schema import parse_arguments
from train import setup
from train.engine import Engine
from utils import distributed
from utils.losses import build_header

D, C = 512, 85_742


def prepare(folder: Path, images: int) -> None:
    """A set, a teacher with random weights, and made-up features of it: they teach nothing and cost as much as any."""
    write_set(folder, images, C)
    torch.manual_seed(0)
    torch.save(build_backbone("iresnet50", D).state_dict(), folder / "teacher.pth")
    features = np.random.default_rng(0).standard_normal((2, images, D), dtype=np.float32).astype(np.float16)
    np.savez(folder / "features.npz", emb=features[0], emb_flip=features[1])
    subprocess.run([sys.executable, ROOT / "train" / "cache_teacher.py", f"rec={folder}", "num_image=0", "--from", folder / "features.npz", "--output", folder / "cache"],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def gigaflops(batch: int, live: bool) -> float:
    """Operations of one step's networks in 1e9, two for each multiply-add: student forward and backward, and teacher."""
    student, teacher, images = build_backbone("mobilefacenet", D), build_backbone("iresnet50", D).eval(), torch.zeros(2, 3, 112, 112)
    with FlopCounterMode(display=False) as counter:
        student(images).sum().backward()
        if live:
            with torch.no_grad():
                teacher(images)
    return counter.get_total_flops() / 2 * batch / 1e9


class Way:
    """``steps``: training steps a call; the first call, in which everything compiles, is not counted by those who ask."""

    def __init__(self, folder: str, device: str, batch: int, workers: int, steps: int, live: bool = True):
        self.folder, self.device = Path(folder), torch.device(device)
        self.batch, self.workers, self.steps, self.live = batch, workers, steps, live
        self.open()

    def step(self) -> dict:
        self.waited, losses = 0.0, []
        started = time.perf_counter()
        for _ in range(self.steps):
            losses.append(self.train_step())
        loss = float(losses[0])
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return dict(loss=loss, waiting=self.waited / (time.perf_counter() - started), peak=torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0)


class Plain(Way):
    def open(self):
        torch.manual_seed(0)
        self.student = build_backbone("mobilefacenet", D).to(self.device).train()
        self.teacher = build_backbone("iresnet50", D).to(self.device).eval()
        self.teacher.load_state_dict(torch.load(self.folder / "teacher.pth", weights_only=True))
        self.header = PlainAdaDistill(D, C).to(self.device)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.1 / 512 * self.batch, momentum=0.9, weight_decay=5e-4)
        loader = DataLoader(PlainSet(self.folder), self.batch, shuffle=True, drop_last=True, num_workers=self.workers, pin_memory=self.device.type == "cuda")
        self.batches = iter(loader)

    def train_step(self):
        started = time.perf_counter()
        images, labels = next(self.batches)
        self.waited += time.perf_counter() - started
        images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        with torch.no_grad():
            features_t = self.teacher(images)
        loss = self.header(self.student(images), labels, features_t)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.header.zero_grad()
        return loss.item()


class Ours(Way):
    """The project's own engine, as run_AdaDistill.sh starts it."""

    def open(self):
        sys.argv = ["train_AdaDistill.py", "dataset=emoreIresNet", f"rec={self.folder}", "num_image=0", "val_targets=[]", f"output={self.folder}/run_{self.live}",
                    f"batch_size={self.batch}", f"num_workers={self.workers}", "compile=True", f"device={self.device.type}",
                    f"pretrained_teacher_path={self.folder}/teacher.pth" if self.live else f"teacher_embeddings={self.folder}/cache"]
        cfg, _ = parse_arguments(__doc__, "AdaDistill")
        self.context = setup.start(cfg, False)
        run = self.context.__enter__()
        dataset, validation = setup.build_dataset(cfg), setup.load_validation(cfg)
        torch.manual_seed(0)
        student = setup.build_student(cfg)
        header = build_header("AdaDistill", cfg.loss, cfg.embedding_size, cfg.num_classes, **setup.header_options(cfg))
        teacher = setup.open_teacher(cfg, run, dataset)

        def loss_of(student, batch, epoch):
            return header(student(batch.images), batch.labels, teacher(batch), epoch)
        self.engine = Engine(cfg, run, "AdaDistill", dataset, student, header, loss_of, validation)
        self.engine.open_window()
        self.source = self.engine.read_batches()
        self.alone = None

    def train_step(self):
        before = self.engine.waited
        loss, _ = self.engine.train_step(self.source)
        self.waited += self.engine.waited - before
        self.engine.step += 1
        return loss

    def limit(self) -> dict:
        """The student's forward and backward pass alone, on one batch in place."""
        if self.alone is None:
            self.alone = torch.randn(self.batch, 3, 112, 112, device=self.device).contiguous(memory_format=torch.channels_last), torch.randn(self.batch, D, device=self.device)
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
        return dict(teraflops=2 * n**3 * rounds / (time.perf_counter() - started) / 1e12)

    def close(self):
        from utils.loading import end_workers
        end_workers(self.engine.reading)
        distributed.shutdown()
