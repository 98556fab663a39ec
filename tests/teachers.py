"""Teachers made for the tests: small networks of ours in the form that others publish theirs."""

import json
from pathlib import Path

import pytest
import torch
from easydict import EasyDict
from safetensors.torch import save_file

from backbones import build_backbone
from utils.errors import InputError
from utils.teacher.load import load_teacher

ROOT = Path(__file__).resolve().parents[1]
SIZE = 16
IMAGES = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1


def network(name="ir18", size=SIZE, seed=0, **options):
    torch.manual_seed(seed)
    return build_backbone(name, size, **options).eval()


def config(teacher="ir18", path="", **others) -> EasyDict:
    return EasyDict(
        {
            "teacher": teacher,
            "pretrained_teacher_path": str(path),
            "teacher_repo_id": "",
            "teacher_cache": "",
            "color_space": "auto",
        }
        | others
    )


def prefixed(weights, prefix, **others):
    return {prefix + key: value for key, value in weights.items()} | others


def save(content, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in content.items()}, path)
    else:
        torch.save(content, path)
    return path


STATED = {
    "color_space": "RGB",
    "freeze": False,
    "input_size": [3, 112, 112],
    "name": "ir18",
    "output_dim": SIZE,
    "start_from": "",
    "yaml_path": "models/iresnet/configs/v1_ir18.yaml",
}


def repository(
    folder: Path,
    weights,
    file="model.safetensors",
    yaml: dict | None = STATED,
    conf: dict | None = STATED,
) -> Path:
    """A repository as CVLFace publishes them; its code would end the process."""
    save(prefixed(weights, "net." if file.endswith(".pt") else "model.net."), folder / file)
    (folder / "pretrained_model").mkdir(exist_ok=True)
    if yaml is not None:
        (folder / "pretrained_model" / "model.yaml").write_text(
            "".join(f"{key}: {json.dumps(value)}\n" for key, value in yaml.items())
        )
    if conf is not None:
        content = {
            "architectures": ["CVLFaceRecognitionModel"],
            "auto_map": {"AutoModel": "wrapper.CVLFaceRecognitionModel"},
            "conf": conf,
        }
        (folder / "config.json").write_text(json.dumps(content | {"torch_dtype": "float32"}))
    (folder / "wrapper.py").write_text("raise SystemExit('code of the repository was run')\n")
    return folder


def refused(message: str, cfg: EasyDict, size: int | None = None) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_teacher(cfg, size)
    assert "\n" not in str(caught.value)
