"""utils.dataset: which records are images, their pixels and labels, and what becomes of damaged
ones.
"""

import os

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from config.load import load_config
from tests.commands import ROOT
from tests.recordio.test_recordio import GOLDEN, STYLES
from train.build import build_dataset
from utils.dataset.base import decode_into, keep_batch
from utils.dataset.folder import FaceDatasetFolder
from utils.dataset.records import MXFaceDataset
from utils.dataset.workers import start_worker
from utils.errors import InputError, RecordError
from utils.images import decode_bgr
from utils.recordio.format import IRHeader, pack
from utils.recordio.indexed import IndexedRecordIO


@pytest.fixture(scope="module")
def expected():
    return np.load(GOLDEN / "expected.npz")


def copy_set(style, folder):
    """A writable set of the golden records ``style``."""
    folder.mkdir(exist_ok=True)
    for name, suffix in (("train.rec", "rec"), ("train.idx", "idx"), ("property", "property")):
        (folder / name).write_bytes((GOLDEN / f"{style}.{suffix}").read_bytes())
    return folder


def write_set(folder, records, property_text):
    """A plain set of (label, image bytes) with keys 0 ..."""
    with IndexedRecordIO(folder / "train.idx", folder / "train.rec", "w") as writer:
        for key, (label, image) in enumerate(records):
            writer.write_idx(key, pack(IRHeader(0, label, key, 0), image))
    (folder / "property").write_text(property_text)
    return folder


def jpeg(seed, size=(112, 112)):
    pixels = cv2.resize(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8), size)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def write_folder(folder, images_of):
    """``images_of``: {identity: number of images}; returns the folder."""
    for label, (identity, count) in enumerate(images_of.items()):
        (folder / identity).mkdir(parents=True)
        for number in range(count):
            (folder / identity / f"{number:02d}.jpg").write_bytes(jpeg(100 * label + number))
    return folder


def assert_batches_equal(left, right):
    assert (
        torch.equal(left.images, right.images)
        and torch.equal(left.labels, right.labels)
        and left.bad == right.bad
    )


def test_a_property_with_a_byte_order_mark(tmp_path):
    folder = copy_set("plain", tmp_path)
    (folder / "property").write_bytes(b"\xef\xbb\xbf" + (folder / "property").read_bytes())
    assert MXFaceDataset(folder).num_classes == 6


@pytest.mark.parametrize("style", STYLES)
def test_golden_sets(style, tmp_path, expected):
    dataset = MXFaceDataset(copy_set(style, tmp_path))
    assert len(dataset) == 30 and dataset.num_classes == 6
    batch = dataset.__getitems__(list(range(30)))
    assert (
        batch.images.dtype == torch.uint8 and batch.labels.dtype == torch.int64 and batch.bad == []
    )
    assert np.array_equal(batch.images, expected[f"{style}/pixels"])
    assert np.array_equal(batch.labels, expected[f"{style}/labels"])
    image, label = dataset[17]
    assert (
        np.array_equal(image, expected[f"{style}/pixels"][17])
        and label == expected[f"{style}/labels"][17]
    )
    assert image.dtype == np.uint8 and type(label) is int
    with pytest.raises(IndexError):
        dataset[30]


@pytest.mark.parametrize("style", STYLES)
def test_missing_property_and_index_are_rebuilt(style, tmp_path, caplog):
    intact = MXFaceDataset(copy_set(style, tmp_path / "intact"))
    folder = copy_set(style, tmp_path / "bare")
    (folder / "property").unlink()
    (folder / "train.idx").unlink()
    dataset = MXFaceDataset(folder)
    assert dataset.num_classes == 6 and len(dataset) == 30
    assert (folder / "property").read_text() == "6,112,112\n"
    assert "property is missing" in caplog.text and "train.idx is missing" in caplog.text
    assert_batches_equal(dataset.__getitems__(range(30)), intact.__getitems__(range(30)))


def test_broken_property(tmp_path):
    folder = copy_set("plain", tmp_path)
    (folder / "property").write_text("six\n")
    with pytest.raises(InputError, match="property holds 'six'"):
        MXFaceDataset(folder)
    (folder / "property").write_text("6,128,128\n")
    with pytest.raises(InputError, match="128x128"):
        MXFaceDataset(folder)


def test_vector_labels_at_key_0_are_images(tmp_path):
    """im2rec --pack-label: flag 2 at key 0, and an image behind the labels."""
    with IndexedRecordIO(tmp_path / "train.idx", tmp_path / "train.rec", "w") as writer:
        for key in range(3):
            writer.write_idx(key, pack(IRHeader(0, [key, 9.0], key, 0), jpeg(key)))
    (tmp_path / "property").write_text("3,112,112")
    dataset = MXFaceDataset(tmp_path)
    assert [dataset[index][1] for index in range(len(dataset))] == [0, 1, 2]


