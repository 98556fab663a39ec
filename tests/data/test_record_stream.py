"""WebDataset shards and Arrow folders as record sets: side by side with the libraries that people
write and read them with.
"""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import braceexpand
import cv2
import datasets
import numpy as np
import pytest
import webdataset

from data import make_rec, record_stream
from data.arrow_rows import ArrowRows
from data.packing import BadImage, image_encoder
from data.record_stream import write_stream
from data.tar_shards import TarShards, expand_braces
from tests.commands import ROOT
from tests.dataset.test_dataset import jpeg
from utils.dataset.records import MXFaceDataset
from utils.errors import InputError

COMMAND = [sys.executable, str(ROOT / "data" / "make_rec.py")]
FILES = ("train.rec", "train.idx", "train.lst", "property")


def write_tar(path, files, mode="w"):
    """files: (name, content) in order."""
    with tarfile.open(path, mode) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder, labels, per_shard=3):
    """Shards of images with these labels, as the webdataset library writes them; their paths."""
    folder.mkdir(exist_ok=True)
    shards = []
    for first in range(0, len(labels), per_shard):
        shards.append(folder / f"set-{first // per_shard:03d}.tar")
        with webdataset.TarWriter(str(shards[-1])) as writer:
            for number, label in enumerate(labels[first : first + per_shard], start=first):
                writer.write({"__key__": f"{number:06d}", "jpg": jpeg(number), "cls": label})
    return shards


def convert(source, output, skip_bad=False, resize=False):
    options = dict(quality=95, resize=resize)
    return write_stream(source, output, image_encoder(95, resize), options, skip_bad)


def contents(folder):
    return [(folder / name).read_bytes() for name in FILES]


@pytest.mark.parametrize("suffix, mode", [("tar", "w"), ("tar.gz", "w:gz")])
def test_samples_are_those_of_the_webdataset_library(tmp_path, suffix, mode):
    shards = [
        [
            ("./a.b/0001.CLS", b"7\n"),
            ("./a.b/0001.JPG", jpeg(1)),
            ("0002.png", b"png"),
            ("0002.seg.png", b"another file of the sample"),
            ("0002.json", b'{"label": 8, "box": [1, 2]}'),
            ("0002.txt", b"a caption"),
            ("__index__", b""),
            ("no extension", b"x"),
        ],
        [
            ("0002.webp", b"a new sample: another archive"),
            ("0002.txt", b" ann b "),
            ("deep/er/x.jpeg", bytes(512)),
            ("deep/er/x.json", b'{"label": "word"}'),
            ("x.jpg", b"not deep/er/x"),
            ("x.cls", b"007"),
            (f"{'long' * 40}.jpg", b"names beyond 100 characters"),
            (f"{'long' * 40}.cls", b"-1"),
        ],
    ]
    paths = [
        str(write_tar(tmp_path / f"s-{number}.{suffix}", files, mode))
        for number, files in enumerate(shards)
    ]
    source = TarShards([str(tmp_path / f"s-{{0..1}}.{suffix}")])
    samples = [
        source.read(sample)[:2]
        for part in range(len(source.parts))
        for sample, _ in source.samples(part)
    ]
    expected = []
    for sample in webdataset.WebDataset(paths, shardshuffle=False):
        image = next(sample[key] for key in ("jpg", "jpeg", "png", "webp") if key in sample)
        name = os.path.basename(sample["__url__"])
        expected.append((f"{name}/{sample['__key__']}", image))
    assert samples == expected and len(samples) == 6
    labels = [source.read(sample).label for part in (0, 1) for sample, _ in source.samples(part)]
    assert labels == [7, 8, "ann b", "word", 7, -1]


def test_odd_labels(tmp_path):
    """A byte order mark; so many digits that Python takes them for an attack."""
    files = {"a.jpg": b"", "a.cls": b"\xef\xbb\xbf3", "b.jpg": b"", "b.cls": b"9" * 5000}
    write_tar(tmp_path / "s.tar", files.items())
    source = TarShards([str(tmp_path / "s.tar")])
    labels = [source.read(sample).label for sample, _ in source.samples(0)]
    assert labels == [3, "9" * 5000]


