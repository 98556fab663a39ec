"""What happens to long runs: a rank that dies or hangs, a full disk, files damaged since; headers
in shares. In the end the weights of a run that nothing happened to.
"""

import signal

import pytest

from tests.commands import ROOT, run, run_until
from tests.runs.outputs import draw_faces, everything, same
from utils.run.hang_watch import Watch

STANDALONE, EXPORT, INTERFERE = (
    ROOT / "train" / "train_standalone.py",
    ROOT / "train" / "export_header.py",
    ROOT / "tests" / "runs" / "interfere.py",
)
SMALL = [
    "dataset=synthetic",
    "embedding_size=64",
    "batch_size=4",
    "num_epoch=1",
    "num_workers=1",
    "log_every=1",
    "lr=0.5",
    "val_targets=[]",
    "state_every=2",
]


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """64 images of 8 people: 8 steps of two ranks with 4 each."""
    return draw_faces(tmp_path_factory.mktemp("faces"), 8)


@pytest.fixture(scope="module")
def straight(faces, tmp_path_factory):
    """The run that nothing happens to."""
    output = tmp_path_factory.mktemp("straight") / "run"
    run(STANDALONE, *options(faces, output), ranks=2)
    return output


def options(faces, output, *more):
    return [*SMALL, f"rec={faces}", f"output={output}", *more]


@pytest.mark.processes
@pytest.mark.parametrize(
    "what, message",
    [
        ("die:5", ""),
        ("full:6", "6backbone.pth"),
    ],
)
def test_a_run_restarted_by_torchrun_ends_with_the_same_weights(
    what, message, faces, straight, tmp_path
):
    output = run(
        INTERFERE,
        what,
        STANDALONE,
        *options(faces, tmp_path, "timeout=1"),
        ranks=2,
        restarts=1,
        TORCH_ELASTIC_SHUTDOWN_TIMEOUT="3",
    )
    assert message in output and "Resumed at step 4" in output, output[-3000:]
    if what == "full:6":
        assert "cannot save" in output and "earlier checkpoints are untouched" in output
    assert same(tmp_path, straight, 8) and not list(tmp_path.glob("*.tmp*"))


@pytest.mark.processes
def test_a_rank_that_hangs_is_named(faces, straight, tmp_path):
    output = run(
        INTERFERE,
        "hang:6",
        STANDALONE,
        *options(faces, tmp_path, "timeout=0.1"),
        ranks=2,
        expect="error",
        TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1",
    )
    assert output.count("error: no progress") == 1
    assert (
        "no progress for 6 seconds (timeout): rank 1 is behind, the others wait for it; go on "
        "with --resume"
    ) in output
    run(STANDALONE, "--resume", *options(faces, tmp_path), ranks=2)
    assert same(tmp_path, straight, 8)


@pytest.mark.parametrize(
    "before, after, message",
    [
        (
            [(5, 7), (5, 7), (5, 7)],
            [(10, 7), (5, 7), (10, 7)],
            "rank 1 no longer answers, the others wait for it",
        ),
        (
            [(5, 7), (5, 6), (5, 7)],
            [(10, 7), (10, 6), (10, 7)],
            "rank 1 is behind, the others wait for it",
        ),
        (
            [(5, 7), (5, 7), (5, 7)],
            [(10, 7), (10, 7), (10, 7)],
            "ranks 0, 1, 2 stand still at the same point",
        ),
        (
            [(5, 7), (0, 0), (5, 7)],
            [(10, 7), (0, 0), (10, 7)],
            "rank 1 no longer answers, the others wait for it",
        ),
    ],
)
def test_who_is_named(before, after, message, monkeypatch, capsys):
    """(posts, collectives begun) of three ranks, five seconds apart, as rank 0 sees them."""
    watch = Watch(1)
    watch.world = 3
    monkeypatch.setattr("os._exit", lambda status: None)
    watch.end(before, after)
    assert capsys.readouterr().err == (
        f"error: no progress for 60 seconds (timeout): {message}; go on with --resume\n"
    )