def test_loader_with_workers_equals_direct_reading(tmp_path):
    dataset = MXFaceDataset(copy_set("insightface", tmp_path))
    dataset[0]  # an open file before the fork
    sampler = BatchSampler(SequentialSampler(dataset), batch_size=7, drop_last=False)
    for context in ("fork", "spawn"):
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=2,
            collate_fn=keep_batch,
            worker_init_fn=start_worker,
            multiprocessing_context=context,
        )
        batches = list(loader)
        assert len(batches) == 5
        for indices, batch in zip(sampler, batches, strict=False):
            assert_batches_equal(batch, dataset.__getitems__(indices))


def test_colours_are_in_their_places_whatever_the_format(tmp_path):
    """Red, green and blue stripes; OpenCV has formats of which it gives BGR also when asked for
    RGB.
    """
    stripes = np.zeros((112, 112, 3), np.uint8)
    for channel in range(3):
        stripes[:, channel * 36 : channel * 36 + 36, channel] = 255
    for suffix in (".jpg", ".png", ".webp", ".bmp", ".ppm", ".pam", ".tiff", ".jp2"):
        encoded, image = (
            cv2.imencode(suffix, stripes[..., ::-1])[1].tobytes(),
            np.empty_like(stripes),
        )
        decode_into(encoded, image)
        assert np.abs(image[:, 10:100:36].astype(int) - stripes[:, 10:100:36]).max() < 10, suffix
        assert np.array_equal(decode_bgr(encoded), image[..., ::-1]), suffix


def test_damaged_records_are_replaced_and_listed(tmp_path):
    good = [(float(label), jpeg(label)) for label in range(8)]
    records = list(good)
    records[2] = (2.0, good[2][1][:300])  # truncated
    records[3] = (3.0, b"no image at all")
    records[5] = (5.0, jpeg(5, size=(96, 100)))
    records[7] = (7.0, b"")
    dataset = MXFaceDataset(write_set(tmp_path, records, "8,112,112\n"))
    batch = dataset.__getitems__([0, 2, 3, 5, 7, 6])
    assert batch.labels.tolist() == [0, 4, 4, 6, 0, 6]  # the next good one, around the end
    assert [key for key, _ in batch.bad] == [2, 3, 5, 7]
    assert "96x100, not 112x112" in batch.bad[2][1]
    for row, index in enumerate([0, 4, 4, 6, 0, 6]):
        assert np.array_equal(batch.images[row], dataset[index][0])
    for index in (2, 3, 5, 7):
        with pytest.raises(RecordError):
            dataset[index]


def test_truncated_file(tmp_path):
    folder = copy_set("plain", tmp_path)
    os.truncate(folder / "train.rec", 95_200)  # inside key 25
    batch = MXFaceDataset(folder).__getitems__([24, 25, 29])
    assert [key for key, _ in batch.bad] == [25, 29] and "offset 95124" in batch.bad[0][1]
    assert batch.labels.tolist() == [4, 0, 0]


def test_damaged_last_image_of_insightface_layout(tmp_path):
    folder = copy_set("insightface", tmp_path)
    with open(folder / "train.rec", "r+b") as file:
        file.seek(117988 + 8)  # key 30: header and image
        file.write(b"\xee" * 5490)
    batch = MXFaceDataset(folder).__getitems__([28, 29])
    assert [key for key, _ in batch.bad] == [30] and batch.labels.tolist() == [5, 0]


def test_random_damage_never_stops_a_batch(tmp_path):
    """Bytes overwritten anywhere in an image: it decodes, or it is listed."""
    rng = np.random.default_rng(0)
    records = []
    for key in range(200):
        image = bytearray(jpeg(key))
        at = int(rng.integers(0, len(image) - 20))
        image[at : at + 20] = rng.bytes(20)
        records.append((0.0, bytes(image)))
    dataset = MXFaceDataset(write_set(tmp_path, [(0.0, jpeg(0))] + records, "1,112,112\n"))
    batch = dataset.__getitems__(range(201))
    assert 0 < len(batch.bad) < 200


def test_nothing_readable(tmp_path):
    dataset = MXFaceDataset(write_set(tmp_path, [(0.0, b"junk")] * 4, "1,112,112\n"))
    with pytest.raises(InputError, match="no readable image among the 4"):
        dataset.__getitems__([0])


@pytest.mark.parametrize("label", [3.0, -1.0, 0.5, float("nan")])
def test_label_that_is_no_class(label, tmp_path):
    dataset = MXFaceDataset(write_set(tmp_path, [(0.0, jpeg(0)), (label, jpeg(1))], "3,112,112\n"))
    with pytest.raises(InputError, match="record 1 of .* has label"):
        dataset.__getitems__([0, 1])
    with pytest.raises(InputError, match="record 1 of .* has label"):
        dataset[1]


