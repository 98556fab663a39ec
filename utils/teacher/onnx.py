"""Any ONNX face model as a frozen network, run by onnxruntime (requirements/onnx.txt)."""

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from utils.errors import InputError, first_line
from utils.files import utf8_path
from utils.weights.kinds import bytes_look_like

CUDA = "CUDAExecutionProvider"
# nodes that leave the pixels' values alone
PASSING = ("Identity", "Cast", "Transpose", "Dropout")
FLOAT, UINT8 = 1, 2  # onnx.TensorProto's numbers
IMAGE = (3, 112, 112)
IMAGE_LAST = (112, 112, 3)  # with the channels last

log = logging.getLogger(__name__)


class Scale(NamedTuple):
    """What a graph takes where the other networks take x in [-1, 1]: x * factor + offset, told in
    words.
    """

    factor: float
    offset: float
    words: str


NORMALISED = Scale(1.0, 0.0, "(x / 255 - 0.5) / 0.5")
UNIT = Scale(0.5, 0.5, "x / 255, the graph does the rest")
BYTES = Scale(127.5, 127.5, "x as it is (0 to 255), the graph does the rest")


# deploy/export_onnx.py --uint8
PIXELS = Scale(127.5, 127.5, "x as it is (0 to 255, uint8), the graph does the rest")


class Form(NamedTuple):
    """What a graph takes and gives.

    batch: the number of images, 0 if any. layouts: of an image, those that its declared shape
    allows. takes_bytes: uint8. outputs: the names of those that may be features.
    """

    batch: int
    layouts: list[tuple[int, int, int]]
    takes_bytes: bool
    outputs: list[str]


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
    file missing, unreadable or of another form.
    """

    def __init__(self, path: str | Path, what: str = "teacher", color_space: str = "auto"):
        super().__init__()
        self.path = Path(path)
        self.what = what
        model = read_model(self.path, what)
        graph, self.about = model.graph, {entry.key: entry.value for entry in model.metadata_props}
        self.files = files_of(self.path, graph)
        self.parameter_count = sum(int(np.prod(tensor.dims)) for tensor in graph.initializer)
        said = self.about.get("color_space", "")
        self.own_color_space = said if said in ("RGB", "BGR") else "RGB"
        self.color_space = self.own_color_space if color_space == "auto" else color_space
        form = check_form(graph, self.path, what)
        self.batch = form.batch
        self.takes_bytes = form.takes_bytes
        self.scale = PIXELS if self.takes_bytes else input_scale(graph)
        self.device, self.session = torch.device("cpu"), self.open_session(torch.device("cpu"))
        self.input = self.session.get_inputs()[0].name
        self.layout, self.output, self.embedding_size = self.probe(form)
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
                "The model %s runs on the CPU: onnxruntime has no working CUDA provider "
                "here (pip install onnxruntime-gpu)",
                self.path,
            )
        return session

    def probe(self, form: Form) -> tuple[tuple[int, int, int], str, int]:
        """(the layout of an image, the output that is the features, D), by running the model once.

        It is run with two images, too, where it allows that.
        Raises InputError if it does not give a row of features for an image.
        """
        self.layout, shapes = self.first_that_runs(form)
        rows = {
            name: shape
            for name, shape in shapes.items()
            if len(shape) == 2 and shape[0] == 1 and (len(shapes) == 1 or shape[1] > 1)
        }
        if len(rows) != 1:
            given = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            wrong = "no (1, D) features" if not rows else "several outputs that may be the features"
            mend = "export it with the embedding" + (" alone" if rows else "")
            raise InputError(
                f"{self.what}: {self.path} gives {given} for one image: {wrong}; {mend}"
            )
        ((self.output, shape),) = rows.items()
        if self.batch != 1:
            try:
                if self.infer(self.to_graph(torch.zeros(2, *IMAGE))).shape != (2, shape[1]):
                    self.batch = 1
            except failures():  # converters often leave a fixed shape inside
                self.batch = 1
        return self.layout, self.output, shape[1]

    def first_that_runs(self, form: Form) -> tuple[tuple[int, int, int], dict[str, tuple]]:
        """The first layout that the graph computes with, and {output: shape} for one image."""
        for layout in form.layouts:
            self.layout = layout
            array = self.to_graph(torch.zeros(1, *IMAGE))
            try:
                values = self.session.run(form.outputs, {self.input: array})
            except failures() as error:
                reason = error
                continue
            return layout, {
                name: value.shape for name, value in zip(form.outputs, values, strict=True)
            }
        raise InputError(
            f"{self.what}: onnxruntime cannot run {self.path} ({first_line(reason, 200)})"
        ) from reason

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.device != self.device:
            self.device, self.session = images.device, self.open_session(images.device)
        array = self.to_graph(images)
        step = 1 if self.batch == 1 else max(len(array), 1)
        features = [self.infer(array[start : start + step]) for start in range(0, len(array), step)]
        features = (
            np.concatenate(features) if features else np.zeros((0, self.embedding_size), np.float32)
        )
        return torch.from_numpy(features).to(images.device)

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


def require_onnx(what: str):
    """The package onnx. Errors: InputError if it or onnxruntime is not installed."""
    try:
        import onnx
        import onnxruntime  # noqa: F401  missing is better told now
    except ImportError as error:
        raise InputError(
            f"{what}: ONNX models need onnxruntime and onnx: pip install -r "
            f"requirements/onnx.txt ({error})"
        ) from error
    return onnx


def read_model(path: Path, what: str = "teacher"):
    """The model without weights that it keeps in other files. Errors: as ``OnnxNetwork``."""
    onnx = require_onnx(what)
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise InputError(
            f"{what}: no file at {path.absolute()}"
            + (" (teacher=onnx:PATH)" if what == "teacher" else "")
        )
    look = bytes_look_like(path, "onnx")
    wrong = InputError(
        f"{what}: {path} is no ONNX model" + (f"; it looks like {look}" if look else "")
    )
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise wrong from error
    if not model.graph.node:
        raise wrong
    return model


def weight_files(path: Path, what: str = "teacher") -> list[Path]:
    """The model's file and those beside it in which it keeps weights.

    Errors: as ``OnnxNetwork``.
    """
    return files_of(path, read_model(path, what).graph)


def files_of(path: Path, graph) -> list[Path]:
    names = {
        entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return [path, *sorted(path.parent / name for name in names)]


def check_form(graph, path: Path, what: str) -> Form:
    """What a graph declares. Raises InputError unless it is one image tensor in, features out."""
    inputs = inputs_of(graph)
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs)
        raise InputError(
            f"{what}: {path} has {len(inputs)} inputs ({names}): a face network has one"
        )
    tensor = inputs[0].type.tensor_type
    shape = [dim.dim_value for dim in tensor.shape.dim]  # 0 where it is open
    known = {FLOAT: [IMAGE, IMAGE_LAST], UINT8: [IMAGE_LAST]}.get(tensor.elem_type, [])
    layouts = [layout for layout in known if len(shape) == 4 and allows(shape[1:], layout)]
    if not layouts:
        raise InputError(
            f"{what}: {path} takes {described(tensor)}, not (N, 3, 112, 112) or (N, 112, 112, 3) "
            "of "
            "float32, or (N, 112, 112, 3) of uint8"
        )
    if shape[0] > 1:
        raise InputError(
            f"{what}: {path} takes batches of {shape[0]} only: export it with an open "
            "batch, or one of 1"
        )
    outputs = [value.name for value in graph.output if may_be_features(value.type.tensor_type)]
    if not outputs:
        given = ", ".join(described(value.type.tensor_type) for value in graph.output)
        raise InputError(f"{what}: {path} gives {given}, not (N, D) features of float32")
    return Form(shape[0], layouts, tensor.elem_type == UINT8, outputs)


def allows(declared: list[int], layout: tuple[int, int, int]) -> bool:
    """Whether an image's declared sizes, 0 where they are open, are those of the layout."""
    return all(size in (0, needed) for size, needed in zip(declared, layout, strict=False))