@pytest.mark.processes
def test_damaged_states_are_passed_over(faces, straight, tmp_path):
    """Cut off, and with one wrong byte: the state before is used, and the log says so; where none
    is left, that is the message.
    """
    run_until(
        INTERFERE,
        "hold:7",
        STANDALONE,
        *options(faces, tmp_path, "keep_states=3"),
        ranks=2,
        log=tmp_path / "training.log",
        text="Global Step: 7 ",
    )
    torn, rotten = tmp_path / "6header.pth", tmp_path / "4backbone.pth"
    torn.write_bytes(torn.read_bytes()[:-1000])
    content = bytearray(rotten.read_bytes())
    content[len(content) // 2] ^= 1
    rotten.write_bytes(content)
    run(STANDALONE, "--resume", *options(faces, tmp_path, "keep_states=3"), ranks=2)
    log = (tmp_path / "training.log").read_text()
    assert (
        f"step 6 cannot be resumed from: {torn}" in log
        and (f"step 4 cannot be resumed from: {rotten}") in log
        and ("Resumed at step 2") in log
    )
    assert same(tmp_path, straight, 8)

    for file in tmp_path.glob("*state.pth"):
        file.write_bytes(b"")
    output = run(STANDALONE, "--resume", *options(faces, tmp_path), expect=1)
    assert output.startswith("error: resume: no state in") and output.count("\n") == 1


@pytest.mark.processes
def test_headers_in_shares_resume_bit_for_bit_and_move_between_ranks(faces, tmp_path):
    """Sampled classes and centres rounded at random too.

    Killed on 2 ranks, its newest state cut off, resumed; then a run that goes from 2 ranks to 1 and
    back to 2.
    """
    shares = ["header_format=shards", "sample_rate=0.6", "centers_precision=bf16", "loss=AdaFace"]
    plain, broken, moved = tmp_path / "plain", tmp_path / "broken", tmp_path / "moved"
    run(STANDALONE, *options(faces, plain, *shares), ranks=2)
    assert not (plain / "8header.pth").exists() and len(list((plain / "8header").iterdir())) == 4
    assert (
        run_until(
            INTERFERE,
            "hold:5",
            STANDALONE,
            *options(faces, broken, *shares),
            ranks=2,
            log=broken / "training.log",
            text="Global Step: 5 ",
        )
        == -signal.SIGKILL
    )
    torn = sorted((broken / "4header").iterdir())[-1]
    torn.write_bytes(torn.read_bytes()[:-10])
    assert f"step 4 cannot be resumed from: {broken / '4header'} is damaged" in run(
        STANDALONE, "--resume", *options(faces, broken, *shares), ranks=2
    )
    for folder in (plain, broken):
        run(EXPORT, folder / "8header")
    assert same(broken, plain, 8)
    assert set(everything(plain, 8)) > {"kernel", "batch_mean", "batch_std"}

    run_until(
        INTERFERE,
        "hold:3",
        STANDALONE,
        *options(faces, moved, *shares),
        ranks=2,
        log=moved / "training.log",
        text="Global Step: 3 ",
    )
    run_until(
        INTERFERE,
        "hold:5",
        STANDALONE,
        "--resume",
        *options(faces, moved, *shares, "batch_size=8"),
        log=moved / "training.log",
        text="Global Step: 5 ",
    )
    output = run(STANDALONE, "--resume", *options(faces, moved, *shares), ranks=2)
    assert "Resumed at step 4, epoch 0, 32 of its images done" in output
    run(EXPORT, moved / "8header")
    assert everything(moved, 8)["kernel"].isfinite().all()
    (moved / "8header" / sorted((moved / "8header").iterdir())[0].name).unlink()
    assert "missing" in run(
        STANDALONE,
        "--resume",
        *options(faces, moved, *shares, "num_epoch=2", "global_step=8"),
        ranks=2,
        expect="error",
    )
