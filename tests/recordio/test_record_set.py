"""utils.recordio: several record files as one set, and an index that all processes of a machine
share.
"""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest

from config.load import load_config
from tests.commands import ROOT
from tests.dataset.test_dataset import copy_set, jpeg, write_set
from tests.recordio.test_recordio import GOLDEN, SPANS
from utils.dataset.records import MXFaceDataset
from utils.errors import InputError
from utils.recordio import index as record_index
from utils.recordio.format import IRHeader, frame, pack, unpack
from utils.recordio.idx_file import read_index
from utils.recordio.index import in_memory, open_index, order_of
from utils.recordio.indexed import IndexedRecordIO
from utils.recordio.writer import write_insightface


@pytest.fixture(scope="module")
def expected():
    return np.load(GOLDEN / "expected.npz")


def write_shard(folder, name, records):
    """``records``: (key, label, image bytes)."""
    folder.mkdir(exist_ok=True)
    with IndexedRecordIO(folder / f"{name}.idx", folder / f"{name}.rec", "w") as writer:
        for key, label, image in records:
            writer.write_idx(key, pack(IRHeader(0, float(label), key, 0), image))
    return folder / f"{name}.rec"


def golden_records():
    """(key, label, image bytes) of the golden plain set."""
    reader = IndexedRecordIO(GOLDEN / "plain.idx", GOLDEN / "plain.rec", "r")
    for key in reader.keys:
        header, image = unpack(reader.read_idx(key))
        yield key, header.label, image


@pytest.fixture
def shards(tmp_path):
    """The golden plain set in three shards, of which "10" comes last; the keys go on from one to
    the next.
    """
    records = list(golden_records())
    for name, part in (
        ("train_2", records[:11]),
        ("train_9", records[11:12]),
        ("train_10", records[12:]),
    ):
        write_shard(tmp_path / "set", name, part)
    (tmp_path / "set" / "property").write_text("6,112,112\n")
    return tmp_path / "set"


def read_all(dataset):
    return dataset.__getitems__(range(len(dataset)))


def test_shards_equal_the_whole(shards, expected, tmp_path):
    dataset = MXFaceDataset(shards)
    batch = read_all(dataset)
    assert len(dataset) == 30 and dataset.num_classes == 6 and not batch.bad
    assert np.array_equal(batch.images, expected["plain/pixels"]) and np.array_equal(
        batch.labels, expected["plain/labels"]
    )
    assert np.array_equal(dataset.labels(range(30)), expected["plain/labels"])
    assert [dataset.name_of(index) for index in (0, 11, 12, 29)] == [
        "train_2.rec:0",
        "train_9.rec:11",
        "train_10.rec:12",
        "train_10.rec:29",
    ]
    named = MXFaceDataset([shards / "train_2.rec", shards / "train_9.rec", shards / "train_10.rec"])
    assert named.identity() == dataset.identity() and dataset.identity()["files"] == 3
    assert (
        MXFaceDataset([shards / "train_10.rec", shards / "train_2.rec"]).identity()["sha256"]
        != MXFaceDataset([shards / "train_2.rec", shards / "train_10.rec"]).identity()["sha256"]
    )
    for index in (-1, 30):
        with pytest.raises(IndexError):
            dataset[index]
    copy = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(copy.__getitems__([11, 29]).images, expected["plain/pixels"][[11, 29]])


def test_a_train_rec_stands_alone(shards):
    """As it was before there were shards; a validation file beside it is no part of the set."""
    write_shard(shards, "train", [(0, 5, jpeg(0))])
    assert len(MXFaceDataset(shards)) == 1
    write_shard(shards, "val", [(0, 5, jpeg(0))])
    (shards / "train.rec").unlink()
    assert len(MXFaceDataset(shards)) == 30


