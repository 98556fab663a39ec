"""IJB sets in both layouts: what is read, that both give the same, and every way in which a folder
can be wrong.
"""

import os
import pickle
import shutil
import sys
import warnings
from datetime import datetime
from pathlib import Path

import cv2
import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader

from eval.sets.ijb import find_ijb, load_ijb
from eval.sets.ijb_meta import read_pairs
from tests.saved_sets import encode, save_images, save_metadata, smooth
from utils.align import TEMPLATE, align
from utils.dataset.workers import start_worker
from utils.errors import InputError

COUNT = 9
TEMPLATES = np.array([7, 7, 3, 3, 3, 12, 12, 5, 40])
MEDIAS = np.array([1, 1, 2, 3, 3, 4, 5, 6, 7])
PAIRS = np.array([[7, 3, 1], [7, 12, 0], [3, 5, 0], [40, 12, 1], [7, 40, 0]])
SCORES = np.linspace(0.31, 0.99, COUNT).round(4)
# not in alphabetical order
NAMES = [f"{number}.jpg" for number in (10, 2, 33, 4, 5, 61, 7, 8, 9)]
LISTS = {
    "1N_gallery_G1": [(7, 100), (7, 100), (5, 101)],
    "1N_gallery_G2": [(3, 102)],
    "1N_probe_mixed": [(12, 100), (12, 100), (40, 102)],
}
HEADER = "TEMPLATE_ID,SUBJECT_ID,FILENAME,FACE_X"


def landmarks() -> np.ndarray:
    rng = np.random.default_rng(1)
    return (
        TEMPLATE * rng.uniform(0.8, 1.4, (COUNT, 1, 1))
        + rng.uniform(0, 20, (COUNT, 1, 2))
        + rng.normal(0, 1, (COUNT, 5, 2))
    ).round(3)


def table(rows, names=None) -> str:
    """Text as the meta files hold it."""
    rows = [" ".join(f"{value:g}" for value in row) for row in rows]
    return (
        "\n".join(
            rows
            if names is None
            else [f"{name} {row}" for name, row in zip(names, rows, strict=True)]
        )
        + "\n"
    )


def lists_in(folder: Path, prefix: str, lists=LISTS) -> None:
    for name, rows in lists.items():
        lines = [HEADER] + [
            f'{template},{subject},"img/{i}, left.jpg",{i}'
            for i, (template, subject) in enumerate(rows)
        ]
        (folder / f"{prefix}_{name}.csv").write_text("\r\n".join(lines) + "\r\n")


def write_insightface(root: Path, target="IJBX", prefix="ijbx", lists=True) -> Path:
    folder = root / target
    (folder / "loose_crop").mkdir(parents=True)
    meta = folder / "meta"
    meta.mkdir()
    for name, image in zip(NAMES, smooth(COUNT, (150, 140)), strict=False):
        (folder / "loose_crop" / name).write_bytes(encode(image, ".jpg"))
    (folder / "loose_crop" / "not_listed.jpg").write_bytes(b"no image, and never read")
    (meta / f"{prefix}_face_tid_mid.txt").write_text(table(np.stack([TEMPLATES, MEDIAS], 1), NAMES))
    (meta / f"{prefix}_name_5pts_score.txt").write_text(
        table(np.column_stack([landmarks().reshape(COUNT, 10), SCORES]), NAMES)
    )
    (meta / f"{prefix}_name_5pts_score_retina.txt").write_text(
        "another detector's points, which are not read"
    )
    (meta / f"{prefix}_template_pair_label.txt").write_text(table(PAIRS))
    if lists:
        lists_in(meta, prefix)
    return folder


def metadata() -> dict:
    return {
        "faceness_scores": SCORES,
        "templates": TEMPLATES,
        "medias": MEDIAS,
        "label": PAIRS[:, 2],
        "p1": PAIRS[:, 0],
        "p2": PAIRS[:, 1],
    }


def write_cvlface(root: Path, pixels, target="IJBX_gt_aligned", content=None, **options) -> Path:
    folder = save_images(
        root / target, [encode(image) for image in pixels], index=[4, 0, 8, 1, 7, 2, 6, 3, 5]
    )
    save_metadata(folder, metadata() if content is None else content, **options)
    return folder


@pytest.fixture
def crops(tmp_path):
    return write_insightface(tmp_path)


@pytest.fixture
def saved(tmp_path):
    return write_cvlface(tmp_path, smooth(COUNT))


