"""CVLFace's repositories: fetched from the Hugging Face hub, or a folder of the same layout. They
are read as data; the code they come with is not even downloaded.

    model.safetensors             the weights, keys under ``model.net.`` pretrained_model/model.pt
    the same, keys under ``net.`` pretrained_model/model.yaml   network, colour order, feature and
    input size: what CVLFace's own loader goes by config.json                   the same as
    ``conf``: what transformers was told
"""

import json
import logging
from pathlib import Path
from typing import NamedTuple

from utils.errors import InputError, first_line

# the first that is there is read
WEIGHTS = ("model.safetensors", "pretrained_model/model.pt")
CONFIGURATIONS = ("pretrained_model/model.yaml", "config.json")  # likewise
KEYS = ("name", "color_space", "input_size", "output_dim")
NETWORKS = {
    "iresnet": {"ir18": "ir18", "ir50": "ir50", "ir101": "ir101"},
    "iresnet_insightface": {"ir18": "iresnet18", "ir50": "iresnet50", "ir101": "iresnet100"},
}
OTHERWISE = "or download it elsewhere and set pretrained_teacher_path to the folder"

log = logging.getLogger(__name__)


class Stated(NamedTuple):
    """What a repository's configuration says of its weights."""

    network: str  # our name of it
    embedding_size: int
    color_space: str  # "RGB" or "BGR"
    path: Path  # where it says so


def fetch(repo_id: str, cache: str = "") -> Path:
    """The folder of a repository's newest weights and configuration, downloaded unless the cache
    has them.

    repo_id: owner/name. cache: the folder of repositories; "": the hub's own. HF_TOKEN and
    HF_HUB_OFFLINE count as everywhere. Errors: InputError, whatever it is that keeps the files
    away.
    """
    for weights in WEIGHTS:
        folder = download(repo_id, [*CONFIGURATIONS, weights], cache)
        if (folder / weights).is_file():
            return folder
    raise InputError(
        f"teacher: {repo_id} has no {' and no '.join(WEIGHTS)}, or only a part of it "
        f"is in {folder} and the hub cannot be reached; {OTHERWISE}"
    )


def download(repo_id: str, files: list[str], cache: str) -> Path:
    """The repository's folder with these files, as far as it has them. Errors: as ``fetch``."""
    try:
        from huggingface_hub import constants, errors, snapshot_download, utils
    except ImportError as error:
        raise InputError(
            f"teacher: to fetch {repo_id} install huggingface_hub (pip install "
            f"huggingface_hub), {OTHERWISE}"
        ) from error
    cache = cache or constants.HF_HUB_CACHE
    # besides its own errors, those of its HTTP library (requests, httpx, httpx2: the base class of
    # its own) and of its transfer library come through
    transfer = getattr(errors, "XetDownloadError", RuntimeError)
    try:
        return Path(snapshot_download(repo_id, allow_patterns=files, cache_dir=cache))
    except utils.HFValidationError as error:
        raise InputError(
            f"teacher_repo_id={repo_id!r} is no repository's name: it must be owner/name"
        ) from error
    except utils.GatedRepoError as error:
        raise InputError(
            f"teacher: the owner of {repo_id} gives access on request: ask for it on "
            f"its page on the hub and set HF_TOKEN, {OTHERWISE}"
        ) from error
    except utils.RepositoryNotFoundError as error:
        raise InputError(
            f"teacher: the hub has no {repo_id}, or it is private: check "
            "teacher_repo_id, and HF_TOKEN for a private one"
        ) from error
    except utils.LocalEntryNotFoundError as error:
        why = (
            "HF_HUB_OFFLINE is set"
            if constants.HF_HUB_OFFLINE
            else (f"the hub cannot be reached ({first_line(error.__cause__ or error)})")
        )
        raise InputError(
            f"teacher: {repo_id} is not in {cache} and {why}: run once with a "
            f"connection, {OTHERWISE}"
        ) from error
    except (OSError, RuntimeError, utils.HfHubHTTPError.__bases__[0], transfer) as error:
        raise InputError(
            f"teacher: {repo_id} could not be fetched to {cache} "
            f"({first_line(error)}): try again, {OTHERWISE}"
        ) from error


