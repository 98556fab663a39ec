"""CVLFace's repositories from the hub: in its own cache without a network, and from a hub that the
tests serve; every failure is one line.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

from tests import rounding
from tests.local_hub import REVISION, child, hub_options, serve
from tests.teachers import IMAGES, network, repository, save
from utils.errors import InputError
from utils.teacher import hub
from utils.weights.read import sha256


def into_cache(cache: Path, repo_id: str, folder: Path) -> Path:
    """A repository's folder as the hub keeps it: blobs, links to them in the snapshot of a
    revision, and the revision of the branch main.
    """
    home = cache / f"models--{repo_id.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "blobs").mkdir()
    (home / "refs" / "main").write_text(REVISION)
    snapshot = home / "snapshots" / REVISION
    for file in folder.rglob("*"):
        if file.is_file() and file.name != "wrapper.py":
            blob, link = home / "blobs" / sha256(file), snapshot / file.relative_to(folder)
            blob.write_bytes(file.read_bytes())
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.processes
def test_a_cached_repository_without_a_network(tmp_path):
    """Both the folder of teacher_cache and the hub's own; what is not there is one line.

    The optional libraries are imported when they are needed.
    """
    ir18 = network()
    folder = repository(tmp_path / "repository", ir18.state_dict())
    snapshot = into_cache(tmp_path / "cache", "someone/faces_ir18", folder)
    into_cache(tmp_path / "home" / "hub", "someone/faces_ir18", folder)
    into_cache(
        tmp_path / "cache",
        "someone/half",
        repository(tmp_path / "half", {}, file="other.safetensors"),
    )
    torch.save(IMAGES, tmp_path / "images.pth")
    code = """
import json, sys, torch
import config.load
from easydict import EasyDict
from utils.errors import InputError
from utils.teacher.load import load_teacher
optional = ("onnx", "onnxruntime", "huggingface_hub")
early = [name for name in optional if name in sys.modules]
folder = sys.argv[1]
def load(teacher, repo_id, cache):
    cfg = EasyDict(
        teacher=teacher,
        pretrained_teacher_path="",
        teacher_repo_id=repo_id,
        teacher_cache=cache,
        color_space="auto",
    )
    try:
        return load_teacher(cfg, 16)
    except InputError as error:
        return str(error)
cache = folder + "/cache"
found = load("ir18", "someone/faces_ir18", cache)
torch.save(found(torch.load(folder + "/images.pth")), folder + "/features.pth")
own = load("ir18", "someone/faces_ir18", "")
missing = load("cvlface_ir50", "", cache)
half = load("ir18", "someone/half", cache)
no_name = load("ir18", "no name/at all/x", "")
print(json.dumps([found.path, own.path, missing, half, no_name, early]))
"""
    path, own, missing, half, name, early = child(
        code, tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home")
    )
    assert (
        early == []
        and path == str(snapshot / "model.safetensors")
        and own.startswith(str(tmp_path / "home" / "hub"))
    )
    with torch.no_grad():
        wanted = ir18(IMAGES)
    # of another process, which need not have as many threads
    torch.testing.assert_close(
        torch.load(tmp_path / "features.pth"),
        wanted,
        rtol=0,
        atol=2 * rounding.network(20, 9 * 512) * float(wanted.abs().max()),
    )
    assert missing == (
        "teacher: minchul/cvlface_adaface_ir50_webface4m is not in "
        f"{tmp_path}/cache and HF_HUB_OFFLINE is set: run once with a connection, "
        "or download it elsewhere and set pretrained_teacher_path to the folder"
    )
    assert half.startswith(
        "teacher: someone/half has no model.safetensors and no "
        "pretrained_model/model.pt, or only a part of it is in"
    )
    assert name == (
        "teacher_repo_id='no name/at all/x' is no repository's name: it must be owner/name"
    )


@pytest.fixture
def own_hub(tmp_path):
    """(address, requests, folder of repositories) of a hub on this machine."""
    with serve(tmp_path / "served") as (address, asked):
        yield address, asked, tmp_path / "served"


FETCH = """
import json, sys
from utils.errors import InputError
from utils.teacher.hub import fetch
def attempt(repo_id):
    try:
        return str(fetch(repo_id, sys.argv[1]))
    except InputError as error:
        return str(error)
