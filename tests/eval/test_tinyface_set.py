"""TinyFace in both layouts: what is read, that both give the same, and every way in which a folder
can be wrong.
"""

import os
import pickle
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from eval.sets.folder import check_images
from eval.sets.tinyface import find_tinyface, load_tinyface
from eval.tinyface import find_roles
from tests.saved_sets import encode, save_images, save_metadata, smooth
from utils.dataset.workers import start_worker
from utils.errors import InputError

FILES = {
    "Probe": ["10_2.jpg", "1_1.png", "1_9.JPG"],
    "Gallery_Match": ["10_7.jpeg", "1_0.bmp"],
    "Gallery_Distractor": ["77.jpg", "a_b_1.jpg"],
}
PATHS = [f"Testing_Set/{folder}/{name}" for folder, names in FILES.items() for name in names]
COUNT = len(PATHS)
LISTS = {"probe_paths": PATHS[:3], "gallery_paths": PATHS[3:5], "distractor_paths": PATHS[5:]}
ORDER = [5, 0, 6, 2, 1, 4, 3]


def write_tree(root: Path, target="tinyface") -> Path:
    folder = root / target
    for path, image in zip(PATHS, smooth(COUNT), strict=True):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(encode(image, os.path.splitext(path)[1]))
    (folder / "Testing_Set/Probe/Thumbs.db").write_bytes(b"no image")
    (folder / "Testing_Set/Probe/._1_1.png").write_bytes(b"what macOS leaves behind")
    (folder / "Testing_Set/probe_img_ID_pairs.mat").touch()
    return folder


def write_saved(
    root: Path, pixels, target="tinyface_aligned_pad_0.1", paths=PATHS, **metadata
) -> Path:
    folder = save_images(root / target, [encode(image) for image in pixels], ORDER, path=paths)
    content = {"image_paths": paths, **LISTS} | metadata
    save_metadata(folder, {key: value for key, value in content.items() if value is not None})
    return folder


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path)


def load(folder: Path):
    return load_tinyface(folder.parent, folder.name)


def refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def snapshot(folder: Path) -> dict:
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))
    }


# --- what is read


def test_both_layouts_of_one_set_give_the_same(tmp_path, tree):
    before = snapshot(tree)
    actual = load_tinyface(tmp_path, "tinyface")
    assert (
        actual.name == "tinyface"
        and actual.image_paths == PATHS
        and actual.meta == LISTS
        and len(actual.images) == COUNT
    )
    pixels = [actual.images[i] for i in range(COUNT)]
    lossless = [i for i, path in enumerate(PATHS) if path.endswith(("png", "bmp"))]
    for i, image in enumerate(smooth(COUNT)):
        assert pixels[i].shape == (112, 112, 3) and np.abs(pixels[i] - image.astype(int)).mean() < (
            5 if i not in lossless else 1e-9
        )
        assert actual.images.name_of(i) == str(tree / PATHS[i])

    folder = write_saved(tmp_path, pixels)
    before |= snapshot(folder)
    saved = load_tinyface(tmp_path, "tinyface_aligned_pad_0.1")
    assert (
        saved.image_paths == actual.image_paths
        and saved.meta == actual.meta
        and list(saved.meta) == list(LISTS)
    )
    for i, expected in enumerate(pixels):
        np.testing.assert_array_equal(saved.images[i], expected)
        assert str(folder) in saved.images.name_of(i) and PATHS[i] in saved.images.name_of(i)
    assert snapshot(tree) | snapshot(folder) == before  # nothing is written beside a set
    assert len({actual.fingerprint, saved.fingerprint}) == 2 and len(actual.fingerprint) == 64


def test_the_three_folders_alone(tmp_path, tree):
    for name in FILES:
        shutil.move(tree / "Testing_Set" / name, tree)
    shutil.rmtree(tree / "Testing_Set")
    actual = load(tree)
    assert actual.image_paths == [path.removeprefix("Testing_Set/") for path in PATHS]
    assert actual.meta["gallery_paths"] == ["Gallery_Match/10_7.jpeg", "Gallery_Match/1_0.bmp"]
    np.testing.assert_array_equal(actual.images[1], smooth(COUNT)[1])


