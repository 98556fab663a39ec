"""Cached teacher features: what is written is what the teacher says, training cannot tell it from
the teacher, and nothing that does not fit is taken.
"""

import json
import shutil
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    # as an entry script does: see the end
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader

from backbones import build_backbone
from tests import rounding
from tests.commands import ROOT, run, run_until
from tests.rounding import U
from train import build, cache_teacher, class_centers
from train.feed import features_shown
from utils.dataset.base import keep_batch
from utils.dataset.records import MXFaceDataset
from utils.errors import InputError
from utils.inputs import to_input
from utils.recordio.indexed import IndexedRecordIO
from utils.teacher import cache_writer
from utils.teacher.cache import CacheSource, make_manifest, open_cache
from utils.teacher.cache_writer import CacheWriter
from utils.weights.class_centers import read_kernel
from utils.weights.read import sha256

CACHE, CENTERS, ADADISTILL, AMLDISTILL = (
    str(ROOT / "train" / f"{name}.py")
    for name in ("cache_teacher", "class_centers", "train_AdaDistill", "train_AMLDistill")
)
IMAGES, CLASSES, SIZE = 24, 6, 32
# of float16: each number is off by at most this part of itself
ROUNDING = 2.0**-11
# of the teacher's features, where other images are computed together
OTHER_BATCH = 2 * rounding.network(50)
COMMON = [
    "dataset=synthetic",
    f"embedding_size={SIZE}",
    "teacher=mobilefacenet",
    "precision=fp32",
    "val_batch_size=4",
    "val_targets=[]",
    "num_workers=1",
    "lr=0.5",
    "batch_size=8",
    "num_epoch=2",
    "log_every=1",
]
VARIANTS = {
    "ArcFace": (ADADISTILL, ["loss=ArcFace"]),
    "CosFace": (ADADISTILL, ["loss=CosFace", "adaptive_alpha=False"]),
    "AdaFace": (ADADISTILL, ["loss=AdaFace", "use_geom_margin=True", "geom_margin_warmup_epoch=0"]),
    "AMLDistill": (
        AMLDISTILL,
        ["loss=ArcFace", "use_geom_margin=True", "geom_margin_warmup_epoch=0"],
    ),
}


def options(faces, *more):
    return [*COMMON, f"rec={faces}", *map(str, more)]


def run_several(how, *commands, ranks=1, **more):
    """Start the scripts one after another in one process: ``how`` as the end of this file reads
    it.
    """
    return run(
        Path(__file__),
        how,
        *(json.dumps(list(map(str, command))) for command in commands),
        ranks=ranks,
        **more,
    )


@pytest.fixture(scope="module")
def runs(faces, teacher, tmp_path_factory):
    """On 1 rank: the cache, class centres with it and without, and every variant trained with it
    and with the live teacher.
    """
    root = tmp_path_factory.mktemp("runs")
    live, cached = f"pretrained_teacher_path={teacher}", f"teacher_embeddings={root / 'cache'}"
    commands = [
        [CACHE, *options(faces, live, cached)],
        [CENTERS, *options(faces, live, f"output={root}/live.pth")],
        [CENTERS, *options(faces, cached, f"output={root}/centers")],
    ]
    for name, (script, more) in VARIANTS.items():
        more = (
            [*more, f"pretrained_teacher_header_path={root}/live.pth"]
            if script == AMLDISTILL
            else more
        )
        commands += [
            [script, *options(faces, *more, source, f"output={root}/{name}-{kind}")]
            for kind, source in (("live", live), ("cached", cached))
        ]
    root.joinpath("log").write_text(run_several("linear", *commands))
    return root


@pytest.fixture(scope="module")
def features(runs):
    return np.load(runs / "cache" / "features.npy", mmap_mode="r")