@pytest.mark.parametrize(
    "pattern",
    [
        "a-{000..011}.tar",
        "{0..2}/b.tar",
        "{b,a}-{1..2}.tar",
        "c{9..11}",
        "{01..1}",
        "{3..1}",
        "a{b}c",
        "{s-{000,001},s-005}.tar",
        "s-{{000..001},{005..005},x}.tar",
        "{a,{b,c}{1..2}}",
    ],
)
def test_brace_patterns_are_a_shells(pattern):
    assert expand_braces(pattern) == list(braceexpand.braceexpand(pattern))


def test_shards_become_a_set(tmp_path):
    shards = write_shards(tmp_path / "shards", ["1", "0", "2", "0"])
    write_tar(
        shards[0], [("r.cls", b"1"), ("r.png", cv2.imencode(".png", np.zeros((112, 112, 3)))[1])]
    )
    written = convert(TarShards([str(tmp_path / "shards")]), tmp_path / "out")
    assert written == (2, 2, 0, False) and sorted(os.listdir(tmp_path)) == ["out", "shards"]
    images = MXFaceDataset(tmp_path / "out")
    assert [images[index][1] for index in range(2)] == [1, 0] and images.num_classes == 2
    assert images.stored(1)[0] == jpeg(3) and not images[0][0].any()
    assert (
        tmp_path / "out/train.lst"
    ).read_text() == "0\t1\tset-000.tar/r\n1\t0\tset-001.tar/000003\n"
    assert sorted(os.listdir(tmp_path / "out")) == sorted(FILES)


