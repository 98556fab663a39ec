"""Whole training steps, validation and embedding on a GPU that is not there (pretended_gpu.py).

The training scripts themselves run, with every tensor of the step on "cuda:0": a tensor left on the
host, a type that does not fit or a shape that depends on values ends them, and so does whatever
makes the host wait for the GPU between two log lines. Nothing is computed. So this cannot see wrong
numbers, memory, speed, streams and their order, kernels that a GPU does not have, autograd's own
threads, torch.compile and CUDA graphs, NCCL, pinned memory, reading and saving: these run beside it
or are left out. Two ways of training do wait: precision=fp16, whose loss scaler reads once a step
whether a gradient was infinite, and centers_device=cpu, which copies blocks of centres.
"""

import pickle
import sys

import numpy as np
import pytest
import torch

from backbones import build_backbone
from bench.data_path import write_set
from eval import embed, verification
from tests.pretended_gpu import GPU, HostRead, PretendedGPU, backward
from tests.saved_sets import encode, smooth
from train import (
    build,
    cache_teacher,
    engine,
    feed,
    gradients,
    progress,
    run_state,
    train_AdaDistill,
    train_AMLDistill,
    train_standalone,
)
from utils import augment, distributed

IMAGES, CLASSES, SIZE, BATCH, PAIRS = 12, 5, 16, 4, 10
SCRIPTS = {
    "standalone": train_standalone,
    "AMLDistill": train_AMLDistill,
    "AdaDistill": train_AdaDistill,
}
pytestmark = [
    pytest.mark.usefixtures("in_this_process"),
    # bf16 must be on
    pytest.mark.filterwarnings("error:.*Disabling autocast"),
    # no pinned memory without a GPU
    pytest.mark.filterwarnings("ignore:'pin_memory'"),
    # whether centres have changed is seen at their address
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]
LIVE, CACHED = "pretrained_teacher_path={files}/teacher.pth", "teacher_embeddings={files}/cache"
GEOMETRY = ["use_geom_margin=True", "geom_margin_warmup_epoch=0"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A set, pairs, a teacher with its class centres and its cached features."""
    folder = tmp_path_factory.mktemp("files")
    write_set(str(folder / "set"), IMAGES, CLASSES, distinct=3)
    torch.manual_seed(0)
    teacher = build_backbone("iresnet18", SIZE)
    torch.save(teacher.state_dict(), folder / "teacher.pth")
    torch.save({"kernel": torch.randn(SIZE, CLASSES)}, folder / "header.pth")
    encoded = [encode(image) for image in smooth(2 * PAIRS)]
    (folder / "set" / "pairs.bin").write_bytes(pickle.dumps((encoded, [True, False] * 5)))
    features = np.ones((IMAGES, SIZE), np.float32)
    np.savez(folder / "features.npz", emb=features, emb_flip=features)
    with pytest.MonkeyPatch.context() as patch:
        arguments = [f"rec={folder}/set", "dataset=synthetic", "device=cpu"]
        source = ["--from", f"{folder}/features.npz", "--output", f"{folder}/cache"]
        patch.setattr(sys, "argv", ["cache_teacher.py", *arguments, *source])
        cache_teacher.main()
    return folder


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU on which steps compute; the host may wait for it where a log line is due."""
    gpu = PretendedGPU(monkeypatch)
    for place, name in (
        (engine.Engine, "__init__"),
        (engine.Engine, "train"),
        (build, "open_teacher"),
        (embed, "embed"),
    ):
        monkeypatch.setattr(place, name, gpu.on_it(getattr(place, name)))
    for place, name in ((build, "load_teacher"), (feed, "next_batch")):
        monkeypatch.setattr(place, name, gpu.beside_it(getattr(place, name)))
    embed_batch = embed._embed_batch
    train_step, is_due = engine.Engine.train_step, progress.Progress.is_due

    def strict_step(self, batches):
        gpu.reads.strict = True
        # all batches have one shape
        assert torch.backends.cudnn.benchmark
        return train_step(self, batches)

    def strict_unless_due(self, step, epoch_ended):
        due = is_due(self, step, epoch_ended)
        gpu.reads.strict = not due
        return due

    def strict_batch(*args, **options):
        with gpu.without_waiting():
            return embed_batch(*args, **options)

    monkeypatch.setattr(embed, "_embed_batch", strict_batch)
    monkeypatch.setattr(engine.Engine, "train_step", strict_step)
    monkeypatch.setattr(progress.Progress, "is_due", strict_unless_due)
    monkeypatch.setattr(run_state.RunState, "save", lambda state: None)
    make_resizing = augment.resizing.__wrapped__

    def resizing(size, device):
        with gpu.without_waiting(strict=False):
            return make_resizing(size, device)

    # once a run, and kept
    monkeypatch.setattr(augment, "resizing", resizing)
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: True)
    monkeypatch.setattr(distributed, "init", lambda *_arguments: GPU)
    # from the features, which have no numbers
    no_figures = dict.fromkeys(("Accuracy-Flip", "Accuracy-Std", "XNorm"), 0.0)
    monkeypatch.setattr(verification, "figures", lambda *_arguments: no_figures)
    return gpu