@pytest.fixture(scope="module")
def exact(faces, teacher):
    """The teacher's features in float32, by a plain loop: (N, 2, D)."""
    network = build_backbone("mobilefacenet", SIZE).eval()
    network.load_state_dict(torch.load(teacher, weights_only=True))
    images = to_input(MXFaceDataset(faces).__getitems__(range(IMAGES)).images)
    with torch.no_grad():
        return torch.stack([network(images), network(images.flip(3))], dim=1).numpy()


# --- what is written


@pytest.mark.processes
def test_the_cache_holds_the_teachers_features(runs, features, exact, teacher, faces):
    assert features.shape == (IMAGES, 2, SIZE) and features.dtype == np.float16
    assert (
        np.abs(features - exact) <= ROUNDING * np.abs(exact) + OTHER_BATCH * np.abs(exact).max()
    ).all()
    manifest = json.loads((runs / "cache" / "manifest.json").read_text())
    assert manifest["teacher"] == dict(
        name="mobilefacenet",
        precision="fp32",
        file="backbone.pth",
        sha256=sha256(teacher),
        color_space="RGB",
        normalisation="(x / 255 - 0.5) / 0.5",
        imported=None,
        repository="",
        color_space_set=False,
    )
    assert (
        manifest["images"] == IMAGES
        and manifest["embedding_size"] == SIZE
        and manifest["replaced"] == []
    )
    assert sorted(path.name for path in (runs / "cache").iterdir()) == [
        "features.npy",
        "manifest.json",
    ]
    log = (runs / "log").read_text()
    assert "24 images to compute, 0 are in" in log
    assert (
        f"Teacher features from {runs}/cache: 24 x 2 x 32, teacher mobilefacenet, SHA-256 "
        f"{sha256(teacher)}, RGB images, (x / 255 - 0.5) / 0.5, made with fp32"
    ) in log


@pytest.mark.processes
def test_a_killed_command_goes_on_where_it_was(runs, two_ranks):
    """SIGKILL to torchrun and both ranks in the middle; the next run, also of 2 ranks, computes the
    rest, and every bit is that of 1 rank.
    """
    root, done, text = two_ranks
    assert f"{IMAGES - done} images to compute, {done} are in" in text
    for name in ("features.npy", "manifest.json"):
        assert (root / "cache" / name).read_bytes() == (runs / "cache" / name).read_bytes()
    assert sorted(path.name for path in (root / "cache").iterdir()) == [
        "features.npy",
        "manifest.json",
    ]


@pytest.fixture(scope="module")
def two_ranks(runs, faces, teacher, tmp_path_factory):
    """On 2 ranks: a cache that was killed on the way and finished, class centres, and two variants.

    Returns (folder, images done when it was killed, output).
    """
    root = tmp_path_factory.mktemp("two")
    make = [
        CACHE,
        *options(faces, f"pretrained_teacher_path={teacher}", "--output", root / "cache"),
    ]
    assert (
        run_until(
            Path(__file__),
            "hold",
            json.dumps(make),
            ranks=2,
            log=root / "cache" / "progress.partial",
            text="\1" * 4,
        )
        == -signal.SIGKILL
    )
    done = np.count_nonzero(np.fromfile(root / "cache" / "progress.partial", np.uint8))
    assert 4 <= done < IMAGES and not (root / "cache" / "manifest.json").exists()
    with pytest.raises(
        InputError, match=f"is not complete, {done} of 24 images are done; go on with the same"
    ):
        open_cache(root / "cache", MXFaceDataset(faces))
    cached = f"teacher_embeddings={root}/cache"
    commands = [make, [CENTERS, *options(faces, cached, f"output={root}/centers.pth")]]
    commands += [
        [
            VARIANTS[name][0],
            *options(faces, *VARIANTS[name][1], cached, "batch_size=4", f"output={root}/{name}"),
        ]
        for name in ("ArcFace", "AdaFace")
    ]
    return root, done, run_several("linear", *commands, ranks=2)


# --- training