@pytest.mark.parametrize(
    "labels, classes",
    [
        (["12", "3", "12", "100"], {3: 0, 12: 1, 100: 2}),
        (["-1", "0", "1"], {-1: 0, 0: 1, 1: 2}),
        (["1", "2"], {1: 0, 2: 1}),
        (["n10", "n9", "a,b"], {"a,b": 0, "n10": 1, "n9": 2}),
        (["99999999999", "0"], {0: 0, 99999999999: 1}),
    ],
)
def test_labels_are_mapped_and_the_map_is_written(tmp_path, labels, classes):
    write_shards(tmp_path / "shards", labels)
    written = convert(TarShards([str(tmp_path / "shards")]), tmp_path / "out")
    assert written.is_mapped and written.classes == len(classes)
    with open(tmp_path / "out/label_map.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["class", "label"]
    assert rows == [[str(number), str(label)] for label, number in classes.items()]
    images = MXFaceDataset(tmp_path / "out")
    by_text = {str(label): number for label, number in classes.items()}
    assert [images[index][1] for index in range(len(labels))] == [
        by_text[label] for label in labels
    ]
    # a set without a map takes the place of one that has it
    write_shards(tmp_path / "others", ["0", "1"])
    convert(TarShards([str(tmp_path / "others")]), tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == sorted(FILES)


def test_interrupted_anywhere_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(record_stream, "STATE_EVERY", 2)
    labels = ["7", "5", "7", "x", "5", "5", "y", "7", "5", "x", "7", "5"]
    shards = write_shards(tmp_path / "shards", labels, per_shard=5)
    files = [(f"{number}.cls", b"0") for number in range(3)]
    write_tar(tmp_path / "shards/set-bad.tar", files)
    source = TarShards(
        [*map(str, shards[:1]), str(tmp_path / "shards/set-bad.tar"), *map(str, shards[1:])]
    )
    convert(source, tmp_path / "whole", skip_bad=True)
    plain = image_encoder(95, False)

    class Killed(Exception):
        pass

    def killed_at(calls):
        left = iter(range(calls - 1))

        def encode(content, name):
            if next(left, None) is None:
                raise Killed
            return plain(content, name)

        return encode

    options = dict(quality=95, resize=False)
    for stop in range(1, len(labels) + 1):
        output = tmp_path / f"out{stop}"
        # again and again; where little is left, it may end before
        for calls in (stop, 4, 2):
            with suppress(Killed):
                write_stream(source, output, killed_at(calls), options, True)
        assert convert(source, output, skip_bad=True) == (12, 4, 3, True)
        assert contents(output) == contents(tmp_path / "whole")
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.processes
def test_killed_it_goes_on_to_the_same_bytes(tmp_path):
    # photographs that take a while, so that there is a middle to be killed in
    noise = np.random.default_rng(0).integers(0, 256, (8, 900, 900, 3), np.uint8)
    images = [cv2.imencode(".png", image)[1].tobytes() for image in noise]
    for shard in range(8):
        files = []
        for number in range(8):
            files += [
                (f"{number}.png", images[number]),
                (f"{number}.cls", b"%d" % (number + shard)),
            ]
        write_tar(tmp_path / f"s{shard}.tar", files)
    common = ["--webdataset", str(tmp_path / "s{0..7}.tar"), "--resize", "--output"]
    process = subprocess.Popen([*COMMAND, *common, str(tmp_path / "out")])
    state = tmp_path / ".out.make_rec" / "state.json"
    while process.poll() is None and not (
        state.is_file() and json.loads(state.read_text())["part"] > 1
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "out").exists()
    done = json.loads(state.read_text())["images"]
    result = subprocess.run(
        [*COMMAND, *common, str(tmp_path / "out")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"going on behind {done} images\n") and 0 < done < 64
    assert result.stdout.endswith("64 images of 15 identities, read back and equal\n")
    subprocess.run([*COMMAND, *common, str(tmp_path / "whole")], check=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not state.parent.exists()


def test_other_options_and_other_files_start_anew(tmp_path, capsys):
    shards = write_shards(tmp_path / "shards", ["0", "1", "0", "1"], per_shard=2)
    whole = shards[1].read_bytes()
    shards[1].write_bytes(b"no archive")
    with pytest.raises(InputError, match="set-001.tar is damaged, cut off or no tar archive"):
        convert(TarShards([str(tmp_path / "shards")]), tmp_path / "out")
    assert "the same command goes on" in capsys.readouterr().out
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.make_rec").is_dir()
    shards[1].write_bytes(whole)
    assert convert(TarShards([str(tmp_path / "shards")]), tmp_path / "out").images == 4
    assert "of other files or options: starting anew" in capsys.readouterr().out
    assert not (tmp_path / ".out.make_rec").exists()


def test_archives_that_are_cut_off_or_damaged(tmp_path):
    files = [
        (f"{key}.{suffix}", bytes([key]) * 600) for key in range(1, 4) for suffix in ("jpg", "cls")
    ]
    whole = write_tar(tmp_path / "s.tar", files).read_bytes()
    source = TarShards([str(tmp_path / "s.tar")])
    assert len(list(source.samples(0))) == 3
    end = 6 * (512 + 1024)
    damaged = [whole[:length] for length in [*range(0, end, 512), 100, end - 700, end, end + 511]]
    damaged += [
        whole[:1536] + b"junk" * 128 + whole[2048:],
        whole + whole,
        b"<!doctype html>" * 100,
    ]
    for content in damaged:
        (tmp_path / "s.tar").write_bytes(content)
        with pytest.raises(InputError, match="s.tar is damaged, cut off or no tar archive"):
            list(source.samples(0))
    whole = write_tar(tmp_path / "s.tar", files, "w:gz").read_bytes()
    for length in (1, 2, 20, len(whole) // 2, len(whole) - 1):
        (tmp_path / "s.tar").write_bytes(whole[:length])
        with pytest.raises(InputError, match="s.tar is damaged, cut off or no tar archive"):
            list(source.samples(0))


@pytest.mark.parametrize(
    "files, message",
    [
        ({"a.cls": b"1", "a.seg": b""}, "s.tar/a has no image: its files are cls, seg; one of jpg"),
        ({"a.jpg": b"", "a.png": b""}, r"has several images \(jpg, png\)"),
        ({"a.b.jpg": b"", "a.cls": b"1"}, "has no image: .*ends at the first dot"),
        ({"a.jpg": b"", "a.npy": b""}, "has no label: none of cls, json, txt beside jpg, npy"),
        ({"a.jpg": b"", "a.cls": b" \n"}, "its label, '', is no whole number and no word"),
        ({"a.jpg": b"", "a.txt": b"one\ntwo"}, r"its label, 'one\\ntwo', is no"),
        ({"a.jpg": b"", "a.json": b'{"name": 1}'}, "a.json has no 'label'; it holds name"),
        ({"a.jpg": b"", "a.json": b"[1]"}, "a.json holds no object with a 'label'"),
        ({"a.jpg": b"", "a.json": b"{"}, "a.json is no JSON"),
        ({"a.jpg": b"", "a.json": b'{"label": true}'}, "is no whole number and no word"),
        ({"a.jpg": b"", "a.json": b'{"label": 1.5}'}, "its label, 1.5, is no whole number"),
        ({"a.jpg": b"", "a.json": b'{"label": [1]}'}, r"its label, \[1\], is no whole number"),
    ],
)
def test_samples_that_lack_something(tmp_path, files, message):
    write_tar(tmp_path / "s.tar", files.items())
    source = TarShards([str(tmp_path / "s.tar")])
    with pytest.raises(BadImage, match=message):
        source.read(next(source.samples(0))[0])


def test_bad_samples_are_refused_or_left_out(tmp_path, capsys):
    good = [("1.jpg", jpeg(1)), ("1.cls", b"0"), ("2.jpg", jpeg(2)), ("2.cls", b"1")]
    bad = [
        ("3.jpg", jpeg(3)[:-2]),
        ("3.cls", b"1"),
        ("4.jpg", b"x"),
        ("4.cls", b"9"),
        ("5.cls", b"1"),
    ]
    write_tar(tmp_path / "s.tar", [*good, *bad])
    source = TarShards([str(tmp_path / "s.tar")])
    with pytest.raises(
        InputError, match="s.tar/3: the JPEG ends early .*--skip-bad leaves such out"
    ):
        convert(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["s.tar"]
    # the label of an image that is left out is no class
    assert convert(source, tmp_path / "out", skip_bad=True) == (2, 2, 3, False)
    listed = [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()]
    assert [line.split("/")[1][0] for line in listed if "/" in line] == ["3", "4", "5"]
    write_tar(tmp_path / "s.tar", [*good, ("3.jpg", jpeg(3, (100, 120))), ("3.cls", b"1")])
    with pytest.raises(InputError, match="s.tar/3 is 100x120, not 112x112; .*--resize"):
        convert(TarShards([str(tmp_path / "s.tar")]), tmp_path / "new")
    assert convert(TarShards([str(tmp_path / "s.tar")]), tmp_path / "new", resize=True).images == 3
    write_tar(tmp_path / "s.tar", [*good[:2], ("1.jpg", b"")])
    with pytest.raises(InputError, match="1.jpg is there twice"):
        convert(TarShards([str(tmp_path / "s.tar")]), tmp_path / "twice")
    write_tar(tmp_path / "s.tar", good[:2])
    with pytest.raises(InputError, match="1 images with 1 labels: training needs two"):
        convert(TarShards([str(tmp_path / "s.tar")]), tmp_path / "one")


def test_killed_while_files_are_moved(tmp_path, monkeypatch):
    """After each of them, and before the rest is removed: the next start moves the others."""
    write_shards(tmp_path / "shards", ["5", "3", "5"])
    source = TarShards([str(tmp_path / "shards")])
    convert(source, tmp_path / "whole")
    names = sorted(os.listdir(tmp_path / "whole"))

    class Killed(Exception):
        pass

    install, replace = record_stream.install, os.replace
    for moved in range(5):
        left = iter(range(moved))

        def replace_some(source, target, left=left):
            if next(left, None) is None:
                raise Killed
            replace(source, target)

        def install_some(temporary, output):
            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", replace_some)
                install(temporary, output)
            raise Killed

        output = tmp_path / f"out{moved}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(record_stream, "install", install_some)
            convert(source, output)
        assert convert(source, output) == (3, 2, 0, True)
        assert sorted(os.listdir(output)) == names
        assert contents(output) == contents(tmp_path / "whole")
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_work_is_done_on_the_disk_of_the_set(tmp_path, monkeypatch):
    """Where a link leads; in the folder where that is a disk of its own."""
    write_shards(tmp_path / "shards", ["0", "1"])
    source = TarShards([str(tmp_path / "shards")])
    (tmp_path / "disk" / "set").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "set")
    places = []
    install = record_stream.install

    def look(temporary, output):
        places.append(temporary)
        install(temporary, output)

    monkeypatch.setattr(record_stream, "install", look)
    convert(source, tmp_path / "link")
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: Path(path).name == "set")
        convert(source, tmp_path / "link")
    expected = ["disk/.set.make_rec", "disk/set/.set.make_rec"]
    assert places == [str(tmp_path / place) for place in expected]
    assert sorted(os.listdir(tmp_path / "disk" / "set")) == sorted(FILES)


def test_shards_that_are_not_there(tmp_path):
    shards = write_shards(tmp_path / "shards", ["0"] * 4, per_shard=1)
    with pytest.raises(InputError, match="8 of 12 shards are missing, first .*set-004.tar"):
        TarShards([str(tmp_path / "shards/set-{000..011}.tar")])
    # what macOS writes beside a file
    (tmp_path / "shards/._set-000.tar").write_bytes(b"\0\5\26\7")
    assert TarShards([str(tmp_path / "shards")]).parts == shards
    with pytest.raises(InputError, match="names .*set-003.tar twice"):
        TarShards([str(tmp_path / "shards"), str(shards[3])])
    with pytest.raises(InputError, match="no .tar, .tar.gz, .tgz in the folder"):
        TarShards([str(tmp_path)])
    for number in (10, 9):
        shards[0].rename(shards[0].with_name(f"set-{number}.tar"))
        shards[0] = shards[0].with_name(f"set-{number}.tar")
    names = [path.name for path in TarShards([str(tmp_path / "shards")]).parts]
    assert names == ["set-001.tar", "set-002.tar", "set-003.tar", "set-9.tar"]


def test_two_at_once_and_a_damaged_disk(tmp_path, monkeypatch):
    write_shards(tmp_path / "shards", ["0", "1", "0"])
    source = TarShards([str(tmp_path / "shards")])
    (tmp_path / ".out.make_rec").mkdir()
    with record_stream.take_lock(tmp_path / ".out.make_rec/lock"):
        with pytest.raises(InputError, match="another process is writing it"):
            convert(source, tmp_path / "out")

    def damage(self, entries, classes):
        with open(self.folder / "train.rec", "r+b") as file:
            file.seek(int(entries["offset"][1]) + 200)
            file.write(b"damage")

    with monkeypatch.context() as patch:
        patch.setattr(record_stream.Stream, "correct_labels", damage)
        with pytest.raises(InputError, match="record 1 differs from what was written"):
            convert(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["shards"]
    assert convert(source, tmp_path / "out").images == 3


# --- Arrow folders
# --------------------------------------------------


def save_rows(folder, labels, kind, split=None):
    rows = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": jpeg(number), "path": None} for number in range(len(labels))],
            "label": labels,
            "further": labels,
        },
        features=datasets.Features({"image": datasets.Image(), "label": kind, "further": kind}),
    )
    (datasets.DatasetDict({split: rows}) if split else rows).save_to_disk(str(folder))
    return folder


def test_arrow_rows_become_the_set_that_shards_become(tmp_path, monkeypatch):
    monkeypatch.setattr("data.arrow_rows.ROWS_AT_A_TIME", 2)
    write_shards(tmp_path / "shards", ["4", "0", "4", "9", "0"])
    convert(TarShards([str(tmp_path / "shards")]), tmp_path / "tar")
    kinds = {
        "numbers": datasets.Value("int64"),
        "classes": datasets.ClassLabel(num_classes=10),
    }
    for name, kind in kinds.items():
        folder = save_rows(tmp_path / name, [4, 0, 4, 9, 0], kind)
        assert convert(ArrowRows(folder), tmp_path / "out") == (5, 3, 0, True)
        for file in ("train.rec", "train.idx", "property", "label_map.csv"):
            assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "tar" / file).read_bytes()
    save_rows(tmp_path / "dict", ["b", "a", "b"], datasets.Value("string"), "train")
    assert convert(ArrowRows(tmp_path / "dict"), tmp_path / "words").classes == 2
    images = MXFaceDataset(tmp_path / "words")
    assert [images[index][1] for index in range(3)] == [1, 0, 1]


def test_arrow_folders_that_are_no_training_set(tmp_path):
    with pytest.raises(InputError, match="is no folder of datasets' save_to_disk"):
        ArrowRows(tmp_path)
    save_rows(tmp_path / "test", [0, 1], datasets.Value("int64"), "test")
    with pytest.raises(InputError, match="holds several splits"):
        ArrowRows(tmp_path / "test")
    save_rows(tmp_path / "floats", [0.0, 1.0], datasets.Value("float32"))
    with pytest.raises(InputError, match=r"is no training set: .*label \(float\)"):
        ArrowRows(tmp_path / "floats")


def test_rows_that_lack_something(tmp_path, capsys):
    """No label, datasets' label of a class that is not known, no image."""
    for kind, nothing in ((datasets.Value("int64"), None), (datasets.ClassLabel(2), -1)):
        folder = save_rows(tmp_path / str(nothing), [0, nothing, 1], kind)
        with pytest.raises(InputError, match="row 1 has no label; --skip-bad leaves such out"):
            convert(ArrowRows(folder), tmp_path / "out")
        assert convert(ArrowRows(folder), tmp_path / "out", skip_bad=True) == (2, 2, 1, False)
        assert "row 1 has no label" in capsys.readouterr().err
    images = [{"bytes": jpeg(0), "path": None}, None, {"bytes": jpeg(2), "path": None}]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 0, 1]}, features=features)
    rows.save_to_disk(str(tmp_path / "images"))
    with pytest.raises(InputError, match="row 1 has no image"):
        convert(ArrowRows(tmp_path / "images"), tmp_path / "out")