@pytest.mark.parametrize(
    "convert",
    [
        list,
        np.array,
        lambda texts: np.array(texts, object),
        lambda texts: [np.str_(text) for text in texts],
        tuple,
    ],
)
@pytest.mark.parametrize("core", ["core", "_core"])
@pytest.mark.parametrize("legacy", [False, True])
def test_metadata_of_every_kind(tmp_path, convert, core, legacy):
    folder = write_saved(tmp_path, smooth(COUNT))
    content = {key: convert(texts) for key, texts in ({"image_paths": PATHS} | LISTS).items()}
    save_metadata(folder, content, core, _use_new_zipfile_serialization=not legacy)
    actual = load(folder)
    assert (
        actual.meta == LISTS
        and actual.image_paths == PATHS
        and type(actual.meta["probe_paths"][0]) is str
    )


def test_the_column_tells_which_image_a_row_is(tmp_path):
    """Where metadata.pt lists the images in another order, or below another folder, the path beside
    the image decides.
    """
    folder = write_saved(
        tmp_path,
        smooth(COUNT),
        image_paths=[f"/data/aligned/{Path(path).name}" for path in reversed(PATHS)],
    )
    actual = load(folder)
    assert actual.image_paths == PATHS
    np.testing.assert_array_equal(actual.images[3], smooth(COUNT)[3])


def test_images_of_one_name_are_told_apart_by_their_folders(tmp_path, tree):
    """Nothing keeps the names of probes, mates and distractors from being the same; the names in an
    Arrow column may be without folders.
    """
    for old, new in (
        ("Gallery_Match/1_0.bmp", "Gallery_Match/1_1.png"),
        ("Gallery_Distractor/77.jpg", "Gallery_Distractor/1_1.png"),
    ):
        move(tree, old, new)
    actual = load(tree)
    lists = {
        role: sorted(path for path in actual.image_paths if f"/{folder}/" in path)
        for role, folder in zip(LISTS, FILES, strict=True)
    }
    assert (
        actual.meta == lists
        and [path.endswith("/1_1.png") for path in actual.image_paths].count(True) == 3
    )
    probes, gallery, distractors = find_roles(actual.image_paths, actual.meta)
    assert [list(probes), list(gallery), list(distractors)] == [[0, 1, 2], [3, 4], [5, 6]]

    paths = actual.image_paths
    names = [Path(path).name for path in paths]
    elsewhere = [f"/data/{path}" for path in paths]
    for number, (column, listed, expected) in enumerate(
        [
            (names, paths, paths),
            (paths, names, paths),
            (elsewhere, paths, paths),
            (paths, paths[::-1], paths),
        ]
    ):
        folder = write_saved(
            tmp_path, smooth(COUNT), f"set{number}", paths=column, image_paths=listed, **lists
        )
        assert load(folder).image_paths == expected and load(folder).meta == lists


def test_no_distractors_and_probes_without_mate_are_told_once(tmp_path, tree, caplog):
    for name in FILES["Gallery_Distractor"]:
        move(tree, f"Gallery_Distractor/{name}", None)
    move(tree, "Gallery_Match/1_0.bmp", None)
    assert load(tree).meta["distractor_paths"] == []
    assert [
        message.split(": ", 1)[1] for message in caplog.messages if "published" not in message
    ] == [
        "the gallery has no mate of 2 probes, the first Testing_Set/Probe/1_1.png: counted as a "
        "miss at every rank",
        "no distractors: the gallery has mates only",
    ]
    caplog.clear()
    saved = write_saved(
        tmp_path,
        smooth(COUNT),
        "saved",
        probe_paths=PATHS[:2],
        gallery_paths=PATHS[3:4],
        distractor_paths=[],
    )
    assert load(saved).meta["distractor_paths"] == []
    assert (
        len(caplog.messages) == 2
        and "no mate of 1 probe, Testing_Set/Probe/1_1.png:" in caplog.messages[0]
    )


def test_finding_the_folder(tmp_path):
    (tmp_path / "tinyface_aligned_pad_0.1").mkdir()
    assert (
        find_tinyface(tmp_path, "tinyface")
        == find_tinyface(tmp_path, "tinyface_aligned_pad_0.1")
        == tmp_path / "tinyface_aligned_pad_0.1"
    )
    with pytest.raises(
        InputError,
        match=r"TF: no folder TF or TF_aligned_pad_0\.1 in .*folders "
        r"there: tinyface_aligned_pad_0\.1",
    ):
        load_tinyface(tmp_path, "TF")