def rows(folder):
    """The training rows of metrics.jsonl without what the clock says."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if key not in ("samples_per_sec", "data_wait")}
        for row in rows
        if "loss" in row
    ]


@pytest.mark.processes
@pytest.mark.parametrize("name", VARIANTS)
def test_losses_are_those_of_the_live_teacher_but_for_rounding(name, runs):
    """Rounding turns a feature t/|t| by at most u, so the cosines alpha is made of by u and alpha
    by 2 u; the centre alpha w + (1 - alpha) t moves by 3 u, its direction, of a length above 1/2,
    by 6 u; a logit by 6 s u, the cross-entropy by twice that. What is left after a step is smaller
    than what comes new."""
    live, cached = rows(runs / f"{name}-live"), rows(runs / f"{name}-cached")
    assert len(live) == len(cached) == 6 and any(
        a["loss"] != b["loss"] for a, b in zip(live, cached, strict=True)
    )
    for a, b in zip(live, cached, strict=True):
        assert abs(a["loss"] - b["loss"]) < 12 * 64 * ROUNDING
    # a cosine of the centre as it was drawn; with the mirror images' features in place of the
    # images' it is off by 0.1
    if "lam" in live[0]:
        assert abs(live[0]["lam"] - cached[0]["lam"]) < ROUNDING


@pytest.mark.processes
@pytest.mark.parametrize("name", ["ArcFace", "AdaFace"])
def test_two_ranks_train_as_one(name, runs, two_ranks):
    """But for the order of additions: that of a logit in each of six steps, relative to a loss of
    some ten.
    """
    one, two = rows(runs / f"{name}-cached"), rows(two_ranks[0] / name)
    assert len(one) == len(two)
    for first, second in zip(one, two, strict=True):
        assert first == pytest.approx(
            second, rel=6 * rounding.logit(SIZE), abs=6 * rounding.cosine(SIZE)
        )


@pytest.mark.processes
def test_an_interrupted_run_goes_on_with_the_same_bits(runs, faces, tmp_path):
    script, more = VARIANTS["AdaFace"]
    arguments = [
        script,
        *options(
            faces, *more, f"teacher_embeddings={runs}/cache", "state_every=2", f"output={tmp_path}"
        ),
    ]
    assert (
        run_until(
            Path(__file__),
            "linear,hold",
            json.dumps(arguments),
            log=tmp_path / "training.log",
            text="Global Step: 5 ",
        )
        == -signal.SIGKILL
    )
    text = run_several("linear", [*arguments, "--resume"])
    assert "Resumed at step 4" in text and rows(tmp_path) == rows(runs / "AdaFace-cached")
    for part in ("backbone", "header"):
        straight, resumed = (
            torch.load(folder / f"6{part}.pth", weights_only=True)
            for folder in (runs / "AdaFace-cached", tmp_path)
        )
        assert straight.keys() == resumed.keys() and all(
            torch.equal(straight[key], resumed[key]) for key in straight
        )


@pytest.mark.processes
def test_each_sample_gets_the_features_of_what_it_shows():
    features = torch.arange(24, dtype=torch.float16).view(4, 2, 3)
    shown = features_shown(features, torch.tensor([False, True, True, False]))
    assert shown.dtype == torch.float32 and shown.tolist() == [
        [0, 1, 2],
        [9, 10, 11],
        [15, 16, 17],
        [18, 19, 20],
    ]
    assert features_shown(features, None).tolist() == features[:, 0].tolist()


def run_here(monkeypatch, script, *arguments):
    """The script's ``main`` in this process."""
    monkeypatch.setattr(
        sys, "argv", ["script", *map(str, arguments), "device=cpu", "num_workers=0"]
    )
    script.main()