EARLIER = {
    "plain": dict(
        kind="records",
        images=30,
        bytes=123488,
        sha256="3a4f14cb71bf02292bbc6c7f89155f291146bfef0228737aa283af613d066056",
    ),
    "insightface": dict(
        kind="records",
        images=30,
        bytes=123768,
        sha256="09eb1fdc6d6ce3630af8f55c0dbdfdea4eb4a16a1b10ddb9e0b144f5bb2fe621",
    ),
}


@pytest.mark.parametrize("style", EARLIER)
def test_identity_of_a_single_file_is_that_of_earlier_caches(style, tmp_path):
    """Caches of teacher features name it; computed before several files could be a set."""
    assert MXFaceDataset(copy_set(style, tmp_path)).identity() == EARLIER[style]


def test_missing_index_and_property_of_shards_are_rebuilt(shards, caplog):
    intact = read_all(MXFaceDataset(shards))
    for name in ("property", "train_9.idx", "train_10.idx"):
        (shards / name).unlink()
    dataset = MXFaceDataset(shards)
    assert np.array_equal(read_all(dataset).images, intact.images) and dataset.num_classes == 6
    assert (shards / "property").read_text() == "6,112,112\n" and (
        shards / "train_10.idx"
    ).is_file()
    assert "train_9.idx is missing" in caplog.text and "headers of 30 records" in caplog.text


def test_insightface_shards(tmp_path, expected):
    """Each with a record 0 of its own, and the keys from 1."""
    reader = IndexedRecordIO(GOLDEN / "insightface.idx", GOLDEN / "insightface.rec", "r")
    for number in range(2):  # three identities each, whose labels start at 0 again
        groups = [
            [unpack(reader.read_idx(key))[1] for key in range(*span)]
            for span in SPANS[3 * number : 3 * number + 3]
        ]
        write_insightface(tmp_path / str(number), groups)
    folders = [tmp_path / "0", tmp_path / "1"]
    dataset = MXFaceDataset(folders, labels="separate")
    batch = read_all(dataset)
    assert np.array_equal(batch.images, expected["insightface/pixels"]) and np.array_equal(
        batch.labels, expected["insightface/labels"]
    )
    assert dataset.num_classes == 6 and np.array_equal(dataset.labels(range(30)), batch.labels)
    assert dataset.name_of(15) == f"{tmp_path / '1' / 'train.rec'}:1"
    shared = MXFaceDataset(folders, labels="shared")
    assert shared.num_classes == 3 and read_all(shared).labels.tolist() == [
        label % 3 for label in batch.labels.tolist()
    ]
    # the images are the same, whatever they are called
    assert shared.identity() == dataset.identity()
    with pytest.raises(
        InputError, match="rec names 2 folders .* set rec_labels=shared .* or rec_labels=separate"
    ):
        MXFaceDataset(folders)
    with pytest.raises(InputError, match="num_classes=5 is smaller than the 6 classes"):
        MXFaceDataset(folders, num_classes=5, labels="separate")
    assert MXFaceDataset(folders, num_classes=8, labels="separate").num_classes == 8


def test_a_label_of_the_next_set_is_no_class(tmp_path):
    """Counted on, it would be somebody else's."""
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        write_set(
            tmp_path / str(number),
            [(float(label), jpeg(label)) for label in (0, 2 - number)],
            "2,112,112\n",
        )
    dataset = MXFaceDataset([tmp_path / "0", tmp_path / "1"], labels="separate")
    assert dataset[3][1] == 3
    with pytest.raises(
        InputError,
        match=r"record .*0/train.rec:1 of .* has label 2, but the set "
        r"has 2 classes",
    ):
        dataset[1]


def test_damage_in_a_shard_is_named_and_replaced_over_its_end(shards):
    with open(shards / "train_9.rec", "r+b") as file:
        file.write(b"oops")
    dataset = MXFaceDataset(shards)
    batch = dataset.__getitems__([11])
    assert [name for name, _ in batch.bad] == ["train_9.rec:11"] and (
        f"{shards / 'train_9.rec'}: key 11 at offset 0"
    ) in batch.bad[0][1]
    assert np.array_equal(batch.images[0], dataset[12][0])
    os.truncate(shards / "train_10.rec", os.path.getsize(shards / "train_10.rec") - 100)
    # around the end
    assert np.array_equal(dataset.__getitems__([29]).images[0], dataset[0][0])


