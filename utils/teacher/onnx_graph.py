"""What an ONNX face model declares: its input, its outputs, the pixels it takes, its files."""

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import InputError
from utils.weights.kinds import bytes_look_like
from utils.weights.read import advice

# nodes that leave the pixels' values alone
PASSING = ("Identity", "Cast", "Transpose", "Dropout")
# which inputs of the arithmetic that normalises may be the pixels
PIXEL_PLACES = {"Add": (0, 1), "Mul": (0, 1), "Sub": (0,), "Div": (0,)}
# onnx.TensorProto's numbers
FLOAT, UINT8 = 1, 2
IMAGE = (3, 112, 112)
# with the channels last
IMAGE_LAST = (112, 112, 3)

log = logging.getLogger(__name__)


class Scale(NamedTuple):
    """What a graph takes where the other networks take x in [-1, 1]: x * factor + offset."""

    factor: float
    offset: float
    description: str


NORMALISED = Scale(1.0, 0.0, "(x / 255 - 0.5) / 0.5")
UNIT = Scale(0.5, 0.5, "x / 255, the graph does the rest")
BYTES = Scale(127.5, 127.5, "x as it is (0 to 255), the graph does the rest")
# deploy/export_onnx.py --uint8
PIXELS = Scale(127.5, 127.5, "x as it is (0 to 255, uint8), the graph does the rest")


class Signature(NamedTuple):
    """What a graph takes and gives.

    batch: the number of images, 0 if any. layouts: of an image, those that its declared shape
    allows. takes_bytes: uint8. outputs: the names of those that may be features.
    """

    batch: int
    layouts: list[tuple[int, int, int]]
    takes_bytes: bool
    outputs: list[str]


def require_onnx(what: str):
    """The package onnx. Raises InputError if it or onnxruntime is not installed."""
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{what}: ONNX models need onnxruntime and onnx: pip install -r "
            f"requirements/onnx.txt ({error})"
        ) from error
    return onnx


def read_model(path: Path, what: str = "teacher"):
    """The model without weights that it keeps in other files.

    Raises InputError if it is missing or none.
    """
    onnx = require_onnx(what)
    from google.protobuf.message import DecodeError

    if not path.is_file():
        setting = " (teacher=onnx:PATH)" if what == "teacher" else ""
        raise InputError(f"{what}: no file at {path.absolute()}{setting}")
    hint = advice(bytes_look_like(path, "onnx"))
    wrong = InputError(f"{what}: {path} is no ONNX model{hint}")
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise wrong from error
    if not model.graph.node:
        raise wrong
    return model


def weight_files(path: Path, what: str = "teacher") -> list[Path]:
    """The model's file and those beside it in which it keeps weights.

    Raises InputError as ``read_model``.
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


def signature_of(graph, path: Path, what: str) -> Signature:
    """What a graph declares. Raises InputError unless it is one image tensor in, features out."""
    subject = f"{what}: {path}"
    inputs = inputs_of(graph)
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs)
        raise InputError(f"{subject} has {len(inputs)} inputs ({names}): a face network has one")
    tensor = inputs[0].type.tensor_type
    # 0 where it is open
    shape = [dim.dim_value for dim in tensor.shape.dim]
    known = {FLOAT: [IMAGE, IMAGE_LAST], UINT8: [IMAGE_LAST]}.get(tensor.elem_type, [])
    layouts = [layout for layout in known if len(shape) == 4 and allows(shape[1:], layout)]
    if not layouts:
        raise InputError(
            f"{subject} takes {described(tensor)}, not (N, 3, 112, 112) or (N, 112, 112, 3) of "
            "float32, or (N, 112, 112, 3) of uint8"
        )
    if shape[0] > 1:
        raise InputError(
            f"{subject} takes batches of {shape[0]} only: export it with an open batch, or one of 1"
        )
    outputs = [value.name for value in graph.output if may_be_features(value.type.tensor_type)]
    if not outputs:
        given = ", ".join(described(value.type.tensor_type) for value in graph.output)
        raise InputError(f"{subject} gives {given}, not (N, D) features of float32")
    return Signature(shape[0], layouts, tensor.elem_type == UINT8, outputs)


def allows(declared: list[int], layout: tuple[int, int, int]) -> bool:
    """Whether an image's declared sizes, 0 where they are open, are those of the layout."""
    return all(size in (0, needed) for size, needed in zip(declared, layout, strict=False))


def may_be_features(tensor) -> bool:
    """Whether an output's declared form is, or may be, (N, D) of float32."""
    is_row = not tensor.HasField("shape") or len(tensor.shape.dim) == 2
    return tensor.elem_type == FLOAT and is_row


def inputs_of(graph) -> list:
    """The graph's inputs, without the weights, which older files list among them."""
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def described(tensor) -> str:
    """Shape and type in words, as "(N, 512) of float"."""
    from onnx import TensorProto

    sizes = ", ".join(str(dim.dim_value or dim.dim_param or "?") for dim in tensor.shape.dim)
    return f"({sizes}) of {TensorProto.DataType.Name(tensor.elem_type).lower()}"


def input_scale(graph) -> Scale:
    """What the graph takes, by InsightFace's convention.

    One that first subtracts and multiplies takes 0 to 255, any other takes normalised pixels. Its
    constants tell more: the pixel that becomes zero is about 127.5 in a graph that takes 0 to
    255, 0.5 in one that takes 0 to 1.
    """
    factor, offset, kinds = 1.0, 0.0, set()
    for kind, constant in first_arithmetic(graph):
        kinds.add("Mul" if kind == "Div" else kind)
        if kind == "Add":
            offset += constant
        elif kind == "Sub":
            offset -= constant
        else:
            by = 1 / constant if kind == "Div" and constant else constant
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

    constants = constants_of(graph)
    value = inputs_of(graph)[0].name
    for node in graph.node:
        if value not in node.input or node.op_type == "Shape":
            continue
        if node.op_type not in PASSING:
            if node.op_type not in PIXEL_PLACES:
                return
            place = list(node.input).index(value)
            constant = constants.get(node.input[1 - place])
            if place not in PIXEL_PLACES[node.op_type] or constant is None:
                log.warning(
                    f"The ONNX graph begins with {node.op_type} of something that cannot be read: "
                    "pixels are taken to be scaled to [-1, 1]; check with train/teacher_report.py"
                )
                return
            yield node.op_type, float(np.mean(numpy_helper.to_array(constant)))
        value = node.output[0]


def constants_of(graph) -> dict:
    """{name: tensor} of the weights in the model's own file and of its Constant nodes."""
    constants = {tensor.name: tensor for tensor in graph.initializer if not tensor.external_data}
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                constants[node.output[0]] = attribute.t
    return constants