def find_weights(folder: Path) -> Path:
    """The weights in a folder of CVLFace's layout. Errors: InputError if there are none."""
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        runs = sorted(file.name for file in folder.glob("*backbone.pth"))
        raise InputError(
            f"teacher: the folder {folder} has no {' and no '.join(WEIGHTS)}"
            + (f"; name one of its files, {runs[-1]}" if runs else "")
        )
    return found


def read_configuration(folder: Path, what: str = "teacher") -> Stated | None:
    """What the configuration in a folder of CVLFace's layout states; None if there is none.

    what: the weights are wanted for, the first word of messages.

    Errors: InputError if it is unreadable, incomplete, or of a network that cannot be built here.
    """
    found = [
        stated
        for name in CONFIGURATIONS
        if (folder / name).is_file() and (stated := read_stated(folder / name, what))
    ]
    if len(found) == 2 and found[0][:3] != found[1][:3]:
        log.warning(
            "%s states %s, %s %s: the former counts, as for CVLFace itself",
            found[0].path,
            found[0][:3],
            found[1].path.name,
            found[1][:3],
        )
    return found[0] if found else None


def read_stated(path: Path, what: str) -> Stated | None:
    """One configuration file; None for a config.json that is not CVLFace's."""
    try:
        content = parse(path.read_text(encoding="utf-8-sig"), path, what)
    except (ValueError, OSError) as error:  # ValueError: of the syntax or of the encoding
        raise InputError(f"{what}: {path} is unreadable ({first_line(error)})") from error
    conf = content.get("conf") if path.suffix == ".json" and isinstance(content, dict) else content
    if conf is None and path.suffix == ".json":
        return None
    if not isinstance(conf, dict) or any(key not in conf for key in KEYS):
        raise InputError(
            f"{what}: {path} does not state {', '.join(KEYS)}: it is not a "
            "configuration of CVLFace's"
        )
    if conf["input_size"] != [3, 112, 112]:
        raise InputError(
            f"{what}: {path} states input_size {conf['input_size']}, but images here "
            "are [3, 112, 112]"
        )
    if conf["color_space"] not in ("RGB", "BGR"):
        raise InputError(
            f"{what}: {path} states color_space {conf['color_space']!r}, which is "
            "neither RGB nor BGR"
        )
    if type(conf["output_dim"]) is not int:
        raise InputError(
            f"{what}: {path} states output_dim {conf['output_dim']!r}, which is no "
            "number of dimensions"
        )
    return Stated(network_of(conf, path, what), conf["output_dim"], conf["color_space"], path)


def parse(text: str, path: Path, what: str):
    """The content of a .json or .yaml file. Errors: ValueError for another syntax."""
    if path.suffix == ".json":
        return json.loads(text)
    try:
        import yaml  # only those who have such a teacher need it
    except ImportError as error:
        raise InputError(
            f"{what}: {path} needs PyYAML: pip install -r requirements/requirement.txt"
        ) from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(first_line(error)) from error


def network_of(conf: dict, path: Path, what: str) -> str:
    """Our name of the network: ``yaml_path`` (models/iresnet/configs/v1_ir50.yaml) tells its
    family, ``name`` its depth.
    """
    parts = Path(str(conf.get("yaml_path") or "")).parts
    family = parts[-3] if len(parts) > 2 else "iresnet"
    name = NETWORKS.get(family, {}).get(str(conf["name"]))
    if name is None:
        raise InputError(
            f"{what}: {path} states the network {family} {conf['name']}, which cannot "
            f"be built here (only {', '.join(NETWORKS['iresnet'])}): "
            "export it to ONNX and set teacher=onnx:PATH"
        )
    return name
