"""``cuda_graphs``: nothing in a step forbids them, and nothing outlives what they overwrite.

No GPU is needed: networks play graphs that keep outputs and gradients in one place and spoil them
before they run again.
"""

import sys
from functools import partial

import pytest
import torch
from easydict import EasyDict

from backbones import build_backbone
from bench.data_path import write_set
from tests.runs.outputs import everything, rows
from train import start_up, train_AdaDistill, train_standalone
from utils.errors import InputError

SIZE = 16
pytestmark = pytest.mark.usefixtures("in_this_process")


class Replayed(torch.nn.Module):
    """A network whose outputs and gradients lie where its next run writes them again."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network
        self.places = {}
        for name, weight in network.named_parameters():
            if weight.requires_grad:
                weight.register_hook(partial(self.place, name))

    def forward(self, images):
        return InPlace.apply(self.network(images), self)

    def place(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        self.places.setdefault(name, torch.empty_like(tensor)).copy_(tensor)
        # a new tensor on the same memory, which autograd may keep as a gradient
        return self.places[name].detach()

    def spoil(self) -> None:
        for place in self.places.values():
            place.fill_(torch.nan)


class InPlace(torch.autograd.Function):
    """The output of a network, at its place."""

    @staticmethod
    def forward(ctx, output, network):
        return network.place("output", output)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@pytest.fixture
def graphs(monkeypatch):
    """The networks that torch.compile has been given, which play CUDA graphs on this CPU."""
    networks = []

    def compile(network, mode):
        assert mode == "reduce-overhead"
        networks.append(Replayed(network))
        return networks[-1]

    def mark_step_begin():
        for network in networks:
            network.spoil()

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", mark_step_begin)
    monkeypatch.setattr(start_up, "check_device", lambda cfg, device: None)
    return networks


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_set(str(folder / "set"), 16, 5, distinct=8)
    torch.manual_seed(0)
    torch.save(build_backbone("mobilefacenet", SIZE).state_dict(), folder / "teacher.pth")
    return folder


def train(script, files, monkeypatch, output, *options) -> None:
    """Two steps of two forward passes."""
    arguments = [
        "dataset=synthetic",
        "device=cpu",
        "precision=fp32",
        f"rec={files}/set",
        "num_epoch=1",
        "milestones=[]",
        "val_targets=[]",
        f"embedding_size={SIZE}",
        "batch_size=4",
        "accumulate=2",
        "num_workers=0",
        "log_every=1",
        "teacher=mobilefacenet",
        f"pretrained_teacher_path={files}/teacher.pth",
        f"output={output}",
    ]
    monkeypatch.setattr(sys, "argv", [script.__name__, *arguments, *options])
    script.main()


@pytest.mark.parametrize("script", [train_standalone, train_AdaDistill])
def test_nothing_outlives_what_a_graph_overwrites(script, graphs, files, monkeypatch, tmp_path):
    # the first epoch is frozen: nothing may move the network, weight decay neither
    options = ["num_epoch=2", "freeze=1"]
    if script is train_AdaDistill:
        options = ["loss=AdaFace", "use_geom_margin=True", "feature_weight=0.5", "ema=0.5"]
    train(script, files, monkeypatch, tmp_path / "plain", *options)
    assert not graphs
    last = rows(tmp_path / "plain")[-1]["step"]
    options += ["compile=True", "cuda_graphs=True"]
    train(script, files, monkeypatch, tmp_path / "graphs", *options)
    assert len(graphs) == (1 if script is train_standalone else 2)
    plain, replayed = everything(tmp_path / "plain", last), everything(tmp_path / "graphs", last)
    assert plain.keys() == replayed.keys()
    assert all(torch.equal(plain[name], replayed[name]) for name in plain)
    for before, after in zip(rows(tmp_path / "plain"), rows(tmp_path / "graphs"), strict=True):
        for figure in ("loss", "alpha", "margin_scaler", "geom"):
            assert before.get(figure) == after.get(figure)


@pytest.mark.parametrize("name", ["mobilefacenet", "iresnet18"])
def test_networks_are_one_graph(name):
    """A break in it is where Python goes on by itself, and the graphs would be several."""
    network = build_backbone(name, SIZE).train()
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(2, 3, 112, 112)).shape == (2, SIZE)


@pytest.mark.parametrize(
    "options, message",
    [
        (["cuda_graphs=True"], "set compile=True as well"),
        (["cuda_graphs=True", "compile=True"], "needs a CUDA GPU, but this run is on cpu"),
        (["header_precision=tf32"], "set header_precision=fp32"),
    ],
)
def test_what_only_a_gpu_can_do_is_refused(options, message, files, monkeypatch, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        train(train_standalone, files, monkeypatch, tmp_path / "run", *options)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_gpu_without_tf32_is_refused(monkeypatch):
    cfg = EasyDict(cuda_graphs=False, header_precision="tf32")
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(InputError, match="Tesla V100 does not multiply in tf32"):
        start_up.check_device(cfg, torch.device("cuda", 0))