def may_be_features(tensor) -> bool:
    """Whether an output's declared form is, or may be, (N, D) of float32."""
    return tensor.elem_type == FLOAT and (
        not tensor.HasField("shape") or len(tensor.shape.dim) == 2
    )


def inputs_of(graph) -> list:
    """The graph's inputs, without the weights, which older files list among them."""
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def described(tensor) -> str:
    from onnx import TensorProto

    return (
        f"({', '.join(str(dim.dim_value or dim.dim_param or '?') for dim in tensor.shape.dim)}) "
        f"of {TensorProto.DataType.Name(tensor.elem_type).lower()}"
    )


def input_scale(graph) -> Scale:
    """What the graph takes, by InsightFace's convention: one that first subtracts and multiplies
    takes 0 to 255, any other takes normalised pixels.

    Its constants tell more: the pixel that becomes zero is about 127.5 in a graph that takes 0 to
    255, 0.5 in one that takes 0 to 1.
    """
    factor, offset, kinds = 1.0, 0.0, set()
    for kind, constant in first_arithmetic(graph):
        kinds.add("Mul" if kind == "Div" else kind)
        if kind in ("Sub", "Add"):
            offset += constant if kind == "Add" else -constant
        else:
            by = constant if kind == "Mul" or not constant else 1 / constant
            factor, offset = factor * by, offset * by
    zero = -offset / factor if factor else 0.0
    if kinds >= {"Sub", "Mul"}:
        return UNIT if 0 < zero <= 1 else BYTES
    if kinds == {"Sub"} and 0 < zero <= 1:
        return UNIT
    # a factor of 1/255 or 1/128 alone scales bytes
    return BYTES if zero > 1 or 0 < abs(factor) < 0.02 else NORMALISED


def first_arithmetic(graph):
    """(operator, mean of its constant) of the nodes between the input and the first layer."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer if not tensor.external_data}
    constants |= {
        node.output[0]: attribute.t
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }
    value = inputs_of(graph)[0].name
    for node in graph.node:
        if value not in node.input or node.op_type == "Shape":
            continue
        if node.op_type not in PASSING:
            # where the pixels may stand
            places = (
                (0, 1)
                if node.op_type in ("Add", "Mul")
                else (0,)
                if node.op_type in ("Sub", "Div")
                else ()
            )
            place = list(node.input).index(value)
            if place not in places or node.input[1 - place] not in constants:
                if places:
                    log.warning(
                        "The ONNX graph begins with %s of something that cannot be read: "
                        "pixels are taken to be scaled to [-1, 1]; check with "
                        "train/teacher_report.py",
                        node.op_type,
                    )
                return
            yield (
                node.op_type,
                float(np.mean(numpy_helper.to_array(constants[node.input[1 - place]]))),
            )
        value = node.output[0]
