"""A set of drawn faces and a teacher that tells them apart, for the tests of its features."""

import pytest
import torch

from backbones import build_backbone
from data.make_synthetic import open_studio, write_training_set
from utils.dataset.records import MXFaceDataset
from utils.inputs import to_input

CLASSES, IMAGES, SIZE = 6, 24, 32


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """24 images of 6 people."""
    root = tmp_path_factory.mktemp("faces")
    with open_studio(1, 3, 1.0) as studio:
        write_training_set(root, studio, CLASSES, IMAGES // CLASSES)
    return root


@pytest.fixture(scope="module")
def teacher(faces, tmp_path_factory):
    """A network of drawn weights whose normalisation knows these images, so that its features tell
    them apart, and each from its mirror image.
    """
    torch.manual_seed(0)
    network = build_backbone("mobilefacenet", SIZE).train()
    for layer in network.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.kaiming_normal_(layer.weight)
        if hasattr(layer, "momentum"):
            layer.momentum = None  # the mean over all batches
    with torch.no_grad():
        network(to_input(MXFaceDataset(faces).__getitems__(range(IMAGES)).images))
    path = tmp_path_factory.mktemp("teacher") / "backbone.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def dataset(faces):
    return MXFaceDataset(faces)
