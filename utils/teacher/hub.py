"""CVLFace's repositories: fetched from the Hugging Face hub, or a folder of the same layout.

    model.safetensors             the weights, keys under ``model.net.``
    pretrained_model/model.pt     the same, keys under ``net.``
    pretrained_model/model.yaml   network, colour order, feature and input size
    config.json                   the same as ``conf``

They are read as data (utils/weights/cvlface.py); the code they come with is not even downloaded.
"""

from pathlib import Path

from utils.errors import InputError, first_line
from utils.weights.cvlface import CONFIGURATIONS

# the first that is there is read
WEIGHTS = ("model.safetensors", "pretrained_model/model.pt")
OTHERWISE = "or download it elsewhere and set pretrained_teacher_path to the folder"


def fetch(repo_id: str, cache: str = "") -> Path:
    """The folder of a repository's newest weights and configuration.

    They are downloaded unless the cache has them. HF_TOKEN and HF_HUB_OFFLINE count as everywhere.
    repo_id: owner/name. cache: the folder of repositories; "": the hub's own.
    Raises InputError, whatever it is that keeps the files away.
    """
    for weights in WEIGHTS:
        folder = download(repo_id, [*CONFIGURATIONS, weights], cache)
        if (folder / weights).is_file():
            return folder
    raise InputError(
        f"teacher: {repo_id} has no {' and no '.join(WEIGHTS)}, or only a part of it is in "
        f"{folder} and the hub cannot be reached; {OTHERWISE}"
    )


def download(repo_id: str, files: list[str], cache: str) -> Path:
    """The repository's folder with these files, as far as it has them.

    Raises InputError as ``fetch``.
    """
    try:
        from huggingface_hub import constants, errors, snapshot_download, utils
    except ImportError as error:
        raise InputError(
            f"teacher: to fetch {repo_id} install huggingface_hub (pip install huggingface_hub), "
            f"{OTHERWISE}"
        ) from error
    cache = cache or constants.HF_HUB_CACHE
    # besides its own errors, those of its HTTP library (requests, httpx, httpx2: the base class of
    # its own) and of its transfer library come through
    http_error = utils.HfHubHTTPError.__bases__[0]
    transfer_error = getattr(errors, "XetDownloadError", RuntimeError)
    try:
        return Path(snapshot_download(repo_id, allow_patterns=files, cache_dir=cache))
    except utils.HFValidationError as error:
        raise InputError(
            f"teacher_repo_id={repo_id!r} is no repository's name: it must be owner/name"
        ) from error
    except utils.GatedRepoError as error:
        raise InputError(
            f"teacher: the owner of {repo_id} gives access on request: ask for it on its page on "
            f"the hub and set HF_TOKEN, {OTHERWISE}"
        ) from error
    except utils.RepositoryNotFoundError as error:
        raise InputError(
            f"teacher: the hub has no {repo_id}, or it is private: check teacher_repo_id, and "
            "HF_TOKEN for a private one"
        ) from error
    except utils.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set"
        if not constants.HF_HUB_OFFLINE:
            why = f"the hub cannot be reached ({first_line(error.__cause__ or error)})"
        raise InputError(
            f"teacher: {repo_id} is not in {cache} and {why}: run once with a connection, "
            f"{OTHERWISE}"
        ) from error
    except (OSError, RuntimeError, http_error, transfer_error) as error:
        raise InputError(
            f"teacher: {repo_id} could not be fetched to {cache} ({first_line(error)}): try again, "
            f"{OTHERWISE}"
        ) from error


def find_weights(folder: Path) -> Path:
    """The weights in a folder of CVLFace's layout. Raises InputError if there are none."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    runs = sorted(file.name for file in folder.glob("*backbone.pth"))
    mend = f"; name one of its files, {runs[-1]}" if runs else ""
    raise InputError(f"teacher: the folder {folder} has no {' and no '.join(WEIGHTS)}{mend}")