def test_strings_stay_as_they_are(tmp_path):
    """A number is one where it is written as one: no two strings become one label."""
    folder = save_rows(tmp_path / "rows", ["0012", "12", "7", "007"], datasets.Value("string"))
    convert(ArrowRows(folder), tmp_path / "out")
    rows = (tmp_path / "out/label_map.csv").read_text().splitlines()
    assert rows == ["class,label", "0,0012", "1,007", "2,12", "3,7"]
    folder = save_rows(tmp_path / "plain", ["10", "9", "0"], datasets.Value("string"))
    convert(ArrowRows(folder), tmp_path / "out")
    rows = (tmp_path / "out/label_map.csv").read_text().splitlines()
    assert rows == ["class,label", "0,0", "1,9", "2,10"]


@pytest.mark.parametrize(
    "further, message",
    [
        (["--shuffle"], "are read once and keep their order"),
        (["--layout", "insightface"], "are read once and keep their order"),
        (["--pairs", "x"], "--pairs needs --images"),
    ],
)
def test_arguments_that_do_not_go_together(monkeypatch, further, message):
    monkeypatch.setattr(
        sys, "argv", ["make_rec.py", "--webdataset", "x", "--output", "y", *further]
    )
    with pytest.raises(InputError, match=message):
        make_rec.parse_arguments()
