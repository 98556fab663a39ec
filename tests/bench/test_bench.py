"""The measurements of bench/ still run, at small sizes, and both ways give the same figures."""

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import data_path, header, processes, roofline, run, training
from bench.processes import Process
from tests import rounding


@pytest.mark.parametrize("method", ["AdaDistill", "standalone"])
def test_header_ways_agree(method, monkeypatch, one_thread):
    monkeypatch.setattr(header, "D", 32)
    ways = {name: getattr(header, name)(method, "cpu", 8, 1500) for name in ("Plain", "Ours")}
    calls = {f"{name}.step": [way.step() for _ in range(3)] for name, way in ways.items()}
    # a logit's rounding, once for every step; the rate of 0.001 moves the centres too little to
    # enlarge it
    for figure in ("loss", "gradient"):
        run.check_equal(method, calls, figure, 3 * 2 * rounding.logit(32))
    assert calls["Ours.step"][0]["loss"] != calls["Ours.step"][2]["loss"], (
        "the centres have not moved"
    )
    assert ways["Ours"].limit() == dict(size=32)


@pytest.mark.processes
def test_data_ways_agree_in_processes_of_their_own(tmp_path):
    data_path.write_set(str(tmp_path), 256, 10)
    calls = run.in_turns(
        "bench.data_path",
        dict(folder=str(tmp_path), device="cpu", workers=0, precision="fp32"),
        rounds=1,
        limit=True,
    )
    # means of 3 million float32 numbers
    for figure in ("red", "green", "blue"):
        run.check_equal("data path", calls, figure, 1e-5)
    assert [call["images"] for call in calls["Ours.step"]] == [256, 256] and calls["Ours.limit"][0][
        "seconds"
    ] > 0
    row = run.Row("data path", "us", 4.0, 2.0, 8, 1.0, 1.43)
    assert run.table([row]).splitlines()[1].split() == [
        "data",
        "path,",
        "us",
        "4",
        "2",
        "2.0",
        "8",
        "1",
        "2.00",
        "1.43",
    ]


@pytest.mark.processes
def test_a_way_that_fails_is_no_figure(capfd):
    with (
        Process(
            "bench.data_path", "Ours", dict(folder="/nowhere", device="cpu", workers=0)
        ) as process,
        pytest.raises(RuntimeError, match="Ours ended in step"),
    ):
        process.call("step")
    assert "/nowhere" in capfd.readouterr().err


class InThisProcess(Process):
    """As Process, without the seconds that another Python takes to start."""

    def __init__(self, module: str, name: str, options: dict):
        self.way = getattr(importlib.import_module(module), name)(**options)

    def __exit__(self, *_error) -> None:
        if hasattr(self.way, "close"):
            self.way.close()

    def call(self, method: str) -> dict:
        return json.loads(json.dumps(processes.measured(getattr(self.way, method))))


def run_in_this_process(script: str, *arguments) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        importlib.import_module(script.removesuffix(".py").replace("/", ".")).main()


@pytest.mark.processes
def test_the_dry_run_goes_through_all_parts(
    monkeypatch, tmp_path, capsys, one_thread, in_this_process
):
    monkeypatch.setattr(run, "Process", InThisProcess)
    for place in (run, training):
        monkeypatch.setattr(place, "run_tool", run_in_this_process)
    # of data_path.py, which holds its process to one core
    monkeypatch.setattr(data_path.os, "sched_setaffinity", lambda *_arguments: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    # what the loader of either way is given
    monkeypatch.setattr(run, "DRY", run.DRY._replace(workers=0))
    monkeypatch.setattr(run, "cores", lambda: 0)
    arguments = ["run.py", "--cuda", "--dry-run", "--json", str(tmp_path / "rows.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    run.main()
    rows = [row["what"] for row in json.loads((tmp_path / "rows.json").read_text())]
    for part in ("data path", "decoded before", "AdaDistill header", "live", "CUDA graphs"):
        assert any(part in row for row in rows), rows
    assert "TFLOP/s in the networks" in capsys.readouterr().out


def test_a_gpu_is_measured_by_its_own_events():
    """On torch.cuda as it would answer: a call of 250 ms that takes 3 GB where 1 GB was."""
    clock, order = iter([0.0, 250.0]), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("record")
            self.at = next(clock)

        def elapsed_time(self, end):
            assert order[-1] == "synchronize"
            return end.at - self.at

    cuda = SimpleNamespace(
        Event=Event,
        synchronize=lambda: order.append("synchronize"),
        reset_peak_memory_stats=lambda: order.append("reset"),
        memory_allocated=lambda: 10**9,
        max_memory_allocated=lambda: 4 * 10**9,
    )
    figures = processes.measured_on_gpu(lambda: order.append("call") or {"loss": 1.0}, cuda)
    assert figures == dict(seconds=0.25, bytes=3 * 10**9, loss=1.0)
    assert order == ["synchronize", "reset", "record", "call", "record", "synchronize"]


def test_operations_on_paper_are_those_that_are_counted(monkeypatch):
    """Forward, where both count right; a student's backward pass has twice as many."""
    monkeypatch.setattr(roofline, "BATCH", 2)
    forward = sum(kernel.operations for kernel in roofline.of_network("mobilefacenet", False))
    both = sum(kernel.operations for kernel in roofline.of_network("mobilefacenet", True))
    # the first layer's images need no gradient
    first = 2 * 2 * 64 * 56 * 56 * 3 * 3 * 3
    assert both == 3 * forward - first
    assert training.gigaflops(2, False, "iresnet18") == pytest.approx(3 * forward / 1e9)


def test_fewer_bytes_are_moved_where_kernels_are_fused(monkeypatch):
    monkeypatch.setattr(roofline, "BATCH", 2)
    card = roofline.CARDS["H100 SXM"]
    for name, is_training in (("mobilefacenet", True), ("iresnet18", False)):
        kernels = roofline.of_network(name, is_training)
        eager, compiled, fused = (roofline.seconds(kernels, card, way) for way in range(3))
        assert eager > compiled > fused
        assert roofline.launches(kernels, 0) > roofline.launches(kernels, 1)