def write_cache(
    path,
    dataset,
    values=None,
    name="mobilefacenet",
    sha256="a" * 64,
    color_space="RGB",
    replaced=(),
    color_space_set=False,
):
    """A cache of given (N, 2, D) features, written as the command writes it."""
    values = numbered(len(dataset)) if values is None else values
    origin = CacheSource(
        name,
        "fp32",
        "backbone.pth",
        sha256,
        color_space,
        "(x / 255 - 0.5) / 0.5",
        color_space_set=color_space_set,
    )
    writer = CacheWriter(path, make_manifest(dataset, values.shape[2], origin), main=True)
    for part in writer.missing():
        writer.write(
            part, values[part.start : part.stop], [index for index in replaced if index in part]
        )
    writer.finish(dataset.name_of)
    return path


def numbered(images, size=SIZE):
    """(images, 2, size) in which every number is another one."""
    return (1 + np.arange(images * 2 * size).reshape(images, 2, size)).astype(np.float32)


def test_workers_read_the_features_of_their_images(dataset, tmp_path):
    dataset.teacher_features = open_cache(write_cache(tmp_path, dataset), dataset)
    dataset.teacher_features.read([0])  # an open file before the fork
    order = np.random.default_rng(0).permutation(IMAGES).tolist()
    for context, workers in (("fork", 2), ("spawn", 1)):
        loader = DataLoader(
            dataset,
            batch_sampler=BatchSampler(order, 5, drop_last=False),
            num_workers=workers,
            collate_fn=keep_batch,
            multiprocessing_context=context,
        )
        assert np.array_equal(
            torch.cat([batch.features for batch in loader]),
            numbered(IMAGES)[order].astype(np.float16),
        )
    assert np.array_equal(
        dataset.teacher_features.read_part(range(3, 9)), dataset.teacher_features.read(range(3, 9))
    )
    assert MXFaceDataset(dataset.root_dir).__getitems__([1]).features is None


# --- damaged records


@pytest.fixture
def broken(faces, tmp_path):
    """The set with damaged images under the keys 3, 4 and 24."""
    root = tmp_path / "broken"
    shutil.copytree(faces, root)
    with (
        IndexedRecordIO(faces / "train.idx", faces / "train.rec", "r") as records,
        open(root / "train.rec", "r+b") as file,
    ):
        for key in (3, 4, 24):
            file.seek(records.offset(key) + 8 + 24)
            file.write(bytes(40))
    return MXFaceDataset(root)


def test_a_replaced_record_comes_with_the_features_of_its_replacement(broken, tmp_path):
    broken.teacher_features = open_cache(write_cache(tmp_path / "cache", broken), broken)
    batch = broken.__getitems__([1, 2, 3, 23])
    assert [key for key, _ in batch.bad] == [3, 4, 24] and batch.labels.tolist() == [0, 1, 1, 0]
    assert np.array_equal(batch.features, numbered(IMAGES)[[1, 4, 4, 0]].astype(np.float16))


