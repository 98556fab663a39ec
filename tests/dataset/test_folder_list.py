"""The list of a folder set that is kept between starts."""

import os
import tempfile

import pytest

from tests.dataset.test_dataset import write_folder
from utils.dataset import folder_list
from utils.dataset.folder import FaceDatasetFolder, scan_identities


@pytest.fixture
def faces(tmp_path, monkeypatch):
    """A small set, of which a list is kept at once."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(folder_list, "KEPT_FROM", 1)
    monkeypatch.setattr(folder_list, "SETTLED", -3600)
    return write_folder(tmp_path / "faces", {"ann": 3, "bob": 2, "cid": 1})


@pytest.fixture
def listed(monkeypatch):
    """The folders that were listed, by name."""
    names = []
    split = folder_list.split_folder

    def spy(folder):
        names.append(os.path.basename(folder))
        return split(folder)

    monkeypatch.setattr(folder_list, "split_folder", spy)
    return names


def test_the_second_time_no_folder_is_listed(faces, listed):
    (faces / "ann" / "notes.txt").touch()
    (faces / "bob" / os.fsdecode(b"\xe9.jpg")).touch()
    first = scan_identities(str(faces))
    assert listed == ["ann", "bob", "cid"]
    assert scan_identities(str(faces)) == first and len(listed) == 3
    assert len(FaceDatasetFolder(str(faces))) == 7 and len(listed) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda faces: (faces / "bob" / "new.jpg").touch(),
        lambda faces: (faces / "bob" / "00.jpg").unlink(),
        lambda faces: (faces / "bob" / "00.jpg").rename(faces / "bob" / "x.jpg"),
        lambda faces: write_folder(faces, {"dan": 1}),
        lambda faces: (faces / "ann").rename(faces / "eve"),
        lambda faces: [path.unlink() for path in (faces / "cid").iterdir()],
    ],
    ids=["a file more", "less", "renamed", "a folder more", "renamed folder", "emptied"],
)
def test_changes_are_seen(faces, listed, change, tmp_path, monkeypatch):
    scan_identities(str(faces))
    change(faces)
    changed = scan_identities(str(faces))
    assert len(listed) >= 5
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    assert scan_identities(str(faces)) == changed


def test_lists_that_do_not_count(faces, listed, tmp_path, monkeypatch):
    scan_identities(str(faces))
    (kept,) = (tmp_path / "tmp").glob("record-index-*/folders-*.json")
    for content in (b"", b"{", kept.read_bytes()[:-5]):
        kept.write_bytes(content)
        del listed[:]
        scan_identities(str(faces))
        assert len(listed) == 3
    # folders that have just changed may change again within the same tick of the clock
    kept.unlink()
    monkeypatch.setattr(folder_list, "SETTLED", 3600)
    scan_identities(str(faces))
    assert not kept.exists()
    monkeypatch.setattr(folder_list, "SETTLED", -3600)
    monkeypatch.setattr(folder_list, "KEPT_FROM", 7)
    scan_identities(str(faces))
    assert not kept.exists()


def test_a_full_disk_costs_the_list_only(faces, listed, monkeypatch, caplog):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_list, "replacing", full)
    first = scan_identities(str(faces))
    assert "No space left on device; the folders of" in caplog.text
    listed.clear()
    assert scan_identities(str(faces)) == first and "ann" in listed
