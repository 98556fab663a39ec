"""Whole AdaDistill training steps from a RecordIO file.

A teacher (iResNet-50), live or from cached features, a MobileFaceNet student, 85,742 classes.
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
from bench.processes import measured, run_tool
from config.load import parse_arguments
from train import build, start_up
from train.engine import Engine
from train.validation import Validation
from utils import distributed
from utils.dataset.records import MXFaceDataset
from utils.inputs import to_input

D, C = 512, 85_742


def prepare(
    folder: Path, images: int, device: str, workers: int, classes: int, network: str
) -> None:
    """A set, a teacher with random weights, and its features: they teach nothing and cost as much
    as any.
    """
    write_set(folder, images, classes)
    torch.manual_seed(0)
    teacher = build_backbone(network, D).train()
    for module in teacher.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            # one look at images sets its statistics; with those it begins with, features overflow
            module.momentum = 1.0
    with torch.no_grad():
        teacher(to_input(MXFaceDataset(str(folder)).__getitems__(range(min(32, images))).images))
    torch.save(teacher.state_dict(), folder / "teacher.pth")
    run_tool(
        "train/cache_teacher.py",
        f"rec={folder}",
        "num_image=0",
        f"num_classes={classes}",
        f"teacher={network}",
        f"pretrained_teacher_path={folder}/teacher.pth",
        f"device={device}",
        f"num_workers={workers}",
        "--output",
        folder / "cache",
    )


def gigaflops(batch: int, live: bool, network: str) -> float:
    """Operations of one step's networks in 1e9, two for each multiply-add: student forward and
    backward, and the teacher ``network``.
    """
    student = build_backbone("mobilefacenet", D)
    teacher = build_backbone(network, D).eval()
    images = torch.zeros(2, 3, 112, 112)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        student(images)
    # backward makes two products for each one forward; counted there, depthwise convolutions would
    # be taken for dense ones
    operations = 3 * counter.get_total_flops()
    if live:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            teacher(images)
        operations += counter.get_total_flops()
    return operations / 2 * batch / 1e9


def say_rates(
    what: str, batch: int, work: float, seconds: float, best: float, calls: list[dict]
) -> None:
    """What ``seconds`` a step mean.

    work: 1e9 operations of the networks; best: TFLOP/s of a bf16 matrix product.
    """
    rate = work / seconds / 1e3
    waiting = calls[-1]["waiting"]
    print(
        f"  {what}: {batch / seconds:,.0f} images/s, {rate:.2f} TFLOP/s in the networks = "
        f"{100 * rate / best:.1f} % of the bf16 matrix rate ({best:.1f}), "
        f"{100 * waiting:.1f} % of the time waiting for data, {memory(calls)}",
        flush=True,
    )


def memory(calls: list[dict]) -> str:
    on_device = max(call["peak"] for call in calls)
    if on_device:
        return f"peak {on_device / 1e9:.2f} GB of GPU memory"
    beyond = max(call["bytes"] for call in calls)
    return f"peak {beyond / 1e9:.2f} GB beyond what is there before the first step"


class Way:
    """``steps``: training steps a call; the first call, in which everything compiles, is not
    counted by those who ask. compiled, graphs: of ours.
    """

    def __init__(
        self,
        folder: str,
        device: str,
        batch: int,
        workers: int,
        steps: int,
        classes: int = C,
        teacher: str = "iresnet50",
        live: bool = True,
        compiled: bool = True,
        graphs: bool = False,
    ):
        self.folder = Path(folder)
        self.device = torch.device(device)
        self.batch = batch
        self.workers = workers
        self.steps = steps
        self.classes = classes
        self.teacher_name = teacher
        self.live = live
        self.compiled = compiled
        self.graphs = graphs
        # as the engine trains, and plain scripts do
        torch.backends.cudnn.benchmark = True
        self.open()

    def compare(self) -> dict:
        """Loss and length of the gradient of the first step, on the first images of the set, none
        mirrored.
        """
        loss = self.loss_of_first()
        loss.backward()
        length = torch.nn.utils.get_total_norm([p.grad for p in self.student.parameters()])
        # the gradients' memory stays
        self.student.zero_grad(set_to_none=False)
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
        self.teacher = build_backbone(self.teacher_name, D).to(self.device).eval()
        self.teacher.load_state_dict(torch.load(self.folder / "teacher.pth", weights_only=True))
        self.header = PlainAdaDistill(D, self.classes).to(self.device)
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
            f"num_classes={self.classes}",
            f"teacher={self.teacher_name}",
            "val_targets=[]",
            f"output={self.folder}/run_{self.live}_{self.graphs}",
            f"batch_size={self.batch}",
            f"num_workers={self.workers}",
            f"compile={self.compiled}",
            f"cuda_graphs={self.graphs}",
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
            self.engine.optimizer.zero_grad(set_to_none=not self.graphs)
        return {}

    def matrix_rate(self) -> dict:
        """TFLOP/s of a large bf16 matrix product on this device."""
        n, rounds = (8192, 20) if self.device.type == "cuda" else (2048, 5)
        a = torch.randn(n, n, device=self.device, dtype=torch.bfloat16)
        b = a @ a

        def multiply() -> dict:
            for _ in range(rounds):
                torch.mm(a, a, out=b)
            return {}

        return dict(teraflops=2 * n**3 * rounds / measured(multiply)["seconds"] / 1e12)

    def close(self):
        self.feed.close()
        distributed.shutdown()