@pytest.mark.parametrize("layout", ["tree", "saved"])
def test_images_in_worker_processes(tmp_path, layout):
    images = load(
        write_tree(tmp_path) if layout == "tree" else write_saved(tmp_path, smooth(COUNT))
    ).images
    expected = np.stack([images[i] for i in range(COUNT)])
    copy = pickle.loads(pickle.dumps(images))
    np.testing.assert_array_equal(np.stack([copy[i] for i in range(COUNT)]), expected)
    check_images(images, 2, "test")
    loader = DataLoader(
        images,
        batch_size=3,
        num_workers=2,
        worker_init_fn=start_worker,
        collate_fn=lambda batch: torch.from_numpy(np.stack(batch)),
    )
    np.testing.assert_array_equal(torch.cat(list(loader)).numpy(), expected)


def test_fingerprint_follows_the_images(tree):
    first = load(tree).fingerprint
    assert load(tree).fingerprint == first
    (tree / PATHS[2]).write_bytes((tree / PATHS[2]).read_bytes() + b"\0")
    second = load(tree).fingerprint
    shutil.copy(tree / PATHS[5], tree / "Testing_Set/Gallery_Distractor/another.jpg")
    assert len({first, second, load(tree).fingerprint}) == 3


def test_a_set_of_the_published_name_and_another_size_is_told(tmp_path, caplog, monkeypatch):
    load(write_tree(tmp_path, "mine"))
    assert not caplog.text
    load(write_tree(tmp_path, "TinyFace"))
    assert (
        "TinyFace has 3 probes, 4 gallery images, the published set 3,728 probes, 157,871 "
        "gallery images"
    ) in caplog.text
    caplog.clear()
    # every rank reads the set, the first speaks
    monkeypatch.setattr("utils.distributed.is_main", lambda: False)
    load(tmp_path / "TinyFace")
    assert not caplog.text


# --- a wrong tree


def move(tree: Path, old: str, new: str | None) -> None:
    """Rename a file or folder; None: remove it."""
    path = tree / "Testing_Set" / old
    if new is not None:
        path.rename(tree / "Testing_Set" / new)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


@pytest.mark.parametrize(
    "moves, message",
    [
        (
            [("Probe", None)],
            "Testing_Set: no folder Probe; TinyFace has Probe, Gallery_Match, Gallery_Distractor",
        ),
        ([("Gallery_Distractor", None)], "no folder Gallery_Distractor"),
        (
            [
                ("Gallery_Match/10_7.jpeg", "Gallery_Match/10_7.gif"),
                ("Gallery_Match/1_0.bmp", None),
            ],
            r"Gallery_Match "
            r"holds no images \(.jpg, .jpeg, .png",
        ),
        (
            [
                ("Gallery_Match/1_0.bmp", "Gallery_Match/11_0.bmp"),
                ("Gallery_Match/10_7.jpeg", None),
            ],
            "no TinyFace probe has a mate: .* no image of person 10",
        ),
        (
            [("Probe/10_2.jpg", "Probe/10.jpg")],
            r"the name does not tell the identity .* of 1 image, "
            r"Testing_Set/Probe/10\.jpg$",
        ),
        (
            [("Gallery_Match/1_0.bmp", "Gallery_Match/1.bmp"), ("Probe/1_1.png", "Probe/1.png")],
            "of 2 images, the first Testing_Set/Probe/1.png",
        ),
    ],
)
def test_trees_that_do_not_fit(tree, moves, message):
    for old, new in moves:
        move(tree, old, new)
    refused(tree, message)


def test_unreadable_and_unaligned_images(tree):
    (tree / PATHS[0]).write_bytes(encode(smooth(1, (24, 20))[0]))
    refused(
        tree,
        "Probe/10_2.jpg: the image is 20x24; the images of this set must be aligned to "
        "112x112 first",
    )
    (tree / PATHS[0]).write_bytes(b"text")
    refused(tree, "Probe/10_2.jpg: 4 bytes that are no image")
    (tree / PATHS[0]).write_bytes(encode(smooth(1)[0]))
    (tree / PATHS[4]).write_bytes(b"")
    refused(tree, "1 empty file, Testing_Set/Gallery_Match/1_0.bmp: copy again")
    (tree / PATHS[4]).write_bytes(encode(smooth(1, (112, 100))[0]))
    images = load(tree).images  # one image is read as a sample, not all
    with pytest.raises(InputError, match="Gallery_Match/1_0.bmp: the image is 100x112"):
        images[4]
    (tree / PATHS[4]).unlink()
    with pytest.raises(InputError, match="Gallery_Match/1_0.bmp: No such file"):
        images[4]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_is_read_where_asked(tree, workers, capfd):
    (tree / PATHS[4]).write_bytes(b"text")
    (tree / PATHS[6]).write_bytes(b"text")
    images, state = load(tree).images, torch.get_rng_state()
    check_images(Subset(images, [0, 3, 5]), workers, "test")
    check_images(Subset(images, []), workers, "test")
    with pytest.raises(
        InputError,
        match=r"^\S*Gallery_Match/1_0.bmp: 4 bytes that are no image "
        r"OpenCV can read$",
    ):
        check_images(images, workers, "test")
    # a training run that checks first draws the same random numbers
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")  # the bar is for terminals