def test_property_of_another_set(tmp_path, caplog):
    folder = copy_set("insightface", tmp_path)
    (folder / "property").write_text("5,112,112\n")
    with pytest.raises(InputError, match="record 30 of .* has label 5, but the set has 5 classes"):
        MXFaceDataset(folder)
    assert MXFaceDataset(folder, num_classes=6).num_classes == 6
    assert "says 5 classes, num_classes=6 is used" in caplog.text


def test_missing_and_empty_sets(tmp_path):
    with pytest.raises(InputError, match=f"no record file {tmp_path}/nowhere/train.rec"):
        MXFaceDataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no image"):
        MXFaceDataset(write_set(tmp_path / "empty", [], "0,112,112\n"))
    with pytest.raises(InputError, match="no folder .*nowhere"):
        FaceDatasetFolder(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="no images in .*folder"):
        FaceDatasetFolder(tmp_path / "folder")
    (tmp_path / "folder" / "somebody").mkdir()
    with pytest.raises(
        InputError, match="identity somebody .* has no image: somebody: empty; remove"
    ):
        FaceDatasetFolder(tmp_path / "folder")


def training_set(*words):
    """As training, cache_teacher.py, class_centers.py and teacher_report.py open it."""
    return build_dataset(load_config(ROOT / "config" / "config.py", ["dataset=synthetic", *words]))


@pytest.mark.parametrize("label, classes", [(0, None), (0, 12), (5, None), (5, 12), (5, 6)])
def test_a_set_of_one_class_is_refused_and_gets_no_property(label, classes, tmp_path, monkeypatch):
    """Also where property or num_classes says more; of a large set all labels are read then."""
    monkeypatch.setattr("utils.dataset.records.LABELS_LOOKED_AT", 8)
    folder = write_set(
        tmp_path, [(float(label), jpeg(seed)) for seed in range(40)], f"{classes},112,112"
    )
    if classes is None:
        (folder / "property").unlink()
    before = sorted(os.listdir(folder))
    message = f"all labels are {label}: training needs two classes or more, and the identities of"
    for words in ([], [f"num_classes={classes or 9}"]):
        with pytest.raises(InputError, match=message):
            training_set(f"rec={folder}", *words)
    assert sorted(os.listdir(folder)) == before


