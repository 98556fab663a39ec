"""AdaDistill's configuration files go in by --config as they are."""

import json
import runpy
import sys

import pytest
import torch

from config import load
from config.load import ROOT, load_config, parse_arguments
from tests.adadistill import GEOMETRY, PLAIN, write
from train.schedule import learning_rate
from utils.errors import InputError


def refused(message, path, *overrides):
    with pytest.raises(InputError, match=message) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)


def test_the_plain_file(tmp_path):
    cfg = load_config(write(tmp_path, PLAIN))
    assert (cfg.rec, cfg.val_rec) == (str(ROOT / "data/ms1mv2"),) * 2
    assert (cfg.num_classes, cfg.num_epoch, cfg.warmup_epoch) == (85742, 26, 0)
    assert (cfg.val_targets, cfg.eval_step, cfg.m) == (["lfw", "agedb_30"], 5686, 0.45)
    defaults = load_config(load.DEFAULTS)
    assert (cfg.sample_rate, cfg.h) == (defaults.sample_rate, defaults.h)
    assert cfg.keys() == defaults.keys()


def test_the_block_of_another_data_set(tmp_path):
    cfg = load_config(write(tmp_path, PLAIN, "Idifface"))
    assert (cfg.db_file_format, cfg.sample, cfg.num_epoch) == ("folder", 50, 60)
    assert (cfg.data_path, cfg.val_rec) == (
        str(ROOT / "dataset/Idifface"),
        str(ROOT / "data/ms1mv2"),
    )
    refused(
        "dataset=Idifface: .*theirs.py has set num_classes and more for 'emoreIresNet' itself; "
        "change config.dataset there",
        write(tmp_path, PLAIN),
        "dataset=Idifface",
    )


@pytest.mark.parametrize(
    "rec, folder",
    [
        ("faces", "faces"),
        (["faces", "more"], "faces"),
        ("faces/train_1.rec", "faces"),
    ],
)
def test_pair_sets_lie_in_rec_unless_val_rec_is_set(tmp_path, rec, folder):
    path = tmp_path / "mine.py"
    path.write_text(f"config = dict(rec={rec!r})")
    assert load_config(path).val_rec == str(ROOT / folder)
    assert load_config(path, [f"rec={tmp_path}"]).val_rec == str(tmp_path)
    assert load_config(path, [f"val_rec={tmp_path}"]).val_rec == str(tmp_path)
    path.write_text(f"config = dict(rec={rec!r}, val_rec='pairs')")
    assert load_config(path).val_rec == str(ROOT / "pairs")


def test_the_file_with_a_geometry_margin(tmp_path, caplog):
    cfg = load_config(write(tmp_path, GEOMETRY))
    assert sorted(caplog.messages) == [
        f"{key} does nothing: the geometry margin goes by the teacher's confidence instead"
        for key in ("geom_margin_baseline", "geom_margin_mask")
    ]
    assert (cfg.geom_margin_k, cfg.geom_margin_warmup_epoch, cfg.warmup_epoch) == (3.0, 1.0, 2)
    assert (cfg.val_rec, cfg.ijb_targets[0]) == (str(ROOT / "dataset/pairs"), "IJBB_gt_aligned")
    assert not {"geom_margin_mask", "geom_margin_baseline"} & cfg.keys()
    caplog.clear()
    load_config(load.DEFAULTS, ["geom_margin_mask=0.5"])
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("text", [PLAIN, GEOMETRY])
def test_every_step_has_the_learning_rate_of_the_founding_schedule(tmp_path, text):
    """PyTorch's LambdaLR, stepped once an epoch, on lr / 512 x batch size x ranks.

    Both are the same two float64 operations, in the same order.
    """
    path = write(tmp_path, text)
    theirs = runpy.run_path(str(path))["config"]
    cfg = load_config(path)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=theirs.lr / 512 * theirs.batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, theirs.lr_func)
    for epoch in range(theirs.num_epoch):
        expected = optimizer.param_groups[0]["lr"]
        assert [learning_rate(cfg, epoch, step / 5, 1) for step in range(5)] == [expected] * 5
        optimizer.step()
        scheduler.step()
    assert cfg.lr_func == [theirs.lr_func(epoch) for epoch in range(26)]


def test_the_function_becomes_a_list_that_config_json_keeps(tmp_path):
    path = write(tmp_path, PLAIN)
    cfg = load_config(path, ["num_epoch=9"])
    assert cfg.lr_func == [1.0] * 7 + [0.1] * 2
    run = tmp_path / "config.json"
    run.write_text(json.dumps(cfg))
    assert load_config(run) == cfg
    refused("milestones=.* does nothing beside lr_func", path, "milestones=3")
    assert load_config(path, ["lr_func=None", "warmup_epoch=1"]).lr_func is None
    assert load_config(path, ["lr_func=1,0.5", "num_epoch=2"]).lr_func == [1.0, 0.5]


@pytest.mark.parametrize(
    "function, message",
    [
        ("lambda epoch: rate[epoch]", "theirs.py, line 5[0-9]: NameError: name 'rate'"),
        ("lambda: 0.1", "theirs.py: TypeError"),
        ("lambda epoch: -epoch", "lr_func=-1"),
        ("lambda epoch: None", "lr_func=None"),
        ("lambda epoch: float('nan')", "lr_func=nan"),
    ],
)
def test_a_function_that_fails_is_one_line(tmp_path, function, message):
    refused(message, write(tmp_path, f"{PLAIN}config.lr_func = {function}\n"))


def test_warm_up_of_minus_one_epoch_is_none():
    assert load_config(load.DEFAULTS, ["warmup_epoch=-1"]).warmup_epoch == 0
    refused("warmup_epoch=-2 ", load.DEFAULTS, "warmup_epoch=-2")


@pytest.mark.parametrize("text", [PLAIN, GEOMETRY])
def test_in_the_place_of_ours_it_is_refused(tmp_path, text, monkeypatch):
    monkeypatch.setattr(load, "DEFAULTS", write(tmp_path, text))
    refused("theirs.py has no DATASETS: .*give that one by --config FILE", load.DEFAULTS)


@pytest.mark.parametrize(
    "arguments, resume, overrides",
    [
        (["--resume", "loss=CosFace", "m=0.2"], True, "CosFace"),
        (["--resume", "1", "loss=CosFace", "m=0.2"], True, "CosFace"),
        (["loss=CosFace", "m=0.2", "--resume=1"], True, "CosFace"),
        (["loss=MLLoss", "--resume", "m=0.2", "loss=CosFace"], True, "CosFace"),
        (["m=0.2", "--resume", "0"], False, "ArcFace"),
        (["m=0.2", "--resume=0", "--local_rank", "0"], False, "ArcFace"),
        (["--local-rank=0", "m=0.2"], False, "ArcFace"),
        (["--local_rank=0", "m=0.2", "--resume"], True, "ArcFace"),
    ],
)
def test_arguments_of_their_launch_lines(arguments, resume, overrides, monkeypatch, caplog):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    cfg, goes_on = parse_arguments("", "AdaDistill")
    assert (goes_on, cfg.loss, cfg.m) == (resume, overrides, 0.2)
    assert not caplog.messages


def test_a_local_rank_without_a_launcher_chooses_no_gpu(monkeypatch, caplog):
    monkeypatch.setattr(sys, "argv", ["train.py", "--local_rank", "2"])
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    parse_arguments("", "AdaDistill")
    assert caplog.messages == ["--local_rank 2 chooses no GPU: set device=cuda:2"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    caplog.clear()
    parse_arguments("", "AdaDistill")
    assert not caplog.messages
