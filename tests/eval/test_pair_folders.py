"""Pair sets in CVLFace's Arrow layout, side by side with the ``.bin`` of the same images."""

import pickle

import datasets
import numpy as np
import pytest

from eval.test_sets import PairTestSet
from eval.verification import find_pair_set, list_pair_sets, load_bin, load_targets
from tests.saved_sets import encode, smooth
from utils.errors import InputError

PAIRS = 20
SAME = [number % 3 == 0 for number in range(PAIRS)]


def save_pairs(folder, encoded, same, kind="bool", index=None, **columns):
    """A row for each image, in the order ``index``, which CVLFace's folders have as a column."""
    index = list(range(len(encoded))) if index is None else list(index)
    content = {
        "image": [{"bytes": encoded[i], "path": None} for i in index],
        "index": index,
        "is_same": [same[i] for i in index],
        **columns,
    }
    features = {
        "image": datasets.Image(),
        "index": datasets.Value("int64"),
        "is_same": datasets.Value(kind),
    }
    features |= {name: datasets.Value("string") for name in columns}
    rows = datasets.Dataset.from_dict(content, features=datasets.Features(features))
    rows.save_to_disk(str(folder), num_shards=3)
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """``lfw.bin``, the same pairs as the folders ``folder`` and ``rows``, the second with rows in
    another order, and a folder of another kind.
    """
    root = tmp_path_factory.mktemp("facerec_val")
    encoded = [encode(image) for image in smooth(2 * PAIRS)]
    encoded[3] = encode(smooth(1, (150, 100))[0], ".jpg")
    (root / "lfw.bin").write_bytes(pickle.dumps((encoded, SAME)))
    twice = np.repeat(SAME, 2).tolist()
    save_pairs(root / "folder", encoded, twice)
    order = np.random.default_rng(0).permutation(2 * PAIRS).tolist()
    further = {"path": [f"{number}.png" for number in range(2 * PAIRS)]}
    save_pairs(root / "rows", encoded, list(map(int, twice)), "int32", order, **further)
    save_pairs(root / "IJBX", encoded, twice)
    (root / "IJBX" / "metadata.pt").write_bytes(b"")
    return root


@pytest.mark.parametrize("name", ["folder", "rows"])
def test_a_folder_is_the_set_that_the_bin_is(sets, name):
    (images, same), (expected, expected_same) = load_bin(sets / name), load_bin(sets / "lfw.bin")
    np.testing.assert_array_equal(images, expected)
    np.testing.assert_array_equal(same, expected_same)
    assert same.dtype == bool and same.tolist() == SAME
    loaded = load_targets(sets, ["lfw", name])
    np.testing.assert_array_equal(loaded["lfw"][0], loaded[name][0])


def test_found_beside_bin_files(sets, tmp_path):
    assert list_pair_sets(sets) == ["folder", "lfw", "rows"]
    assert find_pair_set(sets, "folder") == sets / "folder"
    with pytest.raises(InputError, match=r"none.bin not found; .bin files .*: folder, rows$"):
        find_pair_set(sets, "none")
    # a .bin comes first
    (tmp_path / "folder.bin").write_bytes(b"")
    (tmp_path / "folder").symlink_to(sets / "folder")
    assert find_pair_set(tmp_path, "folder") == tmp_path / "folder.bin"
    assert list_pair_sets(tmp_path) == ["folder"]


def test_features_are_kept_by_what_a_folder_holds(sets):
    fingerprints = {PairTestSet.load(sets, name)[1] for name in ("lfw", "folder", "rows")}
    assert len(fingerprints) == 3
    assert PairTestSet.load(sets, "rows")[1] in fingerprints


def test_folders_that_are_no_pair_set(tmp_path):
    encoded = [encode(image) for image in smooth(4)]
    for number, (same, message) in enumerate(
        (
            ([True, True, False], "of these 3 images some do not"),
            ([True, False, False, False], "images 2i and 2i[+]1, by 'index', are a pair"),
            ([True] * 4, "all 2 pairs are of the same person"),
        )
    ):
        folder = save_pairs(tmp_path / str(number), encoded[: len(same)], same)
        with pytest.raises(InputError, match=message):
            load_bin(folder)
    folder = save_pairs(tmp_path / "numbers", encoded, [2, 2, 0, 0], "int64")
    with pytest.raises(InputError, match="labels of a pair set are booleans"):
        load_bin(folder)
    encoded[3] = bytes(100)
    folder = save_pairs(tmp_path / "damaged", encoded, [True, True, False, False])
    with pytest.raises(InputError, match="damaged: image 3 of 4"):
        load_bin(folder)
    rows = datasets.Dataset.from_dict({"index": [0], "is_same": [True]})
    rows.save_to_disk(str(tmp_path / "columns"))
    with pytest.raises(InputError, match="is no pair set: its columns are index .*expected are im"):
        load_bin(tmp_path / "columns")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "state.json").write_text("{}")
    with pytest.raises(InputError, match="is no readable folder of datasets"):
        load_bin(tmp_path / "empty")
