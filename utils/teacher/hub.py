"""CVLFace's repositories: on the Hugging Face hub, or a folder of the same layout.

    model.safetensors             the weights, keys under ``model.net.``
    pretrained_model/model.pt     the same, keys under ``net.``
    pretrained_model/model.yaml   network, colour order, feature and input size
    config.json                   the same as ``conf``

They are read as data (utils/weights/cvlface.py); the code they come with is not even downloaded.
deploy/export_hub.py writes such folders, and ``upload`` puts them on the hub.
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
        from huggingface_hub import constants, snapshot_download, utils
    except ImportError as error:
        raise InputError(
            f"teacher: to fetch {repo_id} install huggingface_hub (pip install huggingface_hub), "
            f"{OTHERWISE}"
        ) from error
    cache = cache or constants.HF_HUB_CACHE
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
    except transfer_errors() as error:
        raise InputError(
            f"teacher: {repo_id} could not be fetched to {cache} ({first_line(error)}): try again, "
            f"{OTHERWISE}"
        ) from error


def transfer_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub lets through besides its own errors.

    Those of the disk, of its HTTP library (requests, httpx, httpx2: the base class of its own) and
    of its transfer library.
    """
    from huggingface_hub import errors, utils

    http_error = utils.HfHubHTTPError.__bases__[0]
    transfer_error = getattr(errors, "XetDownloadError", RuntimeError)
    return OSError, RuntimeError, http_error, transfer_error


def check_repository(repo_id: str) -> None:
    """Raise InputError if nothing can be pushed to a repository of this name.

    That is if it is not owner/name, or huggingface_hub is missing.
    """
    try:
        from huggingface_hub import utils
    except ImportError as error:
        raise InputError(
            "--push needs huggingface_hub: pip install huggingface_hub, or leave --push out"
        ) from error
    try:
        utils.validate_repo_id(repo_id)
    except utils.HFValidationError as error:
        raise InputError(f"--push {repo_id}: {first_line(error)}") from error
    if "/" not in repo_id:
        raise InputError(f"--push {repo_id}: name the repository with its owner, owner/name")


def upload(folder: Path, repo_id: str) -> str:
    """Push a folder of ``find_weights``'s layout in one commit; returns the address of the commit.

    The repository is made if there is none; what else pretrained_model/ holds there is deleted.
    HF_TOKEN, HF_ENDPOINT and a login count as everywhere.
    Raises InputError, whatever it is that keeps the files from the hub.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo_id, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=f"Upload {repo_id}",
            delete_patterns=["pretrained_model/*"],
        )
    # ValueError: the hub refuses the card, or answers otherwise than it should
    except (ValueError, *transfer_errors()) as error:
        # the hub's reasons are a line each
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"--push: {repo_id} did not take the files ({reason}); {folder} is whole: try again by "
            f"hf upload {repo_id} {folder}, with a token in HF_TOKEN that may write there"
        ) from error
    return commit.commit_url


def find_weights(folder: Path) -> Path:
    """The weights in a folder of CVLFace's layout. Raises InputError if there are none."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    runs = sorted(file.name for file in folder.glob("*backbone.pth"))
    mend = f"; name one of its files, {runs[-1]}" if runs else ""
    raise InputError(f"teacher: the folder {folder} has no {' and no '.join(WEIGHTS)}{mend}")