def load(folder: Path):
    return load_ijb(folder.parent, folder.name)


def refused(folder: Path, message: str) -> str:
    with pytest.raises(InputError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value) and str(folder.parent) in str(error.value)
    return str(error.value)


def snapshot(folder: Path) -> dict:
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))
    }


# --- what is read


def assert_is_the_set(ijb) -> None:
    assert ijb.name.startswith("IJBX") and len(ijb.images) == COUNT and len(ijb.fingerprint) == 64
    for name, expected in {
        "templates": TEMPLATES,
        "medias": MEDIAS,
        "label": PAIRS[:, 2],
        "p1": PAIRS[:, 0],
        "p2": PAIRS[:, 1],
    }.items():
        np.testing.assert_array_equal(getattr(ijb, name), expected)
        assert getattr(ijb, name).dtype == np.int64 and getattr(ijb, name).flags.writeable
    np.testing.assert_array_equal(ijb.faceness_scores, SCORES.astype(np.float32))
    assert ijb.faceness_scores.dtype == np.float32


def assert_has_lists(ijb) -> None:
    assert list(ijb.galleries) == ["G1", "G2"]
    for actual, name in (
        (ijb.galleries["G1"], "1N_gallery_G1"),
        (ijb.galleries["G2"], "1N_gallery_G2"),
        (ijb.probes, "1N_probe_mixed"),
    ):
        np.testing.assert_array_equal(np.stack(actual, 1), LISTS[name])


def test_both_layouts_of_one_set_give_the_same(tmp_path, crops):
    before = snapshot(crops)
    ijb = load_ijb(tmp_path, "IJBX")
    assert_is_the_set(ijb)
    assert_has_lists(ijb)
    points = landmarks().astype(np.float32)
    pixels = [ijb.images[i] for i in range(COUNT)]
    for i, actual in enumerate(pixels):
        photograph = cv2.cvtColor(
            cv2.imread(str(crops / "loose_crop" / NAMES[i])), cv2.COLOR_BGR2RGB
        )
        np.testing.assert_array_equal(actual, align(photograph, points[i]))
        assert ijb.images.name_of(i) == str(crops / "loose_crop" / NAMES[i])

    folder = write_cvlface(tmp_path, pixels)
    lists_in(folder, "any")
    before |= snapshot(folder)
    other = load_ijb(tmp_path, "IJBX_gt_aligned")
    assert_is_the_set(other)
    assert_has_lists(other)
    for i, expected in enumerate(pixels):
        np.testing.assert_array_equal(other.images[i], expected)
        assert str(folder) in other.images.name_of(i) and f"image {i}" in other.images.name_of(i)
    assert snapshot(crops) | snapshot(folder) == before  # nothing is written beside a set


def test_meta_files_as_windows_saves_them(crops):
    """With a byte order mark and its line ends; the names of images need not be UTF-8."""
    odd = os.fsdecode(b"Ren\xe9.jpg")
    try:
        os.rename(crops / "loose_crop" / NAMES[4], crops / "loose_crop" / odd)
    except OSError:
        pytest.skip("this file system's names are UTF-8")
    for path in (*(crops / "meta").glob("*.txt"), *(crops / "meta").glob("*.csv")):
        text = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        text = text.replace(NAMES[4].encode() + b" ", os.fsencode(odd) + b" ")
        path.write_bytes(b"\xef\xbb\xbf" + text)
    ijb = load(crops)
    assert_is_the_set(ijb)
    assert_has_lists(ijb)
    assert ijb.images.name_of(4) == str(crops / "loose_crop" / odd) and ijb.images[4].shape == (
        112,
        112,
        3,
    )


def test_lists_are_optional_and_in_cvlface_sets_also_in_meta(tmp_path, saved):
    assert load(saved).galleries == {} and load(saved).probes is None
    (saved / "meta").mkdir()
    lists_in(saved / "meta", "ijbx")
    assert_has_lists(load(saved))
    plain = load(write_insightface(tmp_path, lists=False))
    assert plain.galleries == {} and plain.probes is None


def test_names_of_other_galleries(crops):
    for gallery in "12":
        os.rename(
            crops / f"meta/ijbx_1N_gallery_G{gallery}.csv",
            crops / f"meta/ijbx_1N_gallery_S{gallery}.csv",
        )
    assert list(load(crops).galleries) == ["S1", "S2"]


