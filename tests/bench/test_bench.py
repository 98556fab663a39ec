"""The measurements of bench/ still run, at small sizes, and both ways give the same figures."""

import pytest

from bench import data_path, header, run
from bench.processes import Process
from tests import rounding


@pytest.mark.parametrize("method", ["AdaDistill", "standalone"])
def test_header_ways_agree(method, monkeypatch, one_thread):
    for name, value in dict(B=8, C=1500, D=32).items():
        monkeypatch.setattr(header, name, value)
    ways = {name: getattr(header, name)(method, "cpu") for name in ("Plain", "Ours")}
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