def test_one_person_a_folder_is_a_set_where_labels_count_on(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        write_set(tmp_path / name, [(0.0, jpeg(seed)) for seed in range(3)], "1,112,112")
    rec = f"rec={tmp_path / 'a'},{tmp_path / 'b'}"
    assert training_set(rec, "rec_labels=separate").num_classes == 2
    with pytest.raises(InputError, match="all labels are 0"):
        training_set(rec, "rec_labels=shared")


def test_a_folder_of_one_person_is_refused(tmp_path):
    root = write_folder(tmp_path / "faces", {"ann": 3})
    with pytest.raises(
        InputError, match=r"all images are of one identity \(ann\): training needs two"
    ):
        training_set("db_file_format=folder", f"data_path={root}")
    write_folder(root, {"bob": 1})
    assert training_set("db_file_format=folder", f"data_path={root}").num_classes == 2


def test_labels_from_1_are_named_before_training(tmp_path, caplog):
    labels = [1, 2, 3, 4] * 5
    write_set(
        tmp_path, [(float(label), jpeg(seed)) for seed, label in enumerate(labels)], "4,112,112"
    )
    for words in ([], ["num_classes=4"]):
        with pytest.raises(InputError) as told:
            training_set(f"rec={tmp_path}", *words)
        assert (
            "labels run from 1 to 4 (record 3), but classes are counted from 0 and there are 4"
            in str(told.value)
        )
        assert "set num_classes=5 (class 0 then stays empty)" in str(told.value)
    (tmp_path / "property").unlink()
    for words in (["num_classes=5"], [], []):
        caplog.clear()
        assert training_set(f"rec={tmp_path}", *words).num_classes == 5
        assert "begin at 1: class 0 has no image and stays empty" in caplog.text
        assert "classes of" not in caplog.text.replace("images of 5 classes", "")


def test_labels_from_1_of_insightface_layout(tmp_path, caplog):
    """Of which only some are looked at, for they ascend: the first and the last among them."""
    with IndexedRecordIO(tmp_path / "train.idx", tmp_path / "train.rec", "w") as writer:
        for key in range(1, 13):
            writer.write_idx(key, pack(IRHeader(0, float((key + 2) // 3), key, 0), jpeg(key)))
        writer.write_idx(0, pack(IRHeader(2, [13, 13], 0, 0), b""))
    (tmp_path / "property").write_text("4,112,112")
    with pytest.raises(
        InputError,
        match="record 12 .* label 4, but the set has 4 classes .* if its labels run from 1, let",
    ):
        training_set(f"rec={tmp_path}")
    assert training_set(f"rec={tmp_path}", "num_classes=5").num_classes == 5
    assert "begin at 1: class 0 has no image" in caplog.text


def test_a_label_that_is_no_class_is_named_before_training(tmp_path, caplog):
    write_set(tmp_path, [(float(label), jpeg(label)) for label in (0, 1, 7, 1)], "3,112,112")
    with pytest.raises(InputError, match="record 2 of .* has label 7, but the set has 3 classes"):
        training_set(f"rec={tmp_path}")
    (tmp_path / "property").write_text("9,112,112")
    training_set(f"rec={tmp_path}")
    assert (
        "6 of the 9 classes of" in caplog.text and "have no image, class 2 for one" in caplog.text
    )


def test_a_missing_property_beside_damaged_records(tmp_path):
    """They say nothing about the classes, and are named when they are read."""
    folder = copy_set("plain", tmp_path)
    (folder / "property").unlink()
    offset = IndexedRecordIO(folder / "train.idx", folder / "train.rec", "r").offset(3)
    with open(folder / "train.rec", "r+b") as file:
        file.seek(offset)
        file.write(b"oops")
    dataset = MXFaceDataset(folder)
    assert dataset.num_classes == 6 and [name for name, _ in dataset.__getitems__([2, 3]).bad] == [
        3
    ]


def test_what_a_folder_leaves_out_is_named(tmp_path, caplog):
    root = write_folder(tmp_path / "faces", {"ann": 2, "bob": 3})
    FaceDatasetFolder(root)
    assert not caplog.text
    for name in (
        "2.jfif",
        "3.JPE",
        "4.jpg.1",
        "5",
        "6.jfif",
        ".hidden",
        "deeper/7.jpg",
        "empty/notes.txt",
    ):
        path = root / "ann" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jpeg(0))
    (root / "loose.png").write_bytes(jpeg(0))
    (root / "report.csv").write_text("")
    assert len(FaceDatasetFolder(root)) == 5
    assert "left out are 5 files with other suffixes" in caplog.text
    assert (
        "(2 .jfif, 1 .jpe, 1 .1, 1 without): ann/2.jfif, ann/3.JPE, ann/4.jpg.1, ..." in caplog.text
    )
    assert "left out are the images in 1 sub-folders of identities: ann/deeper" in caplog.text
    assert "left out are 1 images in no identity's folder: loose.png" in caplog.text


def test_identities_without_images_are_named_with_the_reason(tmp_path):
    root = write_folder(tmp_path / "faces", {"ann": 1})
    for name in ("p0/s1/2020/a.jpg", "p1/s1/a.jpg", "p1/s2/a.jpg", "r0/a.jfif"):
        path = root / name
        path.parent.mkdir(parents=True)
        path.write_bytes(jpeg(0))
    for number in range(4):
        (root / f"q{number}").mkdir()
    with pytest.raises(InputError) as told:
        FaceDatasetFolder(root)
    message = str(told.value)
    assert message.startswith(f"7 of 8 identities in {root} have no image: ")
    assert "the images of p0, p1 lie in sub-folders (s1, s2): move them up" in message
    assert "r0: only files with other suffixes (1 .jfif) than .jpg" in message
    assert message.endswith("q0, q1, q2, ...: empty; remove such folders")


def test_unknown_backend(tmp_path):
    with pytest.raises(InputError, match="unknown rec_backend 'mxnext'; known: native, mxnet"):
        MXFaceDataset(copy_set("plain", tmp_path), backend="mxnext")


def test_folder(tmp_path):
    root = write_folder(tmp_path / "faces", {"b": 3, "a": 2, "ü x": 4})
    (root / "a" / "notes.txt").write_text("no image")
    (root / "a" / "99.PNG").write_bytes(
        cv2.imencode(".png", np.full((112, 112), 7, np.uint8))[1].tobytes()
    )
    dataset = FaceDatasetFolder(root)
    assert len(dataset) == 10 and dataset.num_classes == 3
    batch = dataset.__getitems__(range(10))
    assert batch.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2] and batch.bad == []
    assert (batch.images[2] == 7).all()
    image = cv2.cvtColor(cv2.imread(str(root / "b" / "01.jpg")), cv2.COLOR_BGR2RGB)
    assert np.array_equal(dataset[4][0], image) and dataset[4][1] == 1
    sampled = FaceDatasetFolder(root, sample=2)
    assert len(sampled) == 6 and sampled.num_classes == 3
    (root / "b" / "01.jpg").unlink()
    assert dataset.__getitems__([4]).bad == [
        (os.path.join("b", "01.jpg"), "cannot be read: No such file or directory")
    ]