def test_folders_of_neither_layout_or_both(tmp_path, tree):
    (tmp_path / "empty").mkdir()
    refused(
        tmp_path / "empty",
        "neither the official layout .folders Testing_Set/Probe, "
        "Gallery_Match, Gallery_Distractor. nor CVLFace's .state.json",
    )
    (tree / "state.json").touch()
    refused(tree, "both the official layout")


# --- a wrong CVLFace folder


@pytest.mark.parametrize(
    "metadata, message",
    [
        (
            dict(probe_paths=None),
            "metadata.pt lacks probe_paths; it holds image_paths, gallery_paths, distractor_paths",
        ),
        (
            dict(image_paths=PATHS[:-1]),
            "the 6 image_paths of metadata.pt are not the 7 images in the column 'path'",
        ),
        (dict(image_paths=PATHS[:-1] + ["x.jpg"]), "are not the 7 images"),
        (dict(probe_paths=[]), "probe_paths is empty"),
        (dict(gallery_paths=[]), "gallery_paths is empty"),
        (
            dict(probe_paths=PATHS[:2] + ["Probe/1_99.jpg"]),
            "probe_paths: Probe/1_99.jpg is not among the image paths",
        ),
        (dict(gallery_paths=PATHS[2:5]), "Probe/1_9.JPG is named more than once"),
        (
            dict(probe_paths=PATHS[:3] + PATHS[:1]),
            "Probe/10_2.jpg is named more than once in "
            "probe_paths, gallery_paths, distractor_paths",
        ),
        (dict(probe_paths=PATHS[:1], gallery_paths=PATHS[4:5]), "no TinyFace probe has a mate"),
        (dict(probe_paths="text"), "probe_paths is no list of strings"),
        (dict(probe_paths=[1, 2]), "probe_paths is no list of strings"),
        (dict(probe_paths=np.arange(3)), "probe_paths is no list of strings"),
        (dict(probe_paths=torch.arange(3)), "probe_paths is no list of strings"),
        (
            dict(probe_paths=np.array([b"a"])),
            "probe_paths is a numpy array of S1; numbers and strings are expected",
        ),
        (dict(probe_paths=os.system), "refused: it asks to load (posix|nt).system"),
    ],
)
def test_metadata_that_does_not_fit(tmp_path, metadata, message):
    refused(write_saved(tmp_path, smooth(COUNT), **metadata), message)


def test_paths_that_could_be_of_two_images(tmp_path):
    paths = PATHS[:-1] + ["elsewhere/77.png"]
    folder = write_saved(tmp_path, smooth(COUNT), paths=paths, distractor_paths=["77.jpg"])
    refused(
        folder, "distractor_paths: 77.jpg could be .*Gallery_Distractor/77.jpg or elsewhere/77.png"
    )
    refused(
        write_saved(
            tmp_path, smooth(COUNT), "twice", paths=PATHS[:-1] + PATHS[-2:-1], distractor_paths=[]
        ),
        "images 5 and 6 have the same path",
    )


def test_schema_needs_the_paths(tmp_path):
    folder = save_images(tmp_path / "set", [encode(smooth(1)[0])] * COUNT)
    save_metadata(folder, {"image_paths": PATHS, **LISTS})
    refused(
        folder,
        r"its columns are image \(image\), index \(int64\); expected are image "
        r"\(image\), index \(whole number\), path \(string\)",
    )
    table = datasets.load_from_disk(str(folder)).add_column("path", list(range(COUNT)))
    table.save_to_disk(str(tmp_path / "other"))
    refused(tmp_path / "other", r"path \(int64\); expected")


def test_records_are_named_with_their_path(tmp_path):
    refused(
        write_saved(tmp_path, smooth(COUNT, (112, 111))),
        "image 0 .Testing_Set/Probe/10_2.jpg.: the image is 111x112",
    )