def test_points_in_another_order_are_found_by_name(crops):
    expected = load(crops)
    path = crops / "meta/ijbx_name_5pts_score.txt"
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    actual = load(crops)
    np.testing.assert_array_equal(actual.faceness_scores, expected.faceness_scores)
    np.testing.assert_array_equal(actual.images[3], expected.images[3])
    assert actual.fingerprint != expected.fingerprint


def test_an_image_may_be_in_two_templates(crops):
    for name in ("face_tid_mid", "name_5pts_score"):
        path = crops / f"meta/ijbx_{name}.txt"
        path.write_text(path.read_text().replace("2.jpg", "10.jpg"))
    np.testing.assert_array_equal(load(crops).templates, TEMPLATES)


def test_windows_line_ends_tabs_and_a_missing_last_line_end(crops):
    for path in crops.glob("meta/*.txt"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n").replace(b" ", b"\t").rstrip())
    assert_is_the_set(load(crops))


def test_one_prefix_or_that_of_the_target(crops):
    for path in list(crops.glob("meta/ijbx_*")):
        shutil.copy(path, str(path).replace("ijbx", "ijby"))
    assert_is_the_set(load(crops))
    shutil.move(crops, crops.parent / "IJBX_gt_aligned")
    assert_is_the_set(load(crops.parent / "IJBX_gt_aligned"))
    shutil.move(crops.parent / "IJBX_gt_aligned", crops.parent / "IJBZ")
    refused(crops.parent / "IJBZ", "several sets .ijbx, ijby., none of them of ijbz")


def test_finding_the_folder(tmp_path):
    (tmp_path / "IJBB_gt_aligned").mkdir()
    (tmp_path / "file").touch()
    assert (
        find_ijb(tmp_path, "IJBB")
        == find_ijb(str(tmp_path), "IJBB_gt_aligned")
        == tmp_path / "IJBB_gt_aligned"
    )
    (tmp_path / "IJBB").mkdir()
    assert find_ijb(tmp_path, "IJBB") == tmp_path / "IJBB"
    with pytest.raises(
        InputError,
        match="IJBC: no folder IJBC or IJBC_gt_aligned in .*folders there: IJBB, IJBB_gt_aligned",
    ):
        find_ijb(tmp_path, "IJBC")
    with pytest.raises(InputError, match="nowhere, which is no folder"):
        load_ijb(tmp_path / "nowhere", "IJBC")


@pytest.mark.parametrize("layout", ["crops", "saved"])
def test_images_in_worker_processes(layout, request):
    images = load(request.getfixturevalue(layout)).images
    expected = np.stack([images[i] for i in range(COUNT)])
    copy = pickle.loads(pickle.dumps(images))
    np.testing.assert_array_equal(np.stack([copy[i] for i in range(COUNT)]), expected)
    loader = DataLoader(
        images,
        batch_size=2,
        num_workers=2,
        worker_init_fn=start_worker,
        collate_fn=lambda batch: torch.from_numpy(np.stack(batch)),
    )
    np.testing.assert_array_equal(torch.cat(list(loader)).numpy(), expected)
    with pytest.raises(IndexError):
        images[COUNT]


def test_fingerprint_follows_images_and_meta_files(crops, saved):
    first = load(crops).fingerprint, load(saved).fingerprint
    # picks from the same features
    lists_in(crops / "meta", "ijbx", {"1N_gallery_G3": [(7, 100)]})
    assert (load(crops).fingerprint, load(saved).fingerprint) == first
    (crops / "loose_crop" / NAMES[4]).write_bytes(encode(smooth(1)[0]))
    content = metadata()
    content["medias"] = content["medias"] + 1
    save_metadata(saved, content)
    second = load(crops).fingerprint, load(saved).fingerprint
    assert len({*first, *second}) == 4


def test_a_set_of_a_published_name_and_other_sizes_is_told(tmp_path, caplog):
    load(write_insightface(tmp_path, "IJBC", "ijbc"))
    assert (
        "IJBC has 9 images, 5 pairs, the published set 469,375 images, 15,658,489 pairs"
        in caplog.text
    )
    caplog.clear()
    load(write_insightface(tmp_path, "IJBX"))
    assert not caplog.text


# --- pairs


def test_many_pairs_across_blocks(tmp_path, monkeypatch):
    rows = np.random.default_rng(0).integers(
        0, 10 ** np.random.default_rng(1).integers(1, 19, (20_000, 3))
    )
    (tmp_path / "pairs").write_text(
        table([]) + "\n".join(" ".join(map(str, row)) for row in rows.tolist()) + "\n\n \n"
    )
    expected = [[int(value) for value in column] for column in rows.T]
    for block in (1 << 20, 4099, 100):
        monkeypatch.setattr("eval.sets.ijb_meta.BLOCK", block)
        actual = read_pairs(tmp_path / "pairs")
        assert [column.tolist() for column in actual] == expected and all(
            column.dtype == np.int64 for column in actual
        )


@pytest.mark.parametrize(
    "text, message",
    [
        ("1 2 1\n3 4", "line 2 is '3 4'"),  # cut off in the last line
        # the numbers are as many as there should be
        ("1 2 1\n3 4 1 5\n6 7\n", "line 2 is '3 4 1 5'"),
        ("1 2 1\n\n3 4 x\n", "line 3 is '3 4 x'"),
        ("1 2 -1\n", "line 1 is '1 2 -1'"),
        ("1 2.5 1\n", "line 1"),
        ("1,2,1\n", "line 1 is '1,2,1'"),
        ("a b c d", "line 1"),
        ("1 2 1\n" * 1000 + "12 \0\0\0\n", "line 1001"),
        ("x" * 5000, "line 1 is 'xxxxx"),
        ("1 2 1\n" + "1 " * 5000, "line 2 is '1 1 1"),
    ],
)
@pytest.mark.parametrize("block", [1 << 20, 64])
def test_lines_that_are_no_pairs(tmp_path, monkeypatch, text, message, block):
    monkeypatch.setattr("eval.sets.ijb_meta.BLOCK", block)
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(
        InputError,
        match="no text file: a line of it"
        if block < 1000 < len(text.splitlines()[-1])
        else message,
    ) as error:
        read_pairs(tmp_path / "pairs.txt")
    assert "pairs.txt" in str(error.value) and len(str(error.value)) < 400


# --- a wrong InsightFace folder


def edit(folder: Path, name: str, change) -> None:
    """Replace a meta file by what ``change`` makes of its lines; None: remove it."""
    path = folder / "meta" / f"ijbx_{name}"
    lines = change(path.read_text().splitlines()) if change else None
    path.unlink() if lines is None else path.write_text("\n".join(lines) + "\n")


def replaced(index: int, old: str, new: str):
    return lambda lines: lines[:index] + [lines[index].replace(old, new, 1)] + lines[index + 1 :]


def zero_scores(*indices: int):
    return lambda lines: [
        line.rpartition(" ")[0] + " 0" if index in indices else line
        for index, line in enumerate(lines)
    ]


FACES, POINTS, PAIRFILE = "face_tid_mid.txt", "name_5pts_score.txt", "template_pair_label.txt"
GALLERY, PROBES = "1N_gallery_G1.csv", "1N_probe_mixed.csv"


@pytest.mark.parametrize(
    "name, change, message",
    [
        (FACES, None, r"meta: no \*_face_tid_mid\.txt; files there: ijbx_1N_gallery_G1\.csv"),
        (
            POINTS,
            None,
            "meta: no ijbx_name_5pts_score.txt; files there: .*ijbx_name_5pts_score_retina.txt",
        ),
        (PAIRFILE, None, "meta: no ijbx_template_pair_label.txt"),
        (FACES, lambda lines: [], "face_tid_mid.txt: line 1 is ''"),
        (POINTS, lambda lines: [], "5pts_score.txt: line 1 is ''"),
        (PAIRFILE, lambda lines: [], "0 label, 0 p1, 0 p2"),
        (FACES, lambda lines: lines[:-1], "names 1 image, 9.jpg, that .*face_tid_mid.txt does not"),
        (
            POINTS,
            lambda lines: lines[:-2],
            r"face_tid_mid.txt \(9 images\) names 2 images, the first "
            r"8.jpg, that .*5pts_score.txt does not",
        ),
        (POINTS, replaced(3, "4.jpg", "44.jpg"), "names 1 image, 4.jpg, that"),
        (POINTS, lambda lines: lines[::-1] + lines[:1], "twice"),
        (
            FACES,
            replaced(8, " 40 ", " "),
            "line 9 is '9.jpg 7'; expected are a name, template, media",
        ),
        (FACES, replaced(2, " 3 ", " x "), "line 3 is '33.jpg x 2'"),
        (FACES, replaced(2, " 3 ", f" {10**20} "), "line 3"),
        (
            POINTS,
            lambda lines: lines[:-1] + [lines[-1][:30]],
            "line 9 is '9.jpg .*expected are a name, x, y, .*score",
        ),
        (POINTS, replaced(1, " 0.395", " nan"), r"detector score that is not finite"),
        (
            POINTS,
            lambda lines: [lines[0].replace(lines[0].split()[2], "nan")] + lines[1:],
            "1 image, 10.jpg, with points that are not finite",
        ),
        (
            POINTS,
            lambda lines: lines[:4] + ["5.jpg" + " 3" * 10 + " 0.5"] + lines[5:],
            "1 image, 5.jpg, with all five points in one place",
        ),
        (
            PAIRFILE,
            replaced(1, "7 12 0", "7 13 0"),
            r"there is no image of 1 template, 13, in the "
            r"pairs \(row 2 of 5\)",
        ),
        (
            PAIRFILE,
            lambda lines: ["99 7 0", "7 98 0", "99 3 0"] + lines,
            "there is no image of 1 template, 99, in the pairs",
        ),
        (PAIRFILE, replaced(2, "5 0", "5 2"), "pair 3 of 5 has the label 2"),
        (PAIRFILE, lambda lines: [line[:-1] + "0" for line in lines], "no genuine pair among 5"),
        (PAIRFILE, lambda lines: [line[:-1] + "1" for line in lines], "no impostor pair among 5"),
        (PAIRFILE, lambda lines: lines[:-1] + ["7 4"], "line 5 is '7 4'"),
        (
            GALLERY,
            replaced(1, "7,", "77,"),
            r"no image of 1 template, 77, in the 1:N gallery G1 \(row "
            r"1 of 3\)",
        ),
        (PROBES, replaced(3, "40,", "41,"), "no image of 1 template, 41, in the 1:N probes"),
        (
            PROBES,
            replaced(2, "12,100", "12,101"),
            "the list of the 1:N probes gives template 12 two subjects, 100 and 101",
        ),
        (
            GALLERY,
            replaced(3, "5,101", "5,102"),
            "1:N gallery G1: every probe's subject is in the "
            "gallery: of 2 probe templates some must be mated",
        ),
        (
            PROBES,
            lambda lines: [line.replace(",100", ",105") for line in lines],
            "1:N gallery G1: no probe's subject is in the gallery",
        ),
        (
            POINTS,
            zero_scores(0, 1),
            "the detector score of all images is 0 for 1 template, 7, in the "
            "pairs: features weighted by it have no direction",
        ),
        (POINTS, zero_scores(*range(9)), "for 3 templates, the first 3, in the pairs"),
        (GALLERY, lambda lines: lines[:1], "G1.csv: no line follows the header"),
        (GALLERY, lambda lines: [], "G1.csv: the first line is ''"),
        (GALLERY, lambda lines: lines[1:], "G1.csv: the first line is '7, 100, .*no header"),
        (
            GALLERY,
            lambda lines: ["SUBJECT_ID,TEMPLATE_ID"] + lines[1:],
            "no header of the columns template, subject",
        ),
        (
            GALLERY,
            lambda lines: lines[:2] + ["7;100"],
            "G1.csv: line 3 does not begin with two whole numbers",
        ),
        (GALLERY, lambda lines: lines[:2] + ["7"], "line 3"),
        (GALLERY, lambda lines: lines[:2] + ["7,", "3,5"], "line 3"),
        (
            PROBES,
            None,
            "1:N takes one list of probes .* there are ijbx_1N_gallery_G1.csv, "
            "ijbx_1N_gallery_G2.csv",
        ),
    ],
)
def test_meta_files_that_do_not_fit(crops, name, change, message):
    edit(crops, name, change)
    refused(crops, message)


def test_probes_without_galleries(crops):
    for gallery in "12":
        edit(crops, f"1N_gallery_G{gallery}.csv", None)
    refused(crops, "1:N takes one list")


def test_missing_and_unreadable_images(crops):
    path = crops / "loose_crop" / NAMES[0]
    content = path.read_bytes()
    path.write_bytes(content[:300])
    refused(crops, "loose_crop/10.jpg: 300 bytes that are no image")
    path.write_bytes(b"")
    refused(crops, "1 empty file, 10.jpg: copy again")
    path.unlink()
    (crops / "loose_crop" / NAMES[5]).unlink()
    refused(crops, "lacks 2 images, the first 10.jpg, of 9 in the meta files")
    path.write_bytes(content)
    (crops / "loose_crop" / NAMES[5]).write_bytes(b"text")
    ijb = load(crops)  # one image is read as a sample, not all
    with pytest.raises(InputError, match="loose_crop/61.jpg: 4 bytes that are no image"):
        ijb.images[5]
    (crops / "loose_crop" / NAMES[5]).unlink()
    with pytest.raises(InputError, match="loose_crop/61.jpg: No such file"):
        ijb.images[5]


def test_folders_of_neither_layout_or_both(tmp_path, crops, saved):
    (tmp_path / "empty").mkdir()
    refused(
        tmp_path / "empty",
        "neither InsightFace's layout .folders loose_crop and meta.* nor CVLFace's .state.json",
    )
    shutil.copy(saved / "state.json", crops)
    refused(crops, "both InsightFace's layout")
    (crops / "state.json").unlink()
    shutil.move(crops / "meta", tmp_path)
    refused(crops, "no folder meta")
    shutil.move(tmp_path / "meta", crops)
    shutil.rmtree(crops / "loose_crop")
    refused(crops, "no folder loose_crop")


# --- a wrong CVLFace folder


@pytest.mark.parametrize("core", ["core", "_core"])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "kind",
    ["arrays", "small arrays", "tensors", "lists", "numpy scalars", "objects", "columns", "floats"],
)
def test_metadata_of_every_kind(saved, core, legacy, kind):
    convert = {
        "arrays": np.array,
        "tensors": torch.tensor,
        "lists": np.ndarray.tolist,
        "numpy scalars": list,
        "columns": lambda array: array[:, None],
        "floats": np.float64,
        "small arrays": lambda array: array.astype("f4" if array.dtype.kind == "f" else "u1"),
        "objects": lambda array: array.astype(object),
    }[kind]
    path = save_metadata(
        saved,
        {key: convert(array) for key, array in metadata().items()} | {"more": "text"},
        core,
        _use_new_zipfile_serialization=not legacy,
    )
    if kind in ("arrays", "numpy scalars"):
        # as that version of NumPy writes it
        assert f"numpy.{core}.multiarray".encode() in path.read_bytes()
    assert_is_the_set(load(saved))