print(json.dumps([attempt(repo_id) for repo_id in sys.argv[2:]]))
"""


@pytest.mark.processes
def test_fetching_from_a_hub(tmp_path, own_hub):
    """Weights and configuration come, code does not; the token goes along; what goes wrong is one
    line.
    """
    address, asked, served = own_hub
    repository(served / "o" / "whole", {"x": torch.zeros(2)})
    save({"net.x": torch.zeros(2)}, served / "o" / "whole" / "pretrained_model" / "model.pt")
    repository(served / "o" / "old", {"x": torch.zeros(2)}, file="pretrained_model/model.pt")
    repository(served / "o" / "secret", {"x": torch.zeros(2)})
    repository(served / "o" / "gated", {"x": torch.zeros(2)})
    (served / "o" / "empty").mkdir()
    (served / "o" / "empty" / "README.md").write_text("soon")
    options = hub_options(address)
    cache = tmp_path / "cache"
    whole, old, secret, gated, none, broken, empty = child(
        FETCH,
        cache,
        *(f"o/{name}" for name in ("whole", "old", "secret", "gated", "none", "broken", "empty")),
        HF_TOKEN="hf_test",
        **options,
    )
    snapshot = cache / "models--o--whole" / "snapshots" / REVISION
    assert whole == str(snapshot)
    assert {str(file.relative_to(snapshot)) for file in snapshot.rglob("*") if file.is_file()} == {
        "model.safetensors",
        "config.json",
        "pretrained_model/model.yaml",
    }
    assert (snapshot / "model.safetensors").read_bytes() == (
        served / "o" / "whole" / "model.safetensors"
    ).read_bytes()
    assert (Path(old) / "pretrained_model" / "model.pt").is_file() and (
        Path(secret) / "model.safetensors"
    ).is_file()
    assert not any(file.endswith(".py") for file, _ in asked) and {token for _, token in asked} == {
        "Bearer hf_test"
    }
    assert gated.startswith(
        "teacher: the owner of o/gated gives access on request: ask for it on "
        "its page on the hub and set HF_TOKEN"
    )
    assert none == (
        "teacher: the hub has no o/none, or it is private: check teacher_repo_id, and "
        "HF_TOKEN for a private one"
    )
    assert broken.startswith(f"teacher: o/broken is not in {cache} and the hub cannot be reached (")
    assert empty.startswith(
        "teacher: o/empty has no model.safetensors and no pretrained_model/model.pt"
    )
    assert not any("\n" in line for line in (gated, none, broken, empty))

    before = len(asked)
    assert child(FETCH, cache, "o/secret", "o/whole", HF_HUB_OFFLINE="1", **options) == [
        secret,
        whole,
    ]
    assert len(asked) == before, "the cache serves without the network"
    [private] = child(FETCH, tmp_path / "cache 2", "o/secret", **options)
    assert private.startswith("teacher: the hub has no o/secret, or it is private")


@pytest.mark.processes
def test_a_hub_that_is_not_there(tmp_path):
    [unreachable] = child(
        FETCH,
        tmp_path / "cache",
        "o/whole",
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HUB_ETAG_TIMEOUT="2",
        HTTP_PROXY="",
        http_proxy="",
    )
    assert (
        unreachable.startswith(
            f"teacher: o/whole is not in {tmp_path}/cache and the hub cannot be reached ("
        )
        and "\n" not in unreachable
    )
    (tmp_path / "file").touch()
    [unusable] = child(FETCH, tmp_path / "file", "o/whole", HF_HUB_OFFLINE="1")
    assert unusable.startswith(
        f"teacher: o/whole is not in {tmp_path}/file and HF_HUB_OFFLINE is set"
    )


def test_a_download_that_breaks_off(tmp_path, monkeypatch):
    """Besides its own errors, huggingface_hub lets those of the disk, of its HTTP library and of
    its transfer library through.
    """
    library = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    from huggingface_hub import errors
    from huggingface_hub.utils import HfHubHTTPError

    for error in (
        OSError(28, "No space left on device"),
        HfHubHTTPError.__bases__[0]("peer closed connection\nmore"),
        RuntimeError("CAS service error"),
        getattr(errors, "XetDownloadError", RuntimeError)("no bytes"),
    ):

        def broken(*_arguments, error=error, **_options):
            raise error

        monkeypatch.setattr(library, "snapshot_download", broken)
        with pytest.raises(
            InputError,
            match=rf"teacher: o/x could not be fetched to {tmp_path} "
            r"\(.*\): try again, or download it",
        ) as caught:
            hub.fetch("o/x", str(tmp_path))
        assert any(
            word in str(caught.value) for word in ("No space", "peer closed", "CAS", "no bytes")
        )
        assert "\n" not in str(caught.value)


def test_without_huggingface_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="to fetch o/x install huggingface_hub"):
        hub.fetch("o/x")