@pytest.mark.processes
def test_damaged_records_get_the_features_of_their_replacements_until_there_are_too_many(
    broken, teacher, features, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(cache_writer, "PART", 8)
    cache = tmp_path / "cache"
    arguments = options(broken.root_dir, f"pretrained_teacher_path={teacher}", "--output", cache)
    with pytest.raises(
        InputError, match="^2 damaged records are more than max_bad_records=1: 3, 4$"
    ):
        run_here(monkeypatch, cache_teacher, *arguments, "max_bad_records=1")
    assert "damaged record 3, the features are those of the next good one: " in caplog.text
    run_here(monkeypatch, cache_teacher, *arguments, "max_bad_records=3")
    assert json.loads((cache / "manifest.json").read_text())["replaced"] == [
        [2, 3],
        [3, 4],
        [23, 24],
    ]
    expected = np.arange(IMAGES)
    expected[[2, 3, 23]] = 4, 4, 0
    np.testing.assert_allclose(
        np.load(cache / "features.npy"),
        features[expected],
        rtol=2 * ROUNDING,
        atol=OTHER_BATCH * np.abs(features).max(),
    )
    run_here(
        monkeypatch,
        class_centers,
        *options(broken.root_dir, f"teacher_embeddings={cache}", f"output={tmp_path}"),
    )
    good = np.setdiff1d(np.arange(IMAGES), [2, 3, 23])
    kernel = read_kernel(tmp_path / "class_centers.pth", "centres", SIZE, CLASSES)
    np.testing.assert_allclose(
        kernel, class_means(np.load(cache / "features.npy")[good], broken.labels(good)), atol=2 * U
    )


# --- class centres


def class_means(features, labels):
    """(D, C), computed plainly."""
    unit = features.astype(np.float64) / np.linalg.norm(
        features.astype(np.float64), axis=2, keepdims=True
    )
    return np.stack(
        [
            unit[labels == label].reshape(-1, unit.shape[2]).mean(0)
            for label in range(labels.max() + 1)
        ],
        axis=1,
    )


@pytest.mark.processes
def test_class_centres_are_the_means_of_the_teachers_features(
    runs, two_ranks, exact, features, dataset
):
    labels = dataset.labels(range(IMAGES))
    assert labels.tolist() == [dataset[index][1] for index in range(IMAGES)]
    # a mean of unit vectors in float64, written as float32; the live teacher's features are of
    # other batches
    for path, used, tolerance in (
        (runs / "live.pth", exact, OTHER_BATCH),
        (runs / "centers" / "class_centers.pth", features, 2 * U),
        (two_ranks[0] / "centers.pth", features, 2 * U),
    ):
        np.testing.assert_allclose(
            read_kernel(path, "centres", SIZE, CLASSES), class_means(used, labels), atol=tolerance
        )
    unit = exact / np.linalg.norm(exact, axis=2, keepdims=True)
    means = class_means(exact, labels)
    own = np.einsum("nfd,dn->nf", unit, (means / np.linalg.norm(means, axis=0))[:, labels]).mean()
    log = (runs / "log").read_text()
    assert "6 classes of 4 to 4 images (median 4), 24 in all" in log
    assert rounding.printed(
        log, "mean cosine between a feature and its class centre:"
    ) == pytest.approx(own, abs=0.5e-3 + OTHER_BATCH)
    assert f"pretrained_teacher_header_path={runs}/live.pth embedding_size=32" in log


@pytest.mark.processes
def test_a_class_without_images_is_named(faces, runs, tmp_path, monkeypatch):
    with pytest.raises(
        InputError, match="class 6 of .* has no readable image, as have 1 more of 8 classes"
    ):
        run_here(
            monkeypatch,
            class_centers,
            *options(
                faces,
                f"teacher_embeddings={runs}/cache",
                "num_classes=8",
                f"output={tmp_path}/x.pth",
            ),
        )
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="output: cannot make the folder .*file/x"):
        run_here(monkeypatch, class_centers, *options(faces, f"output={tmp_path}/file/x/y.pth"))
    assert not (tmp_path / "x.pth").exists()


if __name__ == "__main__":
    import runpy
    import time

    from train.engine import Engine
    from utils import distributed

    how, *commands = sys.argv[1:]
    cache_writer.PART = 4
    # one process group for all commands
    leave, distributed.shutdown = distributed.shutdown, lambda: None
    # a student without batch normalisation: its losses do not depend on how the batch is shared out
    if "linear" in how:

        def build_linear(cfg):
            return torch.nn.Sequential(
                torch.nn.AvgPool2d(8),
                torch.nn.Flatten(),
                torch.nn.Linear(3 * 14 * 14, cfg.embedding_size, bias=False),
            )

        build.build_student = build_linear
    # until the signal comes: after one part of the cache on each rank, or after five steps
    if "hold" in how:
        write, train_step = CacheWriter.write, Engine.train_step

        def write_one(*arguments):
            write(*arguments)
            time.sleep(600)

        def train_five(self, *arguments):
            if self.position.step == 5:
                time.sleep(600)
            return train_step(self, *arguments)

        CacheWriter.write, Engine.train_step = write_one, train_five
    for command in commands:
        sys.argv = json.loads(command)
        runpy.run_path(sys.argv[0], run_name="__main__")
    leave()