def test_what_rec_cannot_name(shards, tmp_path):
    (tmp_path / "empty").mkdir()
    for rec, message in (
        ([shards, shards / "train_9.rec"], "names .*train_9.rec twice"),
        ([], "rec names no file"),
        (tmp_path / "empty", "no record file .*empty/train.rec"),
        (shards / "train_7.rec", "no record file .*train_7.rec"),
        ([shards, tmp_path / "gone"], "set rec_labels="),
    ):
        with pytest.raises(InputError, match=message):
            MXFaceDataset(rec)
    write_shard(tmp_path / "others", "part0", [(0, 0, jpeg(0))])
    with pytest.raises(
        InputError,
        match=r"no shards train\*.rec beside it; it holds part0.rec: "
        r"name the files of the set, rec=.*others/part0.rec",
    ):
        MXFaceDataset(tmp_path / "others")
    assert len(MXFaceDataset(tmp_path / "others" / "part0.rec")) == 1


def test_rec_in_the_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def rec(*words, config=ROOT / "config" / "config.py"):
        return load_config(config, ["dataset=synthetic", *words]).rec

    assert rec("rec=one") == str(tmp_path / "one") and rec() == str(ROOT / "data" / "synthetic")
    assert rec("rec=one,/two/b.rec , ~/three") == [
        str(tmp_path / "one"),
        "/two/b.rec",
        os.path.expanduser("~/three"),
    ]
    (tmp_path / "a,b").mkdir()
    assert rec("rec=a,b") == str(tmp_path / "a,b")
    (tmp_path / "mine.py").write_text(
        "from config.config import config\nconfig.rec = ['x', '/y']\n"
    )
    assert rec(config=tmp_path / "mine.py") == [str(ROOT / "x"), "/y"]
    (tmp_path / "mine.json").write_text(
        json.dumps(dict(load_config(tmp_path / "mine.py", ["dataset=synthetic"])))
    )
    assert rec(config=tmp_path / "mine.json") == [str(ROOT / "x"), "/y"]
    (tmp_path / "mine.py").write_text("from config.config import config\nconfig.rec = 3\n")
    with pytest.raises(
        InputError, match="rec=3 has the wrong type or value: expected a path or a list of paths"
    ):
        rec(config=tmp_path / "mine.py")


# --- the index that a machine shares