@pytest.mark.parametrize(
    "more",
    [
        np.zeros(3, "M8[s]"),
        np.datetime64("2020-01-01"),
        [np.timedelta64(3, "s")],
        np.zeros(2, "i4,f4"),
        np.array([b"a"]),
        np.arange(3).astype(">i8"),
        np.zeros(2, complex),
        np.array(["a", None]),
        {1, 2},
        torch.float32,
    ],
)
def test_plain_entries_that_nobody_asked_for_do_no_harm(saved, more):
    save_metadata(saved, metadata() | {"more": more})
    assert_is_the_set(load(saved))


def test_a_copy_of_the_meta_files_does_not_make_another_layout(tmp_path, crops, saved):
    shutil.copytree(crops / "meta", saved / "meta")
    ijb = load(saved)
    assert_is_the_set(ijb)
    assert_has_lists(ijb)
    assert "image 0" in ijb.images.name_of(0)


def changed(**entries):
    return {key: value for key, value in (metadata() | entries).items() if value is not None}


@pytest.mark.parametrize(
    "content, message",
    [
        (
            changed(medias=None, p1=None),
            "lacks medias, p1; it holds faceness_scores, templates, label, p2",
        ),
        ([1, 2], "holds a list, not a dict"),
        (
            changed(templates=TEMPLATES[:-1]),
            "9 images, 9 faceness_scores, 8 templates, 9 medias: they must be equal",
        ),
        (changed(faceness_scores=np.append(SCORES, 1)), "10 faceness_scores"),
        (changed(label=PAIRS[:-1, 2]), "4 label, 5 p1, 5 p2"),
        (changed(label=[], p1=[], p2=[]), "0 label, 0 p1, 0 p2: they must be equal, and not 0"),
        (
            changed(faceness_scores=np.where(np.arange(COUNT) == 4, np.nan, SCORES)),
            "1 image, .*image 4, with a detector score that is not finite",
        ),
        (
            changed(templates=TEMPLATES + 0.5),
            "templates is float64 of shape .9,.; expected is a list of whole numbers",
        ),
        (
            changed(templates=torch.tensor(TEMPLATES) + 0.5),
            "templates is float64 of shape .9,.; expected",
        ),
        (changed(medias=np.where(MEDIAS == 3, np.nan, MEDIAS)), "medias is float64"),
        (changed(p1=[[1, 2], [3]]), "p1 is no list of numbers"),
        (changed(p1=np.ones((5, 2), int)), r"p1 is int64 of shape \(5, 2\)"),
        (changed(p1=["a"] * 5), "p1 is <U1"),
        (changed(p1="text"), "p1 is <U4"),
        (changed(p1=None, p2=None, label=None), "lacks label, p1, p2"),
        (
            changed(p1=PAIRS[:, 0] + 1000),
            "there is no image of 3 templates, the first 1007, in the pairs",
        ),
        (changed(label=PAIRS[:, 2] * 2), "label 2"),
        (changed(label=PAIRS[:, 2] * 0), "no genuine pair"),
        (
            changed(label=np.array([object()] * 5)),
            "was refused: it asks to load builtins.object|object, which is code",
        ),
        (
            changed(more=datetime.now()),
            "was refused: it asks to load datetime.datetime, which is code",
        ),
        (changed(p1=PAIRS[:, 0].astype(">i8")), "big-endian"),
        (
            changed(p1=np.zeros(5, "M8[s]")),
            "p1 is a numpy array of M8; numbers and strings are expected",
        ),
        (changed(p1=np.zeros(5, "i4,i4")), "p1 is a numpy array of V8"),
        (changed(p1=list(np.zeros(5, "M8[s]"))), "p1 is object"),
    ],
)
def test_metadata_that_does_not_fit(saved, content, message):
    save_metadata(saved, content)
    refused(saved, message)