def train(method: str, files, monkeypatch, tmp_path, *options) -> None:
    """An epoch of three steps: log lines after the first and the last, then verification."""
    common = [
        "dataset=synthetic",
        f"rec={files}/set",
        f"val_rec={files}/set",
        "num_epoch=1",
        "val_targets=[]",
        "milestones=[]",
        f"embedding_size={SIZE}",
        f"batch_size={BATCH}",
        "num_workers=0",
        "teacher=iresnet18",
        f"output={tmp_path}/run",
    ]
    if method == "AMLDistill":
        common.append(f"pretrained_teacher_header_path={files}/header.pth")
    monkeypatch.setattr(
        sys,
        "argv",
        [f"train_{method}.py", *common, *(option.format(files=files) for option in options)],
    )
    SCRIPTS[method].main()


@pytest.mark.parametrize(
    "method, options",
    [
        ("standalone", ["loss=ArcFace", "sample_rate=0.5", "header_precision=tf32"]),
        ("standalone", ["loss=AdaFace", "sample_rate=0.5", "batch_size=2", "accumulate=2"]),
        ("AMLDistill", ["loss=CosFace", "precision=bf16", "augment=True"]),
        ("AMLDistill", ["loss=ArcFace", "precision=bf16", LIVE, *GEOMETRY]),
        (
            "AdaDistill",
            ["loss=ArcFace", "precision=bf16", LIVE, "val_targets=pairs", "feature_weight=1"],
        ),
        ("AdaDistill", ["loss=AdaFace", "centers_precision=bf16", "ema=0.9", CACHED, *GEOMETRY]),
    ],
)
def test_the_host_waits_for_the_gpu_at_log_lines_only(
    gpu, files, monkeypatch, tmp_path, method, options
):
    train(method, files, monkeypatch, tmp_path, *options)
    log = (tmp_path / "run" / "training.log").read_text()
    assert log.count("samples/sec") == 2, log
    assert ("Accuracy-Flip" in log) == ("val_targets=pairs" in options)


def test_a_step_that_reads_its_loss_is_refused(gpu, files, monkeypatch, tmp_path):
    monkeypatch.setattr(gradients.FiniteGuard, "note", lambda self, loss, norm: float(loss))
    with pytest.raises(HostRead, match="a value is read"):
        train("standalone", files, monkeypatch, tmp_path, "precision=fp32")


def test_embedding_fetches_features_once_a_part(gpu, monkeypatch):
    monkeypatch.setattr(embed, "ON_DEVICE", 8)
    network = gpu.on_it(build_backbone("mobilefacenet", SIZE).to)(GPU)
    # the last batch has two
    images = torch.zeros(18, 112, 112, 3, dtype=torch.uint8)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    benchmarks = []
    network.register_forward_hook(lambda *_: benchmarks.append(torch.backends.cudnn.benchmark))
    features, mirrored = embed.embed(network, images, BATCH, precision="bf16")
    assert features.shape == mirrored.shape == (18, SIZE)
    assert gpu.reads.fetched == 3
    assert benchmarks == [False] * 5 and torch.backends.cudnn.benchmark


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), x.sum()),
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: x.cpu(),
        lambda x: torch.zeros(2).copy_(x[:2]),
        lambda x: torch.ones(2, device="cpu").to(x.device),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
    ],
)
def test_what_waits_is_refused(gpu, read):
    x = gpu.on_it(lambda: torch.ones(4, device=GPU))()
    with pytest.raises(HostRead), gpu.without_waiting():
        gpu.on_it(read)(x)


def test_the_pretended_backward_pass_is_autograds(one_thread):
    network = build_backbone("mobilefacenet", SIZE)
    images = torch.randn(BATCH, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    gradients = []
    for run_backward in (torch.Tensor.backward, backward):
        network.zero_grad()
        run_backward(network(images).square().sum())
        gradients.append([weight.grad for weight in network.parameters()])
    # sums of two gradients, where residual connections meet, do not depend on their order
    assert all(map(torch.equal, *gradients))