@pytest.fixture
def big_index(tmp_path, monkeypatch):
    """An .idx as InsightFace's, record 0 last, large enough to be shared; the .rec is a hole.

    And the temporary folder of this test alone.
    """
    monkeypatch.setattr(record_index.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return write_big_index(tmp_path / "train", list(range(1, 100_000)) + [0])


def write_big_index(stem, keys):
    with open(f"{stem}.idx", "w") as file:
        file.writelines(f"{key}\t{at * 4000}\n" for at, key in enumerate(keys))
    with open(f"{stem}.rec", "wb") as file:
        file.truncate(len(keys) * 4000)
    return f"{stem}.idx", f"{stem}.rec"


def no_scan():
    raise AssertionError("nothing is to be scanned")


def shared_files(tmp_path):
    return sorted((tmp_path / "tmp").glob("record-index-*/*.index"))


@pytest.mark.parametrize("keys", ["insightface", "shuffled", "huge"])
def test_shared_index_equals_the_dictionary_of_its_lines(keys, big_index, tmp_path):
    listed = {
        "insightface": list(range(1, 100_000)) + [0],
        "shuffled": np.random.default_rng(0).permutation(100_000).tolist(),
        "huge": [1 << 40, 3] + list(range(10, 100_000)),
    }[keys]
    idx, rec = write_big_index(tmp_path / "train", listed)
    index = open_index(idx, rec, no_scan)
    expected = {key: at * 4000 for at, key in enumerate(listed)}
    assert (
        index.mapped
        and index.keys.tolist() == sorted(listed)
        and index.keys.dtype == (np.int64 if keys == "huge" else np.uint32)
    )
    assert index.offsets.tolist() == [expected[key] for key in sorted(listed)]
    assert (index.by_offset is None) == (keys == "insightface")
    if index.by_offset is not None:
        assert np.array_equal(index.by_offset, np.argsort(index.offsets, kind="stable"))
    alone = in_memory(*read_index(idx))
    assert np.array_equal(alone.keys, index.keys) and np.array_equal(alone.offsets, index.offsets)
    reader = IndexedRecordIO(idx, rec, "r")
    assert (
        reader.keys == listed
        and reader.offset(7) == expected.get(7, 28_000 if keys != "huge" else None)
        if 7 in expected
        else True
    )
    for key in (-1, 1 << 33, 1 << 63, 200_000):
        with pytest.raises(KeyError):
            reader.offset(key)


# (key, offset / 4000) of line ``at`` of ``lines``, and what is said about them
CONTRADICTING = {
    "all keys 0": (lambda at, lines: (0, at), "1 of them; key 0: 0, 4000, 8000, ..."),
    "two lists joined": (lambda at, lines: (at % (lines // 2), at), "of them; key 0: 0, "),
    "one key of two records": (
        lambda at, lines: (at if at != 17 else 3, at),
        "1 of them; key 3: 12000, 68000",
    ),
    "record 0 last": (lambda at, lines: ((at + 1) % lines or 5, at), "1 of them; key 5: 16000, "),
    "all offsets 0": (lambda at, lines: (at, 0), "the keys 0 and 1 have the same offset"),
    "offsets in order": (
        lambda at, lines: (at, at if at else 7),
        "the keys 0 and 7 have the same offset",
    ),
    "offsets in another order": (
        lambda at, lines: (at, lines - 1 - at if at != 9 else 0),
        "the keys .* have the same offset",
    ),
}


@pytest.mark.parametrize("lines", [60, 100_000])
@pytest.mark.parametrize("kind", CONTRADICTING)
def test_an_index_that_contradicts_itself_is_refused(kind, lines, big_index, tmp_path):
    """One record would be read for another, others never; the long .idx is one that is shared."""
    idx, rec = big_index
    numbers, message = CONTRADICTING[kind]
    with open(idx, "w") as file:
        for key, at in (numbers(at, lines) for at in range(lines)):
            file.write(f"{key}\t{at * 4000}\n")
    for _ in range(2):
        with pytest.raises(InputError, match=f"train.idx.*{message}.*delete train.idx to have it"):
            IndexedRecordIO(idx, rec, "r")
    assert not shared_files(tmp_path)


@pytest.mark.parametrize("count", [60, 100_000])
def test_a_line_that_stands_there_twice_counts_once(count, big_index, caplog):
    idx, rec = big_index
    with open(idx, "w") as file:
        file.writelines(f"{key}\t{key * 4000}\n" for key in [*range(count), 59, 3, 3, 17])
    # the second time the shared one is there
    for _ in range(2):
        caplog.clear()
        reader = IndexedRecordIO(idx, rec, "r")
        assert reader.keys == reader.key_array.tolist() == list(range(count))
        assert np.array_equal(reader.index.offsets, 4000 * np.arange(count))
        assert "4 lines say again what another one says" in caplog.text
    assert reader.index.mapped == (count > 60)


def test_an_index_that_an_earlier_version_shared_is_looked_at_again(
    big_index, monkeypatch, tmp_path
):
    idx, rec = big_index
    monkeypatch.setattr(record_index, "FORMAT", record_index.FORMAT - 1)
    open_index(idx, rec, no_scan)
    (made,) = shared_files(tmp_path)
    before = made.stat().st_ino
    monkeypatch.undo()
    monkeypatch.setattr(record_index.tempfile, "tempdir", str(tmp_path / "tmp"))
    assert open_index(idx, rec, no_scan).mapped and made.stat().st_ino != before


@pytest.mark.parametrize(
    "offset, count",
    [
        ("18446744073709551615", 3),
        ("9223372036854775807", 1),
        ("123488", 2),
        ("200000", 1),
        (str(1 << 62), 2),
    ],
)
def test_offsets_beyond_the_file_are_refused(offset, count, tmp_path):
    """The golden file is whole: they lie nowhere; 2**64 - 1 is MXNet's tell() that failed."""
    folder = copy_set("plain", tmp_path)
    lines = (folder / "train.idx").read_text().splitlines()
    size = os.path.getsize(folder / "train.rec")
    lines[-count:] = [f"{line.split()[0]}\t{int(offset)}" for line in lines[-count:]]
    (folder / "train.idx").write_text("\n".join(lines))
    more = f", as do {count - 1} more" if count > 1 else ""
    with pytest.raises(InputError) as told:
        MXFaceDataset(folder)
    assert (
        f"train.idx: offset {offset} of key {30 - count} lies beyond the {size} bytes of "
        f"{folder / 'train.rec'}{more}; " in str(told.value)
    )
    assert "delete train.idx to have it rebuilt" in str(told.value)
    (folder / "train.idx").unlink()
    assert len(MXFaceDataset(folder)) == 30


def test_a_file_that_is_cut_off_is_named_and_its_records_are_damaged(tmp_path, caplog):
    """Also where it ends inside the frame of a record."""
    offsets = read_index(GOLDEN / "plain.idx")[1]
    for end, damaged in ((offsets[25] + 100, 5), (offsets[25] + 2, 5), (offsets[29] + 30, 1)):
        folder = copy_set("plain", tmp_path / str(end))
        os.truncate(folder / "train.rec", end)
        caplog.clear()
        batch = read_all(MXFaceDataset(folder))
        assert [name for name, _ in batch.bad] == list(range(30 - damaged, 30))
        assert ("is cut off: it ends inside a record, and " in caplog.text) == (damaged > 1)
    # at the end of a record it might as well be whole
    folder = copy_set("plain", tmp_path / "even")
    os.truncate(folder / "train.rec", offsets[25])
    with pytest.raises(
        InputError,
        match="95124 of key 25 lies beyond the 95124 bytes .* as do 4 more; .* copy both again",
    ):
        MXFaceDataset(folder)


@pytest.mark.parametrize("shift", [4, 2000])
def test_the_index_of_another_file_is_refused(shift, tmp_path):
    folder = copy_set("plain", tmp_path)
    lines = [line.split() for line in (folder / "train.idx").read_text().splitlines()]
    (folder / "train.idx").write_text(
        "".join(f"{key}\t{int(offset) + shift if int(key) else 0}\n" for key, offset in lines)
    )
    with pytest.raises(
        InputError,
        match=r"train.idx is not the index of .*train.rec: no record begins at 29 of 30 offsets .*"
        r"\(the first: key 1",
    ):
        MXFaceDataset(folder)


def test_two_joined_files_are_numbered_anew(tmp_path, caplog):
    """cat a.rec b.rec: the ids of headers repeat, InsightFace's index records lie in between."""
    for style, layout in (("plain", False), ("insightface", True)):
        folder = tmp_path / style
        folder.mkdir()
        content = (GOLDEN / f"{style}.rec").read_bytes()
        (folder / "train.rec").write_bytes(content + content)
        (folder / "property").write_text("6,112,112\n")
        caplog.clear()
        dataset = MXFaceDataset(folder)
        batch = read_all(dataset)
        assert (
            len(dataset) == 60 and not batch.bad and dataset.record_files()[0].insightface is False
        )
        assert np.array_equal(batch.images[:30], batch.images[30:])
        assert "numbered as they come" in caplog.text
        assert ("14 records hold ranges of keys and no image" in caplog.text) == layout
        caplog.clear()
        assert len(MXFaceDataset(folder)) == 60 and not caplog.text  # the index was kept


def edit_insightface(folder, edit):
    """Lines of the golden index, {key: offset}, as ``edit`` changes them."""
    copy_set("insightface", folder)
    keys, offsets = read_index(GOLDEN / "insightface.idx")
    lines = dict(zip(keys.tolist(), offsets.tolist(), strict=True))
    edit(lines)
    (folder / "train.idx").write_text(
        "".join(f"{key}\t{offset}\n" for key, offset in lines.items())
    )
    return folder


@pytest.mark.parametrize("lost", [(0,), (0, 35, 36), (0, 31, 32, 33), (0, 12), (0, 1)])
def test_insightface_index_that_lost_record_0(lost, tmp_path, expected, caplog):
    """The last line of such an .idx; identities 31 ... 36 would be images that none can read."""
    folder = edit_insightface(tmp_path, lambda lines: [lines.pop(key) for key in lost])
    dataset = MXFaceDataset(folder)
    images = [row for row in range(30) if row + 1 not in lost]
    batch = read_all(dataset)
    assert len(dataset) == len(images) and not batch.bad
    assert np.array_equal(batch.images, expected["insightface/pixels"][images])
    identities = 6 - sum(key > 30 for key in lost)
    first = min(key for key in range(31, 37) if key not in lost)
    assert (
        "does not list record 0, which tells images from InsightFace's identity records: "
        f"the {identities} records from key {first} on" in caplog.text
    )
    caplog.clear()
    (folder / "train.idx").unlink()
    assert len(MXFaceDataset(folder)) == 30 and "does not list" not in caplog.text


def test_damaged_records_do_not_hide_where_images_end(tmp_path, caplog):
    folder = edit_insightface(tmp_path, lambda lines: lines.pop(0))
    offsets = dict(
        zip(*(values.tolist() for values in read_index(folder / "train.idx")), strict=True)
    )
    with open(folder / "train.rec", "r+b") as file:
        for key in (14, 15, 30, 33, 36):
            file.seek(offsets[key])
            file.write(b"oops")
    dataset = MXFaceDataset(folder)
    assert len(dataset) == 30 and [name for name, _ in read_all(dataset).bad] == [14, 15, 30]


def with_record_0(folder, label):
    """The golden InsightFace set with another record 0."""
    copy_set("insightface", folder)
    offset = IndexedRecordIO(folder / "train.idx", folder / "train.rec", "r").offset(0)
    with open(folder / "train.rec", "r+b") as file:
        file.seek(offset)
        file.write(frame(pack(IRHeader(2, label, 0, 0), b"")))
    return folder


def test_record_0_of_another_set(tmp_path, caplog):
    for label, images in ((31, 30), (34, 30), (37, 30), (5000, 30)):
        caplog.clear()
        dataset = MXFaceDataset(with_record_0(tmp_path / str(label), [label, 37]))
        assert len(dataset) == images and not read_all(dataset).bad
        assert ("record 0 says that images end before key" in caplog.text) == (label > 31)
    with pytest.raises(
        InputError,
        match="record 0 says that no image follows key 20, but key 21 is one: record 0 or "
        ".*train.idx is of another set",
    ):
        MXFaceDataset(with_record_0(tmp_path / "21", [21, 37]))
    for label in (0, -3, float("nan")):
        with pytest.raises(InputError, match="holds no image"):
            MXFaceDataset(with_record_0(tmp_path / str(label), [label, 37]))
    folder = edit_insightface(
        tmp_path / "short", lambda lines: [lines.pop(key) for key in range(20, 37)]
    )
    caplog.clear()
    assert (
        len(MXFaceDataset(folder)) == 19
        and "train.idx names 19 of the 30 images that record 0" in caplog.text
    )


def test_an_empty_image_at_key_0_is_no_record_0(tmp_path):
    """Also one whose header promises more labels than there are."""
    for record in (
        pack(IRHeader(0, 3.0, 0, 0), b""),
        struct.pack("<IfQQ", 9999, 3.0, 0, 0) + b"\0" * 8,
    ):
        with IndexedRecordIO(tmp_path / "train.idx", tmp_path / "train.rec", "w") as writer:
            writer.write_idx(0, record)
            for key in range(1, 9):
                writer.write_idx(key, pack(IRHeader(0, float(key % 4), key, 0), jpeg(key)))
        (tmp_path / "property").write_text("4,112,112")
        dataset = MXFaceDataset(tmp_path)
        assert len(dataset) == 9 and [name for name, _ in read_all(dataset).bad] == [0]


def test_vector_labels_with_an_empty_last_image_are_no_identities(tmp_path):
    """im2rec --pack-label from key 1 on: labels that are no range of keys."""
    with IndexedRecordIO(tmp_path / "train.idx", tmp_path / "train.rec", "w") as writer:
        for key in range(1, 9):
            writer.write_idx(
                key, pack(IRHeader(0, [key % 4, 0.5], key, 0), jpeg(key) if key < 8 else b"")
            )
    (tmp_path / "property").write_text("4,112,112")
    dataset = MXFaceDataset(tmp_path)
    assert len(dataset) == 8 and [name for name, _ in read_all(dataset).bad] == [8]


@pytest.mark.parametrize(
    "text",
    [
        "6,112,112",
        "6,112,112\n",
        "\ufeff6,112,112\r\n",
        "6, 112, 112\n",
        "6 112 112",
        "6\t112\t112\n",
        "6\n112,112\n",
        "6\n112\n112\n",
        "6,\n112 112",
        " 6,112,112, \n",
        "6,112,112\n30\n",
        "6,112,112\n30\nshuffled\n2021-03-01 12:00:00.123456\n",
        "6,112,112\n\n30",
        "6;112;112",
    ],
)
def test_property_in_one_line_or_several(text, tmp_path):
    """InsightFace's RecBuilder adds the number of images, its shuffle_rec.py also the time."""
    folder = copy_set("plain", tmp_path)
    (folder / "property").write_bytes(text.encode())
    assert MXFaceDataset(folder).num_classes == 6


@pytest.mark.parametrize(
    "text",
    [
        "",
        "6",
        "6,112",
        "6\n112",
        "six,112,112",
        "6,112,112,3",
        "6\n112,112,3\n",
        "6.5,112,112",
        "0,112,112",
        "-6,112,112",
        "shuffled\n6,112,112",
        "\0\0\0",
    ],
)
def test_what_is_no_property(text, tmp_path):
    folder = copy_set("plain", tmp_path)
    (folder / "property").write_bytes(text.encode())
    with pytest.raises(
        InputError,
        match="property holds .* instead of classes,height,width; delete it to have it rebuilt",
    ):
        MXFaceDataset(folder)


def test_order_of_equals_argsort():
    rng = np.random.default_rng(0)
    for values in (
        rng.integers(0, 50, 1000),
        rng.integers(0, 1 << 40, 1000),
        rng.integers(0, 1 << 62, 1000),
        np.zeros(1, np.int64),
    ):
        assert np.array_equal(order_of(values), np.argsort(values, kind="stable"))


def test_a_changed_index_is_not_taken_from_before(big_index, tmp_path):
    idx, rec = big_index
    assert open_index(idx, rec, no_scan).offsets[1] == 0
    (made,) = shared_files(tmp_path)
    stamp = made.stat().st_ino
    open_index(idx, rec, no_scan)
    assert made.stat().st_ino == stamp  # it was taken as it is
    status = os.stat(idx)
    text = open(idx).read()
    with open(idx, "r+") as file:
        file.write(text.replace("\t4000\n", "\t4004\n", 1))
    # as cp -p and rsync do: same size, same time
    os.utime(idx, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert open_index(idx, rec, no_scan).offsets[2] == 4004
    os.utime(rec)
    stamp = made.stat().st_ino
    open_index(idx, rec, no_scan)
    assert made.stat().st_ino != stamp
    for damage in (b"", b"{}", made.read_bytes()[:-8], b"x" * 5000):
        made.write_bytes(damage)
        assert open_index(idx, rec, no_scan).offsets[2] == 4004


@pytest.mark.processes
def test_processes_share_the_pages_of_one_file(big_index, tmp_path):
    """A spawned process maps what this one has made: nothing of the index is its own, and nothing
    is sent along.
    """
    reader = IndexedRecordIO(*big_index, "r")
    sent = pickle.dumps(reader)
    assert len(sent) < 2000
    program = (
        "import pickle, sys; sys.path.insert(0, sys.argv[1]); reader = "
        "pickle.loads(sys.stdin.buffer.read()); reader.index.offsets.sum(); "
        "reader.index.keys.sum()\n"
        "print(reader.offset(99_999)); print(open('/proc/self/smaps').read())"
    )
    out = subprocess.run(
        [sys.executable, "-c", program, ROOT],
        input=sent,
        capture_output=True,
        check=True,
        env=dict(os.environ, TMPDIR=str(tmp_path / "tmp")),
    ).stdout.decode()
    assert out.splitlines()[0] == str(99_998 * 4000)
    mapping = out[out.index(str(shared_files(tmp_path)[0])) :].split("VmFlags")[0]
    sizes = {
        line.split(":")[0]: int(line.split()[1])
        for line in mapping.splitlines()[1:]
        if line.endswith("kB")
    }
    assert sizes["Rss"] > 1000 and sizes["Private_Dirty"] == sizes["Anonymous"] == 0


@pytest.mark.processes
def test_many_processes_at_once_make_it_once(big_index, tmp_path):
    program = """
import sys
sys.path.insert(0, sys.argv[1])
from utils.recordio import index as record_index
save = record_index.save
def telling(*arguments):
    print("made")
    save(*arguments)
record_index.save = telling
index = record_index.open_index(*sys.argv[2:], None)
print(index.offsets[-1], index.mapped)
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, ROOT, *big_index],
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ, TMPDIR=str(tmp_path / "tmp")),
        )
        for _ in range(4)
    ]
    said = [process.communicate()[0] for process in processes]
    assert sorted(said) == [f"{99_998 * 4000} True\n"] * 3 + [f"made\n{99_998 * 4000} True\n"]


def test_a_temporary_folder_that_cannot_be_used(big_index, tmp_path, monkeypatch, caplog):
    """Somebody else's folder under our name, a place that is no folder, a full disk: the index is
    there all the same, and the log says so.
    """
    folder = tmp_path / "tmp" / f"record-index-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    assert not open_index(*big_index, no_scan).mapped and "is not this user's alone" in caplog.text
    shutil.rmtree(folder)
    folder.write_text("")
    assert not open_index(*big_index, no_scan).mapped and "File exists" in caplog.text
    folder.unlink()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record_index, "save", full)
    index = open_index(*big_index, no_scan)
    assert (
        not index.mapped
        and index.offsets[0] == 99_999 * 4000
        and "No space left on device" in caplog.text
    )


def test_a_missing_index_in_a_read_only_folder_is_scanned_once_a_machine(
    tmp_path, monkeypatch, big_index
):
    monkeypatch.setattr(record_index, "SHARED_FROM_RECORDS", 0)
    folder = copy_set("plain", tmp_path / "set")
    (folder / "train.idx").unlink()
    monkeypatch.setattr("utils.recordio.indexed.os.access", lambda *arguments: False)
    first = IndexedRecordIO(folder / "train.idx", folder / "train.rec", "r")
    scanned = []
    monkeypatch.setattr("utils.recordio.indexed.scan_index", scanned.append)
    assert not (folder / "train.idx").exists() and first.index.mapped
    again = IndexedRecordIO(folder / "train.idx", folder / "train.rec", "r")
    assert not scanned and again.keys == first.keys == list(range(30))