class Calls:
    """Pickles as a call, which a plain unpickler would make."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "function, name",
    [
        (os.system, "(posix|nt).system"),
        (eval, "eval"),
        (np.fromfile, "numpy.*fromfile"),
        (open, "io.open"),
    ],
)
def test_metadata_that_would_run_code(saved, tmp_path, legacy, function, name):
    mark = tmp_path / "mark"
    argument = (
        f"open({str(mark)!r}, 'w')"
        if function is eval
        else f"touch {mark}"
        if function is os.system
        else str(mark)
    )
    call = Calls(function, argument, "w") if function is open else Calls(function, argument)
    for content in (
        call,
        changed(p1=call),
        changed(more=[call]),
        changed(label=np.array([call], object)),
    ):
        path = save_metadata(saved, content, _use_new_zipfile_serialization=not legacy)
        refused(saved, f"metadata.pt was refused: it asks to load {name}")
        assert not mark.exists()
    if function is os.system:  # the file is as bad as it is meant to be
        torch.load(path, weights_only=False)
        assert mark.exists()


class Forged:
    """Pickles as an array of objects whose bytes would be taken for pointers, if numpy's own
    functions were called.
    """

    def __reduce__(self):
        return (
            np.ndarray((0,)).__reduce__()[0],
            (np.ndarray, (0,), b"b"),
            (1, (2,), Flagless(), False, b"\x41" * 16),
        )


class Flagless:
    def __reduce__(self):
        return np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0)


def test_arrays_that_would_forge_pointers(saved):
    save_metadata(saved, changed(p1=Forged()))
    refused(saved, "metadata.pt was refused: it holds a numpy array of objects that is no list")


def test_stand_ins_do_not_stay(saved):
    before = set(map(str, torch.serialization.get_safe_globals()))
    load(saved)
    assert set(map(str, torch.serialization.get_safe_globals())) == before


def test_damaged_metadata(saved):
    path = saved / "metadata.pt"
    whole = path.read_bytes()
    for content in (b"", b"nonsense", whole[:100], whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(content)
        refused(
            saved,
            r"metadata\.pt is (cut off, )?damaged or (no file of torch.save \(\w+: |was "
            r"written with another)",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for protocol in (0, 3, 4, 5):
            save_metadata(saved, metadata(), pickle_protocol=protocol)
            refused(
                saved,
                "with another pickle protocol than torch.save's: save it with "
                "torch.save's defaults",
            )
    path.unlink()
    refused(saved, "no metadata.pt, which lists faceness_scores, templates")


def test_other_schemas(tmp_path):
    image, number, text = (
        {"bytes": b"x", "path": None},
        datasets.Value("int64"),
        datasets.Value("string"),
    )
    for count, (content, features, message) in enumerate(
        [
            (
                {"picture": [1], "label": [2]},
                None,
                r"columns are picture \(int64\), label \(int64\); "
                r"expected are image \(image\), index \(whole number\)",
            ),
            (
                {"image": ["a"], "index": [0]},
                {"image": text, "index": number},
                r"its columns are image "
                r"\(string\), index \(int64\)",
            ),
            ({"index": [0]}, None, r"its columns are index \(int64\)"),
            (
                {"image": [image], "index": [0.0]},
                {"image": datasets.Image(), "index": datasets.Value("float64")},
                r"index "
                r"\(double\)",
            ),
            (
                {"image": [image], "index": [None]},
                {"image": datasets.Image(), "index": number},
                "rows without index",
            ),
            (
                {"image": [None], "index": [0]},
                {"image": datasets.Image(), "index": number},
                "rows without image",
            ),
        ]
    ):
        folder = tmp_path / f"set{count}"
        datasets.Dataset.from_dict(
            content, features=features and datasets.Features(features)
        ).save_to_disk(str(folder))
        save_metadata(folder, metadata())
        refused(folder, message)
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"a": [1]})})
    splits.save_to_disk(str(tmp_path / "splits"))
    refused(tmp_path / "splits", r"holds several splits \(dataset_dict.json\)")


@pytest.mark.parametrize(
    "index, message",
    [
        ([0, 1, 2, 3, 4, 5, 6, 7, 7], "sorted, 7 stands where 8 should"),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], "sorted, 1 stands where 0 should"),
        ([-1, 0, 1, 2, 3, 4, 5, 6, 7], "sorted, -1 stands where 0"),
        ([], "number the 0 images .*empty"),
    ],
)
def test_index_must_number_the_rows(tmp_path, index, message):
    folder = save_images(tmp_path / "set", [encode(smooth(1)[0])] * 10, index, shards=1)
    save_metadata(folder, metadata())
    refused(folder, message)


@pytest.mark.parametrize(
    "name, content",
    [
        ("*.arrow", None),
        ("*.arrow", b""),
        ("*.arrow", b"nonsense" * 99),
        ("*.arrow", "half"),
        ("state.json", None),
        ("state.json", b""),
        ("state.json", b"{}"),
        ("state.json", b"[]"),
        ("state.json", b'{"_data_files": []}'),
        ("state.json", b'{"_data_files": [{}]}'),
        ("state.json", b"\xff\xfe"),
        ("dataset_info.json", None),
        ("dataset_info.json", b"{"),
        ("dataset_info.json", b"[]"),
        ("dataset_info.json", b'{"features": 3}'),
        ("dataset_info.json", b'{"features": {"image": 3}}'),
        ("dataset_info.json", b'{"features": {"image": {"_type": "Nonsense"}}}'),
    ],
)
def test_damaged_folders(saved, name, content):
    path = sorted(saved.glob(name))[-1]
    if content is None:
        path.unlink()
    else:
        path.write_bytes(
            path.read_bytes()[: path.stat().st_size // 2] if content == "half" else content
        )
    refused(saved, "no readable folder of datasets' save_to_disk")


def test_library_missing(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(saved, "pip install -r requirements/requirement.txt")


def test_records_that_are_unreadable_or_not_aligned(tmp_path):
    good = encode(smooth(1)[0])
    encoded = [good] * 4 + [
        b"text",
        encode(smooth(1, (112, 96))[0]),
        {"bytes": None, "path": "gone.png"},
        {"bytes": None, "path": "beside.png"},
        {"bytes": None, "path": None},
    ]
    folder = save_images(tmp_path / "set", [good] * COUNT, shards=1)
    schema = datasets.load_from_disk(str(folder)).data.schema
    content = {
        "image": [
            {"bytes": image, "path": None} if isinstance(image, bytes) else image
            for image in encoded
        ],
        "index": list(range(COUNT)),
    }
    # save_to_disk itself puts the files into the table
    with pa.ipc.new_stream(str(next(folder.glob("*.arrow"))), schema) as file:
        file.write_table(pa.table(content, schema))
    (folder / "beside.png").write_bytes(good)
    save_metadata(folder, metadata())
    images = load(folder).images
    np.testing.assert_array_equal(images[7], smooth(1)[0])
    for i, message in {
        4: "image 4: 4 bytes that are no image",
        5: "image 5: the image is 96x112; .* must be aligned to 112x112 first",
        6: "image 6: .*No such file.*gone.png",
        8: "image 8: the record holds neither",
    }.items():
        with pytest.raises(InputError, match=message):
            images[i]


def test_first_image_is_read_at_once(tmp_path):
    folder = save_images(tmp_path / "set", [encode(smooth(1, (64, 64))[0])] * COUNT)
    save_metadata(folder, metadata())
    refused(folder, "image 0: the image is 64x64")
