"""ViT teachers: refused with the way out, and the way tried as docs/teachers.md says it."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from config.load import DEFAULTS, load_config
from tests import rounding
from tests.commands import ROOT
from tests.teachers import IMAGES, config, refused, repository, save
from utils.errors import InputError
from utils.teacher.load import load_teacher
from utils.weights.load import read_weights, recognise

WIDTH, SIZE = 32, 24
WAY_OUT = r"export it to ONNX and set teacher=onnx:PATH \(docs/teachers.md\)$"


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        batch, tokens, _ = x.shape
        heads = self.qkv(x).reshape(batch, tokens, 3, 4, WIDTH // 4).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(*heads.unbind(0))
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, WIDTH))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(nn.functional.gelu(self.norm2(x)))


class Patches(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, WIDTH, 28, 28)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """Key names of the published ones: patch_embed, pos_embed, blocks, feature."""

    def __init__(self):
        super().__init__()
        self.patch_embed = Patches()
        self.pos_embed = nn.Parameter(torch.randn(1, 16, WIDTH))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(WIDTH)
        self.feature = nn.Sequential(nn.Linear(16 * WIDTH, SIZE), nn.BatchNorm1d(SIZE))

    def forward(self, x):
        x = self.patch_embed(x) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.feature(self.norm(x).flatten(1))


@pytest.fixture(scope="module")
def vit():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ViT().eval()


@pytest.mark.parametrize("prefix, teacher", [("", "iresnet50"), ("net.", "ir50")])
def test_weights_of_a_vit_are_refused_with_the_way_out(vit, prefix, teacher, tmp_path):
    weights = {prefix + key: value for key, value in vit.state_dict().items()}
    path = save(weights, tmp_path / "vit.pt")
    refused(f"it looks like a vision transformer, .*: {WAY_OUT}", config(teacher, path))
    with pytest.raises(InputError, match="a vision transformer, which cannot be built here"):
        recognise(read_weights(path, "checkpoint"))


def test_repositories_and_names_of_a_vit_are_refused_with_the_way_out(tmp_path):
    stated = {
        "name": "base",
        "yaml_path": "models/vit/configs/v1_base.yaml",
        "color_space": "RGB",
        "input_size": [3, 112, 112],
        "output_dim": 512,
    }
    refused(
        f"states the network vit base, which cannot be built here .*: {WAY_OUT}",
        config("cvlface_ir50", repository(tmp_path, {}, yaml=stated)),
    )
    with pytest.raises(
        InputError, match=r"'vit_base' is unknown.* onnx:PATH: a ViT, .*teachers.md"
    ):
        load_config(DEFAULTS, ["teacher=vit_base"])


def test_the_recipe_of_the_page_makes_a_teacher_of_it(vit, tmp_path, monkeypatch):
    """Sums of up to 28 * 28 * 3 numbers in some 12 layers, in another order."""
    pytest.importorskip("onnxruntime", reason="requirements/onnx.txt")
    page = (ROOT / "docs" / "teachers.md").read_text()
    (recipe,) = re.findall(r"^### ViT\n.*?^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    exec(recipe, {"network": vit})
    teacher = load_teacher(config(f"onnx:{tmp_path / 'vit.onnx'}"), SIZE)
    with torch.no_grad():
        expected = vit(IMAGES).numpy()
    bound = 2 * rounding.network(12, 3 * 28 * 28) * np.abs(expected).max()
    np.testing.assert_allclose(teacher(IMAGES).numpy(), expected, rtol=0, atol=bound)
