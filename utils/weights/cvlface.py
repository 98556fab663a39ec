"""What CVLFace's configuration says of the weights beside it; read as data, never run."""

import json
import logging
from pathlib import Path
from typing import NamedTuple

from utils.errors import InputError, first_line

# the first that is there counts: model.yaml is what CVLFace's own loader goes by, config.json has
# the same as ``conf`` for transformers
CONFIGURATIONS = ("pretrained_model/model.yaml", "config.json")
KEYS = ("name", "color_space", "input_size", "output_dim")
# the depths that CVLFace itself has in both families of IR networks
OWN_DEPTHS = ("ir18", "ir50", "ir101")
INSIGHTFACE = {
    "ir18": "iresnet18",
    "ir34": "iresnet34",
    "ir50": "iresnet50",
    "ir101": "iresnet100",
    "ir200": "iresnet200",
}
# {family: {name in CVLFace's configuration: our full name of the network}}; the family
# mobilefacenet and the other depths are ours, in CVLFace's manner
NETWORKS = {
    "iresnet": {name: name for name in OWN_DEPTHS},
    "iresnet_insightface": INSIGHTFACE
    | {f"{name}_se": f"{network}_se" for name, network in INSIGHTFACE.items()},
    "mobilefacenet": {name: name for name in ("mobilefacenet", "mbf", "mbf_large")},
}

log = logging.getLogger(__name__)


class PublishedConfig(NamedTuple):
    """What a configuration states. network: our full name, as ``config.teacher`` has it.

    color_space: "RGB" or "BGR".
    """

    network: str
    embedding_size: int
    color_space: str
    path: Path


def read_configuration(folder: Path, what: str = "teacher") -> PublishedConfig | None:
    """The configuration in a folder of CVLFace's layout; None if there is none.

    what: the weights are wanted for, the first word of messages.
    Raises InputError if it is unreadable, incomplete, or of a network that cannot be built here.
    """
    files = [folder / name for name in CONFIGURATIONS if (folder / name).is_file()]
    configs = [config for file in files if (config := read_config_file(file, what))]
    if len(configs) == 2 and configs[0][:3] != configs[1][:3]:
        log.warning(
            "%s states %s, %s %s: the former counts, as for CVLFace itself",
            configs[0].path,
            configs[0][:3],
            configs[1].path.name,
            configs[1][:3],
        )
    return configs[0] if configs else None


def read_config_file(path: Path, what: str) -> PublishedConfig | None:
    """One configuration file; None for a config.json that is not CVLFace's."""
    try:
        content = parse(path.read_text(encoding="utf-8-sig"), path, what)
    # ValueError: of the syntax or of the encoding
    except (ValueError, OSError) as error:
        raise InputError(f"{what}: {path} is unreadable ({first_line(error)})") from error
    if path.suffix == ".json":
        content = content.get("conf") if isinstance(content, dict) else content
        if content is None:
            return None
    if not isinstance(content, dict) or any(key not in content for key in KEYS):
        raise InputError(
            f"{what}: {path} does not state {', '.join(KEYS)}: it is not a configuration of "
            "CVLFace's"
        )
    states = f"{what}: {path} states"
    if content["input_size"] != [3, 112, 112]:
        raise InputError(
            f"{states} input_size {content['input_size']}, but images here are [3, 112, 112]"
        )
    if content["color_space"] not in ("RGB", "BGR"):
        raise InputError(
            f"{states} color_space {content['color_space']!r}, which is neither RGB nor BGR"
        )
    if type(content["output_dim"]) is not int:
        raise InputError(
            f"{states} output_dim {content['output_dim']!r}, which is no number of dimensions"
        )
    network = network_of(content, states)
    return PublishedConfig(network, content["output_dim"], content["color_space"], path)


def parse(text: str, path: Path, what: str):
    """The content of a .json or .yaml file. Raises ValueError for another syntax."""
    if path.suffix == ".json":
        return json.loads(text)
    yaml = require_yaml(f"{what}: {path}")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(first_line(error)) from error


def require_yaml(subject: str):
    """PyYAML, which only those need who read or write a repository.

    subject: what needs it, the first words of the message. Raises InputError if it is missing.
    """
    try:
        import yaml
    except ImportError as error:
        raise InputError(
            f"{subject} needs PyYAML: pip install -r requirements/requirement.txt"
        ) from error
    return yaml


def network_of(content: dict, states: str) -> str:
    """Our full name of the network.

    ``yaml_path`` (models/iresnet/configs/v1_ir50.yaml) tells its family, ``name`` its depth.
    """
    parts = Path(str(content.get("yaml_path") or "")).parts
    family = parts[-3] if len(parts) > 2 else "iresnet"
    name = NETWORKS.get(family, {}).get(str(content["name"]))
    if name is None:
        raise InputError(
            f"{states} the network {family} {content['name']}, which cannot be built here (only "
            f"{', '.join(name for names in NETWORKS.values() for name in names.values())}): export "
            "it to ONNX and set teacher=onnx:PATH"
        )
    return name


def published_as(network: str, embedding_size: int) -> dict:
    """The configuration of one of our networks for RGB images: what ``read_configuration`` reads.

    network: our full name of it.
    """
    family, name = next(
        (family, name)
        for family, names in NETWORKS.items()
        for name, known in names.items()
        if known == network
    )
    return {
        "color_space": "RGB",
        "freeze": False,
        "input_size": [3, 112, 112],
        "name": name,
        "output_dim": embedding_size,
        "start_from": "",
        "yaml_path": f"models/{family}/configs/v1_{name}.yaml",
    }
