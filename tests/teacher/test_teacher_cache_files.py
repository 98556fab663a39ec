"""The files of a teacher cache: whose features they are, what damage is noticed, how they are
written, and features of another model.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from config.load import load_config, parse_arguments
from tests.commands import LIMIT, ROOT, command, environment
from tests.teacher.test_teacher_cache import (
    CACHE,
    CLASSES,
    IMAGES,
    SIZE,
    numbered,
    options,
    run_here,
    write_cache,
)
from train import build, cache_teacher, start_up
from utils.dataset.folder import FaceDatasetFolder
from utils.dataset.records import MXFaceDataset
from utils.errors import InputError
from utils.recordio.format import IRHeader, pack, unpack
from utils.recordio.indexed import IndexedRecordIO
from utils.run.folder import RunFolder
from utils.teacher import cache_writer
from utils.teacher.cache import CacheSource, make_manifest, open_cache
from utils.teacher.cache_writer import CacheWriter
from utils.weights.read import sha256

# --- whose features they are


def copy_of(dataset, folder, change):
    """The records after ``change``, which takes the list of (header, image) by index, in a set of
    its own.
    """
    folder.mkdir()
    with IndexedRecordIO(
        Path(dataset.root_dir) / "train.idx", Path(dataset.root_dir) / "train.rec", "r"
    ) as records:
        images = [unpack(records.read_idx(key)) for key in range(1, len(dataset) + 1)]
    change(images)
    with IndexedRecordIO(folder / "train.idx", folder / "train.rec", "w") as writer:
        for key, (header, image) in enumerate(images):
            writer.write_idx(key, pack(IRHeader(0, header.label, key, 0), image))
    (folder / "property").write_text(f"{CLASSES},112,112\n")
    return MXFaceDataset(folder)


def swap_images(images):
    """Another order of images, in a file of the same size."""
    images[3], images[17] = (images[3][0], images[17][1]), (images[17][0], images[3][1])


def relabel(images):
    images[5] = images[5][0]._replace(label=4.0), images[5][1]


def repaint(images):
    header, image = images[7]
    image = bytearray(image)
    image[len(image) // 2] ^= 1
    images[7] = header, bytes(image)


@pytest.mark.parametrize(
    "change, differing",
    [
        (swap_images, "sha256 [0-9a-f]{64} instead of [0-9a-f]{64};"),
        (relabel, "sha256"),
        (repaint, "sha256"),
        (lambda images: images.pop(), "bytes .*, images 24 instead of 23"),
    ],
)
def test_a_cache_of_other_images_is_refused(change, differing, dataset, tmp_path):
    original = copy_of(dataset, tmp_path / "original", lambda images: None)
    cache = write_cache(tmp_path / "cache", original)
    with pytest.raises(
        InputError, match=f"cache was made from other images than those of .*other: .*{differing}"
    ):
        open_cache(cache, copy_of(dataset, tmp_path / "other", change))
    shutil.copytree(original.root_dir, tmp_path / "moved")
    (tmp_path / "moved" / "train.idx").unlink()  # and rebuilt
    assert open_cache(cache, MXFaceDataset(tmp_path / "moved", num_classes=9)).images == IMAGES


def test_a_folder_of_identities_is_told_from_others(tmp_path):
    def folder(name):
        for label in ("a", "b"):
            (tmp_path / name / label).mkdir(parents=True)
            for number in range(3):
                pixels = np.full((112, 112, 3), 40 * number + (label == "b"), np.uint8)
                assert cv2.imwrite(str(tmp_path / name / label / f"{number}.bmp"), pixels)
        return tmp_path / name

    cache = write_cache(tmp_path / "cache", FaceDatasetFolder(folder("original")))
    assert open_cache(cache, FaceDatasetFolder(folder("copy"))).embedding_size == SIZE
    (folder("renamed") / "a" / "0.bmp").rename(tmp_path / "renamed" / "a" / "00.bmp")
    shutil.copy(folder("repainted") / "a" / "0.bmp", tmp_path / "repainted" / "b" / "0.bmp")
    for name, more in (("renamed", {}), ("repainted", {}), ("copy", dict(sample=2))):
        with pytest.raises(InputError, match=f"was made from other images than those of .*{name}"):
            open_cache(cache, FaceDatasetFolder(tmp_path / name, **more))


def test_a_cache_of_another_teacher_is_refused(dataset, tmp_path):
    cache = write_cache(tmp_path / "cache", dataset)
    assert (
        open_cache(cache, dataset, "a" * 64, "RGB")
        .describe()
        .endswith(
            "24 x 2 x 32, teacher "
            f"mobilefacenet, SHA-256 {'a' * 64}, RGB images, (x / 255 - 0.5) / 0.5, made with fp32"
        )
    )
    with pytest.raises(
        InputError,
        match=f"made from other weights, SHA-256 {'a' * 64}, than those "
        f"of the teacher that is set, SHA-256 {'b' * 64}; make it",
    ):
        open_cache(cache, dataset, "b" * 64)
    with pytest.raises(InputError, match="was made from RGB images, color_space=BGR; make it"):
        open_cache(cache, dataset, color_space="BGR")
    with pytest.raises(
        InputError, match="was made from mobilefacenet, not from owner/name; make it"
    ):
        open_cache(cache, dataset, repository="owner/name")


def test_a_cache_with_colours_against_the_teachers_own_must_be_asked_for(dataset, tmp_path):
    cache = write_cache(tmp_path / "cache", dataset, color_space="BGR", color_space_set=True)
    assert (
        open_cache(cache, dataset, "a" * 64, "BGR").images
        == open_cache(cache, dataset).images
        == IMAGES
    )
    with pytest.raises(
        InputError,
        match="was made with color_space=BGR against the teacher's own: set it here as well",
    ):
        open_cache(cache, dataset, "a" * 64)


def test_the_same_weights_under_another_name_are_the_same_teacher(dataset, tmp_path):
    cache = write_cache(tmp_path / "cache", dataset)
    manifest = make_manifest(
        dataset,
        SIZE,
        CacheSource(
            "cvlface_ir50",
            "fp32",
            "model.safetensors",
            "a" * 64,
            "RGB",
            "(x / 255 - 0.5) / 0.5",
            repository="owner/name",
        ),
    )
    assert CacheWriter(cache, manifest, main=True).complete


def test_a_record_that_was_mended_since_has_no_features(dataset, tmp_path):
    cache = write_cache(tmp_path / "cache", dataset, replaced=[3])
    with pytest.raises(
        InputError,
        match="record 4 of .* was damaged when .* was made and can be read now; remove the folder",
    ):
        open_cache(cache, dataset)


def test_a_resumed_run_keeps_its_teacher(dataset, tmp_path):
    fresh, resumed = (
        start_up.Run(torch.device("cpu"), "fp32", RunFolder(tmp_path), step) for step in (0, 5)
    )
    build.keep_to_one_teacher(fresh, "a" * 64)
    build.keep_to_one_teacher(resumed, "a" * 64)
    with pytest.raises(
        InputError, match=f"trained from a teacher with SHA-256 {'a' * 64}, this one has {'b' * 64}"
    ):
        build.keep_to_one_teacher(resumed, "b" * 64)


def configured(faces, *more):
    return load_config(ROOT / "config" / "config.py", options(faces, *more))


def test_training_refuses_what_does_not_fit(faces, dataset, teacher, tmp_path, monkeypatch):
    """pretrained_teacher_path of other weights, or of none; another embedding size; augmentation;
    standalone training.
    """
    cache = write_cache(tmp_path / "cache", dataset, sha256=sha256(teacher))
    (tmp_path / "run").mkdir()
    place = start_up.Run(torch.device("cpu"), "fp32", RunFolder(tmp_path / "run"), 0)
    build.open_teacher(
        configured(faces, f"teacher_embeddings={cache}", f"pretrained_teacher_path={teacher}"),
        place,
        dataset,
    )
    (tmp_path / "other.pth").write_bytes(b"other weights")
    for more, message in [
        ([f"pretrained_teacher_path={tmp_path}/other.pth"], "made from other weights"),
        (
            [f"pretrained_teacher_path={tmp_path}/none.pth"],
            f"teacher: no file at {tmp_path}/none.pth",
        ),
        (
            ["embedding_size=64"],
            "holds 32-d features, but embedding_size=64: the student learns in "
            "the teacher's space: set embedding_size=32",
        ),
        (["augment=True"], "set augment=False"),
    ]:
        with pytest.raises(InputError, match=message):
            build.open_teacher(
                configured(faces, f"teacher_embeddings={cache}", *more), place, dataset
            )
    monkeypatch.setattr(
        sys, "argv", ["train_standalone.py", *options(faces, f"teacher_embeddings={cache}")]
    )
    with pytest.raises(InputError, match="teacher_embeddings need a method with a teacher"):
        parse_arguments("", "standalone")


def edit(**values):
    def damage(path):
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(
            json.dumps(
                {key: value for key, value in (manifest | values).items() if value is not None}
            )
        )

    return damage


def shape_of(**values):
    return lambda path: np.save(
        path / "features.npy",
        np.zeros(**(dict(shape=(IMAGES, 2, SIZE), dtype=np.float16) | values)),
    )


@pytest.mark.parametrize(
    "damage, message",
    [
        (shutil.rmtree, r"no manifest.json in .*cache; make it with train/cache_teacher.py"),
        (lambda path: (path / "manifest.json").unlink(), "no manifest.json in"),
        (
            lambda path: (path / "manifest.json").write_text('{"format": 1'),
            "manifest.json is not JSON .*; remove the folder and make it again",
        ),
        (
            lambda path: (path / "manifest.json").write_text("[]"),
            "manifest.json holds a list, not a manifest",
        ),
        (edit(format=2), "has format 2, this version reads format 1"),
        (edit(data=None, images="24"), "is damaged: it says nothing proper about images, data"),
        (edit(teacher={}), "is damaged: it says nothing proper about teacher.name, "),
        (
            edit(images=23),
            r"holds float16 of shape \(24, 2, 32\), its manifest says float16 of shape "
            r"\(23, 2, 32\)",
        ),
        (
            lambda path: (path / "features.npy").unlink(),
            "no file at .*features.npy; remove the folder",
        ),
        (
            lambda path: os.truncate(path / "features.npy", 3000),
            "features.npy is damaged or cut off",
        ),
        (
            lambda path: os.truncate(path / "features.npy", 100),
            "features.npy is damaged or cut off",
        ),
        (
            lambda path: os.truncate(path / "features.npy", 9000),
            "features.npy has 9000 bytes, 3200 are expected",
        ),
        (
            lambda path: np.save(path / "features.npy", np.array([{}], object), allow_pickle=True),
            "features.npy is damaged or cut off",
        ),
        (shape_of(dtype=np.float32), "holds float32 of shape"),
        (shape_of(order="F"), "holds float16 of shape"),
        (shape_of(shape=(IMAGES, SIZE)), r"of shape \(24, 32\)"),
    ],
)
def test_a_damaged_cache_is_refused(damage, message, dataset, tmp_path):
    cache = write_cache(tmp_path / "cache", dataset)
    damage(cache)
    with pytest.raises(InputError, match=message):
        open_cache(cache, dataset)


def test_a_file_that_shrinks_later_is_an_error_too(dataset, tmp_path):
    cache = open_cache(write_cache(tmp_path, dataset), dataset)
    os.truncate(tmp_path / "features.npy", 2000)
    cache.read([0, 5])
    for read in (lambda: cache.read([0, 20]), lambda: cache.read_part(range(10, 20))):
        with pytest.raises(
            InputError, match="features.npy ends before features it should hold; remove the folder"
        ):
            read()


# --- writing


def writer_of(path, dataset, main=True, **origin):
    return CacheWriter(
        path,
        make_manifest(
            dataset,
            SIZE,
            CacheSource(**(dict(name="mobilefacenet", precision="fp32", sha256="a" * 64) | origin)),
        ),
        main,
    )


def test_only_the_same_features_go_on(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_writer, "PART", 10)
    values = numbered(IMAGES)
    writer = writer_of(tmp_path, dataset)
    assert writer.missing() == [range(0, 10), range(10, 20), range(20, 24)]
    # another rank
    writer_of(tmp_path, dataset, main=False).write(range(10, 20), values[10:20])
    os.close(writer.progress)
    for origin, message in (
        (dict(sha256="b" * 64), f"teacher.sha256 {'a' * 64} instead of {'b' * 64}"),
        (dict(precision="bf16"), "teacher.precision fp32 instead of bf16"),
    ):
        with pytest.raises(
            InputError, match=f"holds features of something else: {message}; choose another folder"
        ):
            writer_of(tmp_path, dataset, **origin)
    monkeypatch.setattr(cache_writer, "PART", 6)  # however large the parts were
    writer = writer_of(tmp_path, dataset)
    assert writer.missing() == [range(0, 6), range(6, 12), range(18, 24)]
    for part in writer.missing():
        writer.write(part, values[part.start : part.stop])
    # killed between giving it its name and writing the manifest
    os.replace(tmp_path / "features.npy.partial", tmp_path / "features.npy")
    os.close(writer.progress)
    writer = writer_of(tmp_path, dataset)
    assert not writer.complete and writer.missing() == []
    writer.finish(str)
    assert np.array_equal(np.load(tmp_path / "features.npy"), values.astype(np.float16))
    assert writer_of(tmp_path, dataset).complete
    with pytest.raises(
        InputError,
        match="holds features of something else: teacher.color_space None instead of BGR",
    ):
        writer_of(tmp_path, dataset, color_space="BGR")
    assert writer_of(tmp_path, dataset, name="ir50").complete, "the same weights under another name"


@pytest.mark.processes
def test_two_commands_do_not_write_one_cache(dataset, tmp_path):
    # and with it this process's lock
    os.close(writer_of(tmp_path, dataset).progress)
    code = (
        "import fcntl, sys\nfile = open(sys.argv[1], 'r+')\nfcntl.lockf(file, "
        "fcntl.LOCK_EX)\nprint('mine', flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "progress.partial"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(
            InputError, match="another process is making a cache in .*; wait for it, or end it"
        ):
            writer_of(tmp_path, dataset)
        other.stdin.close()
    assert writer_of(tmp_path, dataset).missing() == [range(0, IMAGES)]


@pytest.mark.parametrize(
    "value, message",
    [
        (
            np.nan,
            "the features of image index 5 are not finite or exceed 65504, the largest float16, "
            "as do those of 0 more",
        ),
        (70000.0, "image index 5 are not finite or exceed 65504"),
    ],
)
def test_features_that_float16_cannot_hold_are_refused(value, message, dataset, tmp_path):
    writer, values = writer_of(tmp_path, dataset), numbered(IMAGES)
    values[5, 1, 7] = value
    with pytest.raises(InputError, match=message):
        writer.write(range(IMAGES), values)
    with pytest.raises(
        InputError,
        match=r"the teacher gave features of shape \(24, 2, 16\) for 24 "
        r"images, 32 dimensions were expected",
    ):
        writer.write(range(IMAGES), numbered(IMAGES, 16))
    assert writer.missing() == [range(0, IMAGES)]


def test_full_and_forbidden_disks(dataset, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(
        InputError,
        match=r"cannot write to .*file \(File exists\); choose another "
        r"folder",
    ):
        writer_of(tmp_path / "file", dataset)
    with pytest.raises(
        InputError,
        match=r"cannot write to .*elsewhere \(No such file or "
        r"directory\); choose another folder, which all ranks can write to",
    ):
        # a rank on a machine without the folder
        writer_of(tmp_path / "elsewhere", dataset, main=False)
    (tmp_path / "foreign").mkdir()
    np.save(tmp_path / "foreign" / "features.npy", np.zeros(3))
    with pytest.raises(
        InputError,
        match="foreign holds a features.npy without a manifest, which is no cache of this project",
    ):
        writer_of(tmp_path / "foreign", dataset)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), dict(free=3000)))
        with pytest.raises(
            InputError, match="the features of 24 images take 0.0 GB, 0.0 GB are free on its disk"
        ):
            writer_of(tmp_path / "small", dataset)
    monkeypatch.setattr(cache_writer, "PART", 10)
    writer, values = writer_of(tmp_path / "full", dataset), numbered(IMAGES)
    writer.write(range(10), values[:10])
    with monkeypatch.context() as patch:

        def fail(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, "fsync", fail)
        with pytest.raises(
            InputError,
            match=r"cannot write .*features.npy.partial \(No space left "
            r"on device\); what is done is kept: make room and start the same",
        ):
            writer.write(range(10, 20), values[10:20])
    assert writer.missing() == [range(10, 20), range(20, 24)]


@pytest.mark.processes
def test_a_full_disk_at_the_start_leaves_nothing(faces, teacher, tmp_path):
    """ulimit -f stands for the full disk: 2 blocks of 512 bytes, the features take 3072."""
    arguments = command(
        CACHE,
        *options(faces, f"pretrained_teacher_path={teacher}", "--output", tmp_path / "cache"),
        fresh=True,
    )
    done = subprocess.run(
        ["bash", "-c", " ".join(["ulimit -f 2; exec", *map(str, arguments)])],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 1 and done.stderr.startswith(
        f"error: cannot lay out a cache of 0.0 GB in {tmp_path}/cache (File too large)"
    ), done.stderr
    assert list((tmp_path / "cache").iterdir()) == []


# --- features of another model


def save_features(path, images=IMAGES, save=np.savez, **more):
    arrays = (
        dict(
            emb=numbered(images, 7)[:, 0],
            emb_flip=numbered(images, 7)[:, 1],
            label=np.arange(images) // 4,
        )
        | more
    )
    save(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


@pytest.mark.parametrize(
    "how",
    [
        dict(),
        dict(save=np.savez_compressed),
        dict(label=None),
        dict(label=(np.arange(IMAGES) // 4).astype(np.float32)),
        dict(
            emb=numbered(IMAGES, 7)[:, 0].astype(np.float16),
            emb_flip=numbered(IMAGES, 7)[:, 1].astype(np.float16),
        ),
    ],
)
def test_features_of_another_model_are_imported(how, faces, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_writer, "PART", 10)
    path = save_features(tmp_path / "other.npz", **how)
    run_here(
        monkeypatch, cache_teacher, *options(faces), "--from", path, "--output", tmp_path / "cache"
    )
    cache = open_cache(tmp_path / "cache", dataset)
    assert (
        np.array_equal(
            np.load(tmp_path / "cache" / "features.npy"), numbered(IMAGES, 7).astype(np.float16)
        )
        and cache.embedding_size == 7
    )
    assert f"24 x 2 x 7, imported from other.npz, SHA-256 {sha256(path)}, float" in cache.describe()
    with pytest.raises(
        InputError,
        match="made from other weights, unknown ones, for its features "
        "were imported, than those of the teacher that is set",
    ):
        open_cache(tmp_path / "cache", dataset, "a" * 64)
    # complete already
    run_here(
        monkeypatch, cache_teacher, *options(faces), "--from", path, "--output", tmp_path / "cache"
    )


def put(name, row, value):
    array = (
        np.arange(IMAGES) // 4
        if name == "label"
        else numbered(IMAGES, 7)[:, int(name == "emb_flip")].copy()
    )
    array[row] = value
    return {name: array}


@pytest.mark.parametrize(
    "how, message",
    [
        (
            dict(images=23),
            r"emb \(23, 7\), emb_flip \(23, 7\), label \(23,\); this set has 24 images, "
            r"so emb and emb_flip must be \(24, D\)",
        ),
        (dict(emb_flip=None), "needs emb and emb_flip, it has emb, label"),
        (dict(emb=numbered(IMAGES, 6)[:, 0]), r"emb \(24, 6\), emb_flip \(24, 7\)"),
        (
            dict(emb=numbered(IMAGES, 7)[:, 0].astype(np.float64)),
            "emb float64, emb_flip float32, label "
            "int64; emb and emb_flip must both be float16 or float32",
        ),
        (dict(label=np.array(["a"] * IMAGES)), "label <U1; emb and emb_flip"),
        (
            dict(emb=np.array([{}] * IMAGES, object)),
            "emb of .* is a pickled array, which could run code",
        ),
        (dict(emb=np.asfortranarray(numbered(IMAGES, 7)[:, 0])), "stored by columns"),
        (put("emb", 13, np.nan), "emb of record 14 in .* is not finite or all zeros"),
        (put("emb_flip", 22, 0.0), "emb_flip of record 23 in .* is not finite or all zeros"),
        (
            put("label", 9, 3),
            "record 10 has label 2, .* says 3: its features are of another set or in another order",
        ),
    ],
)
def test_features_that_cannot_be_this_sets_are_refused(how, message, faces, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_writer, "PART", 10)
    path = save_features(tmp_path / "other.npz", **how)
    with pytest.raises(InputError, match=f"^--from: .*{message}"):
        run_here(
            monkeypatch,
            cache_teacher,
            *options(faces),
            "--from",
            path,
            "--output",
            tmp_path / "cache",
        )
    assert not (tmp_path / "cache" / "manifest.json").exists()


def flip_bit(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.unlink(), "no file at"),
        (lambda path: path.write_bytes(b"no archive"), "is no .npz"),
        (lambda path: os.truncate(path, 1000), "is no .npz"),
        (lambda path: flip_bit(path, 400), "emb of .* cannot be read .Bad CRC-32"),
        (lambda path: flip_bit(path, 36), "emb of .* cannot be read"),
    ],
)
def test_a_damaged_file_of_features_is_refused(damage, message, faces, tmp_path, monkeypatch):
    path = save_features(tmp_path / "other.npz")
    damage(path)
    with pytest.raises(InputError, match=f"^--from: .*{message}"):
        run_here(
            monkeypatch,
            cache_teacher,
            *options(faces),
            "--from",
            path,
            "--output",
            tmp_path / "cache",
        )


def test_a_folder_for_the_features_must_be_named(faces, monkeypatch):
    with pytest.raises(InputError, match="name one with --output, or with teacher_embeddings="):
        run_here(monkeypatch, cache_teacher, *options(faces))
