"""deploy/benchmark.py: multiply-adds against PyTorch's own counter and published figures, the table
as people get it. Needs requirements/onnx.txt.
"""

import json
import sys

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from backbones import build_backbone
from deploy import benchmark
from deploy.graph import to_onnx
from deploy.measure import count_in_graph, count_in_network, measure, multiply_adds
from deploy.model import load_model
from deploy.quantise import to_int8
from tests.commands import ROOT, run
from tests.teacher.test_onnx import onnx_model
from utils.errors import InputError

onnx = pytest.importorskip("onnx", reason="onnx is not installed (requirements/onnx.txt)")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (requirements/onnx.txt)")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "name, use_se, published",
    [
        ("mbf", False, 0.45e9),
        ("mobilefacenet", False, None),
        ("iresnet18", True, None),
        ("iresnet50", False, 6.3e9),
        ("ir18", False, None),
    ],
)
def test_multiply_adds(tmp_path, name, use_se, published):
    from onnxruntime.quantization import quantize_dynamic

    network = build_backbone(name, use_se=use_se).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.inference_mode():
        network(torch.zeros(1, 3, 112, 112))
    counted = count_in_network(network)
    assert counted == counter.get_total_flops() // 2 and (
        published is None or counted == pytest.approx(published, rel=0.05)
    )
    if name != "iresnet50":
        model = to_onnx(network)
        onnx.save(model, tmp_path / "x.onnx")
        assert count_in_graph(tmp_path / "x.onnx") == counted
    if name == "mobilefacenet":
        quantize_dynamic(tmp_path / "x.onnx", tmp_path / "dynamic.onnx")
        assert count_in_graph(tmp_path / "dynamic.onnx") == counted
        onnx.save(
            to_int8(to_onnx(network, uint8=True), np.zeros((2, 112, 112, 3), np.uint8), uint8=True),
            tmp_path / "x.onnx",
        )
        assert count_in_graph(tmp_path / "x.onnx") == counted


@pytest.mark.processes
def test_the_table(tmp_path):
    torch.manual_seed(0)
    network = build_backbone("mobilefacenet", 32)
    torch.save(network.state_dict(), tmp_path / "1backbone.pth")
    onnx.save(to_onnx(network), tmp_path / "1backbone.onnx")
    output = run(
        ROOT / "deploy" / "benchmark.py",
        tmp_path / "1backbone.pth",
        tmp_path / "1backbone.onnx",
        "--batch",
        4,
        "--threads",
        1,
        "--results-json",
        tmp_path / "table.json",
    )
    assert (
        output.splitlines()[0] == "CPU, 1 thread"
        and "images/s at 4" in output.splitlines()[1]
        and len(output.splitlines()) == 4
    )
    table = json.loads((tmp_path / "table.json").read_text())
    assert (table["device"], table["threads"], table["batch"]) == ("CPU", 1, 4)
    first, second = table["models"].values()
    assert (first["network"], first["parameters"], first["multiply_adds"]) == (
        "mobilefacenet",
        953_728,
        count_in_network(network),
    )
    assert second["multiply_adds"] == first["multiply_adds"]
    for row in (first, second):
        assert (
            row["latency_milliseconds"] > 0
            and row["images_per_second"] > 0
            and row["megabytes"] > 0
        )
    assert first["megabytes"] == pytest.approx((tmp_path / "1backbone.pth").stat().st_size / 1e6)


def test_a_model_of_others(tmp_path):
    model = load_model(onnx_model(tmp_path / "foreign.onnx"), "model")
    assert (
        model.name,
        model.embedding_size,
        model.step,
        model.checkpoint_sha256,
        multiply_adds(model),
    ) == ("?", 16, "", "", 3 * 16 * 16 * 16)


def test_timings_are_medians(monkeypatch):
    """With a clock of our own: one image takes 2, 2, ..., 50 s, four take 4."""
    lengths = {1: 2.0, 4: 4.0}
    now = [0.0]

    def network(images):
        now[0] += 50.0 if len(images) == 1 and now[0] == 4 else lengths[len(images)]

    monkeypatch.setattr("deploy.measure.time.perf_counter", lambda: now[0])
    timing = measure(network, 4, torch.device("cpu"))
    assert (timing.latency, timing.throughput) == (2.0, 1.0)


def test_wrong_input_is_said(tmp_path, monkeypatch):
    def refuses(message, *arguments):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, arguments)])
        with pytest.raises(InputError, match=message):
            benchmark.main()

    refuses("model: no file at", tmp_path / "none.onnx")
    refuses("model: no file at", tmp_path / "none.pth")
    (tmp_path / "x.onnx").write_text("text")
    refuses("x.onnx is no ONNX model", tmp_path / "x.onnx")
    refuses("--device gpu is unknown", tmp_path / "x.onnx", "--device", "gpu")
    refuses("--batch and --threads must be at least 1", tmp_path / "x.onnx", "--batch", 0)
    if not torch.backends.mps.is_available():
        refuses("asks for an Apple GPU", tmp_path / "x.onnx", "--device", "mps")
    if not torch.cuda.is_available():
        refuses("asks for a GPU", tmp_path / "x.onnx", "--device", "cuda")
    with pytest.raises(InputError, match="takes .* not"):
        load_model(onnx_model(tmp_path / "y.onnx", sizes=(3, 64, 64)), "model")
