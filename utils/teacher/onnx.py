"""Any ONNX face model as a frozen network, run by onnxruntime (requirements/onnx.txt)."""

import logging
from pathlib import Path

import numpy as np
import torch
from torch import nn

from utils.errors import InputError, first_line
from utils.files import utf8_path
from utils.teacher.onnx_graph import (
    IMAGE,
    IMAGE_LAST,
    PIXELS,
    Signature,
    files_of,
    input_scale,
    read_model,
    signature_of,
)

CUDA = "CUDAExecutionProvider"

log = logging.getLogger(__name__)


class OnnxNetwork(nn.Module):
    """(B, 3, 112, 112) RGB float32 in [-1, 1] -> (B, D) float32 on the same device.

    A model that takes (B, 112, 112, 3) gets the channels last; one that takes uint8 gets the pixels
    that the images were made of. Of several outputs the one that is (B, D) with D > 1 is taken. A
    model whose batch is 1, whether it says so or only behaves so, is run image by image. It has no
    parameters that ``to`` could move: the session is made for the device of the images. With
    onnxruntime's CUDA provider it runs on a GPU, otherwise on the CPU, with a warning.

    what: what the file was wanted for, the first word of messages. color_space: what the graph
    takes, "auto": as its metadata say, else RGB; one that takes BGR gets the channels exchanged.
    scale: see ``Scale``. embedding_size: D. parameter_count: of the graph. files: the model, and
    those in which it keeps its weights. choice: which output was taken, "" if it has but one.
    about: what the file says of itself, {key: text}; deploy/export_onnx.py writes network, step,
    checkpoint_sha256 and more. Raises InputError if onnxruntime or onnx is not installed, or the
    file missing, unreadable or of another signature.
    """

    def __init__(self, path: str | Path, what: str = "teacher", color_space: str = "auto"):
        super().__init__()
        self.path = Path(path)
        self.what = what
        model = read_model(self.path, what)
        graph = model.graph
        self.about = {entry.key: entry.value for entry in model.metadata_props}
        self.files = files_of(self.path, graph)
        self.parameter_count = sum(int(np.prod(tensor.dims)) for tensor in graph.initializer)
        self.own_color_space = "BGR" if self.about.get("color_space") == "BGR" else "RGB"
        self.color_space = self.own_color_space if color_space == "auto" else color_space
        signature = signature_of(graph, self.path, what)
        self.batch = signature.batch
        self.takes_bytes = signature.takes_bytes
        self.scale = PIXELS if self.takes_bytes else input_scale(graph)
        self.device = torch.device("cpu")
        self.session = self.open_session(self.device)
        self.input = self.session.get_inputs()[0].name
        self.layout, self.output, self.embedding_size = self.probe(signature)
        outputs = [value.name for value in graph.output]
        self.choice = ""
        if len(outputs) > 1:
            self.choice = f"output {self.output} of {', '.join(outputs)}"
            log.info("%s: the features are its %s", self.path, self.choice)
        # here, for it takes a second to import what only teachers of this kind need
        self.forward = torch.compiler.disable(self.forward)

    def open_session(self, device: torch.device):
        """onnxruntime's session on a device, as far as it has the provider for it."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # errors: its warnings tell of shapes that are checked here
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        providers = ["CPUExecutionProvider"]
        if device.type == "cuda" and CUDA in onnxruntime.get_available_providers():
            providers.insert(0, (CUDA, {"device_id": device.index or 0}))
        try:
            session = onnxruntime.InferenceSession(
                utf8_path(self.path), options, providers=providers
            )
        except failures() as error:
            raise InputError(
                f"{self.what}: onnxruntime cannot run {self.path} ({first_line(error, 200)})"
            ) from error
        if device.type == "cuda" and CUDA not in session.get_providers():
            log.warning(
                f"The model {self.path} runs on the CPU: onnxruntime has no working CUDA provider "
                "here (pip install onnxruntime-gpu)"
            )
        return session

    def probe(self, signature: Signature) -> tuple[tuple[int, int, int], str, int]:
        """(the layout of an image, the output that is the features, D), by running the model once.

        It is run with two images, too, where it allows that.
        Raises InputError if it does not give a row of features for an image.
        """
        self.layout, shapes = self.first_that_runs(signature)
        rows = {
            name: shape
            for name, shape in shapes.items()
            if len(shape) == 2 and shape[0] == 1 and (len(shapes) == 1 or shape[1] > 1)
        }
        if len(rows) != 1:
            given = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            reason = "no (1, D) features; export it with the embedding"
            if rows:
                reason = (
                    "several outputs that may be the features; export it with the embedding alone"
                )
            raise InputError(f"{self.what}: {self.path} gives {given} for one image: {reason}")
        ((self.output, shape),) = rows.items()
        if self.batch != 1:
            try:
                if self.infer(self.to_graph(torch.zeros(2, *IMAGE))).shape != (2, shape[1]):
                    self.batch = 1
            except failures():
                # converters often leave a fixed shape inside
                self.batch = 1
        return self.layout, self.output, shape[1]

    def first_that_runs(
        self, signature: Signature
    ) -> tuple[tuple[int, int, int], dict[str, tuple]]:
        """The layout that the graph computes with, and {output: shape} for one image.

        Of several that run, the first that gives a row for the image: older versions of
        onnxruntime compute with empty maps where newer ones refuse the wrong layout.
        """
        ran, reason = [], None
        for layout in signature.layouts:
            self.layout = layout
            array = self.to_graph(torch.zeros(1, *IMAGE))
            try:
                values = self.session.run(signature.outputs, {self.input: array})
            except failures() as error:
                reason = error
                continue
            shapes = [value.shape for value in values]
            ran.append((layout, dict(zip(signature.outputs, shapes, strict=True))))
            if any(shape[:1] == (1,) for shape in shapes):
                return ran[-1]
        if not ran:
            raise InputError(
                f"{self.what}: onnxruntime cannot run {self.path} ({first_line(reason, 200)})"
            ) from reason
        return ran[0]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.device != self.device:
            self.device, self.session = images.device, self.open_session(images.device)
        array = self.to_graph(images)
        step = 1 if self.batch == 1 else max(len(array), 1)
        features = [np.zeros((0, self.embedding_size), np.float32)]
        features += [self.infer(array[at : at + step]) for at in range(0, len(array), step)]
        return torch.from_numpy(np.concatenate(features)).to(images.device)

    def to_graph(self, images: torch.Tensor) -> np.ndarray:
        """Images in [-1, 1] as the graph takes them."""
        images = images.detach().float()
        if self.color_space == "BGR":
            images = images.flip(1)
        scaled = images * self.scale.factor + self.scale.offset
        if self.takes_bytes:
            scaled = scaled.round().clamp(0, 255).to(torch.uint8)
        if self.layout == IMAGE_LAST:
            scaled = scaled.permute(0, 2, 3, 1)
        return scaled.cpu().contiguous().numpy()

    def infer(self, array: np.ndarray) -> np.ndarray:
        return self.session.run([self.output], {self.input: array})[0]


def failures() -> tuple:
    """onnxruntime's exceptions, which have no base class of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return tuple(
        value
        for value in vars(state).values()
        if isinstance(value, type) and issubclass(value, Exception)
    )
