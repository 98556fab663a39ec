"""A network as an ONNX graph: traced by PyTorch, BatchNorm folded, described in its metadata.

Needs requirements/onnx.txt. PyTorch's tracer is asked for (``dynamo=False``): its other exporter
needs a package more and twenty times as long, and face networks have no control flow.
"""

import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn

from utils.files import printable
from utils.teacher.onnx_graph import require_onnx

# the newest that PyTorch's tracer writes; onnxruntime has read it since 1.17
OPSET = 20
# what phones' and boards' runtimes of 2019 and after read
OLDEST_OPSET = 11
INPUT, OUTPUT = "input", "embedding"
# onnx.TensorProto's numbers
FLOAT, FLOAT16 = 1, 10


class FromBytes(nn.Module):
    """(B, 112, 112, 3) uint8 RGB -> what the network gives for the normalised images."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images.float().permute(0, 3, 1, 2) / 127.5 - 1)


def to_onnx(network: nn.Module, uint8: bool = False, opset: int = OPSET):
    """The network in eval mode as an onnx.ModelProto with an open batch and without BatchNorm.

    network: (B, 3, 112, 112) RGB in [-1, 1] -> (B, D) float32.
    uint8: the graph takes (B, 112, 112, 3) uint8 instead and normalises inside.
    Raises InputError if requirements/onnx.txt is not installed.
    """
    onnx = require_onnx("deploy")
    sample = torch.zeros(2, 3, 112, 112)
    if uint8:
        network, sample = FromBytes(network), torch.zeros(2, 112, 112, 3, dtype=torch.uint8)
    network = network.eval().cpu()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        # why it is taken all the same: see above
        warnings.filterwarnings("ignore", ".*legacy TorchScript", DeprecationWarning)
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            network,
            (sample,),
            path,
            dynamo=False,
            opset_version=opset,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: "N"}, OUTPUT: {0: "N"}},
        )
        model = onnx.load(path)
    fold_batchnorm(model)
    return model


def operators(model) -> Counter:
    """How many nodes of each operator the graph has."""
    return Counter(node.op_type for node in model.graph.node)


def write_metadata(model, **about) -> None:
    """Write what a user of the file must know into its metadata, as text."""
    onnx = require_onnx("deploy")
    onnx.helper.set_model_props(model, {key: printable(str(value)) for key, value in about.items()})


# --- folding


def fold_batchnorm(model) -> None:
    """Fold every BatchNorm, y = a x + b for each channel, into the layer before or behind it.

    The tracer has done it for those right behind a convolution. What is left stands behind the last
    linear layer, before it (with a Flatten in between), or, in iResNet and IR, before a 3x3
    convolution: there a goes into the weights, and what b adds becomes a map behind the
    convolution, for zeros beyond the border are not shifted by b, so that edges and corners get
    less of it than the middle.
    """
    edit = GraphEdit(model)
    edit.drop_copies()
    edit.unify_linear()
    for node in [node for node in edit.nodes if node.op_type == "BatchNormalization"]:
        fold(edit, node)
        edit.bypass(node)
    edit.finish()


def fold(edit: "GraphEdit", node) -> None:
    before, behind = edit.producer(node.input[0]), edit.consumer(node.output[0])
    a, b = edit.affine(node)
    kind_before = before.op_type if before else None
    kind_behind = behind.op_type if behind else None
    if kind_before in ("Conv", "Gemm") and edit.consumer(before.output[0]) is node:
        edit.scale_outputs(before, a, b)
        return
    if kind_behind == "Flatten":
        linear = edit.consumer(behind.output[0])
        if linear.op_type == "Gemm":
            edit.scale_inputs(linear, a, b)
            return
    if kind_behind == "Conv" and is_3x3(behind):
        edit.scale_and_shift_inputs(behind, a, b)
        return
    raise NotImplementedError(f"a BatchNorm ({node.name}) between {kind_before} and {kind_behind}")


def is_3x3(conv) -> bool:
    """Whether a convolution is 3x3 with a zero border of 1, stride 1 and one group.

    Our networks have no other kind behind a BatchNorm.
    """
    options = {attribute.name: list(attribute.ints) or attribute.i for attribute in conv.attribute}
    expected = dict(kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1], group=1)
    return all(options.get(name, 1) == value for name, value in expected.items())


class GraphEdit:
    """A model's nodes and weights while they are changed; ``finish`` puts them back."""

    def __init__(self, model):
        self.onnx = require_onnx("deploy")
        self.model = model
        self.nodes = list(model.graph.node)
        self.sizes = sizes_of(model)
        self.weights = {
            tensor.name: self.onnx.numpy_helper.to_array(tensor)
            for tensor in model.graph.initializer
        }
        # half a gigabyte in iresnet200, which whatever handles the model would copy
        del model.graph.initializer[:]

    def producer(self, value: str):
        return next((node for node in self.nodes if value in node.output), None)

    def consumer(self, value: str):
        """The only node that reads the value; None if there are several or none."""
        readers = [node for node in self.nodes if value in node.input]
        return readers[0] if len(readers) == 1 else None

    def drop_copies(self) -> None:
        """Remove nodes that only rename or hold a weight.

        Identity, which the tracer puts where weights are equal, and casts of features to the
        float32 that they are only rename.
        """
        for node in list(self.nodes):
            if node.op_type == "Constant":
                self.weights[node.output[0]] = self.onnx.numpy_helper.to_array(node.attribute[0].t)
                self.nodes.remove(node)
                continue
            is_cast = node.op_type == "Cast" and self.producer(node.input[0]) is not None
            if node.op_type != "Identity" and not is_cast:
                continue
            if node.input[0] in self.weights:
                self.weights[node.output[0]] = self.weights[node.input[0]]
                self.nodes.remove(node)
            else:
                self.bypass(node)

    def unify_linear(self) -> None:
        """Make a MatMul with weights a Gemm as the others are: weights (outputs, inputs).

        The tracer makes one of a linear layer without bias.
        """
        for node in self.nodes:
            if node.op_type == "MatMul" and node.input[1] in self.weights:
                name = f"{node.output[0]}_transposed"
                self.weights[name] = np.ascontiguousarray(self.weights[node.input[1]].T)
                node.CopyFrom(
                    self.onnx.helper.make_node(
                        "Gemm", [node.input[0], name], list(node.output), node.name, transB=1
                    )
                )

    def bypass(self, node) -> None:
        """Remove a node of one input: who reads its output reads its input.

        The graph's output keeps its name.
        """
        self.nodes.remove(node)
        source, gone = node.input[0], node.output[0]
        if gone == OUTPUT:
            producer = self.producer(source)
            producer.output[list(producer.output).index(source)] = gone
            source, gone = gone, source
        for other in self.nodes:
            other.input[:] = [source if value == gone else value for value in other.input]

    def affine(self, node) -> tuple[np.ndarray, np.ndarray]:
        """a and b of a BatchNorm, (C,) float64."""
        weight, bias, mean, variance = (
            self.weights[name].astype(np.float64) for name in node.input[1:5]
        )
        options = {attribute.name: attribute.f for attribute in node.attribute}
        epsilon = options.get("epsilon", 1e-5)
        a = weight / np.sqrt(variance + epsilon)
        return a, bias - mean * a

    def scale_outputs(self, layer, a: np.ndarray, b: np.ndarray) -> None:
        """layer(x) becomes a layer(x) + b."""
        weight, bias = self.parameters(layer)
        self.replace(layer, weight * a.reshape(-1, *[1] * (weight.ndim - 1)), bias * a + b)

    def scale_inputs(self, linear, a: np.ndarray, b: np.ndarray) -> None:
        """linear(flat x) becomes linear(flat(a x + b))."""
        weight, bias = self.parameters(linear)
        pixels = weight.shape[1] // len(a)
        self.replace(linear, weight * np.repeat(a, pixels), bias + weight @ np.repeat(b, pixels))

    def scale_and_shift_inputs(self, conv, a: np.ndarray, b: np.ndarray) -> None:
        """conv(x) becomes conv(a x + b), with zeros around a x + b.

        It is conv'(x) + the map that the constant image b gives. The map has three kinds of rows
        and of columns, so it is kept as 3x3 and spread by two Gathers, which onnxruntime does once,
        when it loads the model.
        """
        weight, bias = self.parameters(conv)
        self.replace(conv, weight * a[None, :, None, None], bias)
        image = torch.from_numpy(np.broadcast_to(b[None, :, None, None], (1, len(b), 3, 3)).copy())
        corners = nn.functional.conv2d(image, torch.from_numpy(weight), padding=1).numpy()
        value = conv.output[0]
        plain, small, rows, columns, tall, wide = (
            f"{value}_{part}" for part in ("plain", "map", "rows", "columns", "tall", "wide")
        )
        height, width = self.sizes[value]
        self.weights[small] = corners.astype(np.float32)
        self.weights[rows] = spread(height)
        self.weights[columns] = spread(width)
        conv.output[0] = plain
        node = self.onnx.helper.make_node
        place = self.nodes.index(conv) + 1
        self.nodes[place:place] = [
            node("Gather", [small, rows], [tall], axis=2),
            node("Gather", [tall, columns], [wide], axis=3),
            node("Add", [plain, wide], [value]),
        ]

    def parameters(self, layer) -> tuple[np.ndarray, np.ndarray]:
        """(weight, bias) in float64, outputs first; zeros where a layer has no bias."""
        if layer.op_type == "Gemm" and not any(
            attribute.name == "transB" and attribute.i for attribute in layer.attribute
        ):
            raise NotImplementedError(f"{layer.name}: a Gemm whose weights are (inputs, outputs)")
        weight = self.weights[layer.input[1]].astype(np.float64)
        if len(layer.input) == 2:
            return weight, np.zeros(len(weight))
        return weight, self.weights[layer.input[2]].astype(np.float64)

    def replace(self, layer, weight: np.ndarray, bias: np.ndarray) -> None:
        """Give a layer weights of its own: the tracer lets layers share those that are equal."""
        names = [f"{layer.output[0]}_weight", f"{layer.output[0]}_bias"]
        for name, value in zip(names, (weight, bias), strict=True):
            self.weights[name] = value.astype(np.float32)
        layer.input[1:] = names

    def finish(self) -> None:
        """Put the nodes and the weights that are still used back into the model."""
        used = {name for node in self.nodes for name in node.input}
        graph = self.model.graph
        del graph.node[:], graph.value_info[:], graph.initializer[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(
            self.onnx.numpy_helper.from_array(value, name)
            for name, value in self.weights.items()
            if name in used
        )


def sizes_of(model) -> dict[str, list[int]]:
    """{value: [height, width]} of all feature maps, inferred without the weights themselves."""
    onnx = require_onnx("deploy")
    weights = [
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in model.graph.initializer
    ]
    graph = onnx.helper.make_graph(
        model.graph.node, "sizes", [*model.graph.input, *weights], model.graph.output
    )
    inferred = onnx.shape_inference.infer_shapes(
        onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    )
    return {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim][2:]
        for value in inferred.graph.value_info
    }


def spread(size: int) -> np.ndarray:
    """Which of first, middle, last each row or column is: 0, 1, 1, ..., 2."""
    return np.array([0] + [1] * (size - 2) + [2], np.int64)


# --- half precision


def to_fp16(model):
    """A copy that computes with float16 weights and features; input and output stay as they are.

    A weight too large for float16 becomes infinite there, and so does what is computed from it: the
    check against PyTorch shows it.
    """
    onnx = require_onnx("deploy")
    half = onnx.ModelProto()
    half.CopyFrom(model)
    graph = half.graph
    for tensor in graph.initializer:
        if tensor.data_type == FLOAT:
            with np.errstate(over="ignore"):
                values = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for node in graph.node:
        node.input[:] = [f"{INPUT}_half" if value == INPUT else value for value in node.input]
        node.output[:] = [f"{OUTPUT}_half" if value == OUTPUT else value for value in node.output]
    casts = [node for node in graph.node if node.op_type == "Cast"]
    if casts:
        # uint8 pixels: the cast that is there gives float16 instead
        casts[0].attribute[0].i, casts[0].input[0] = FLOAT16, INPUT
    else:
        graph.node.insert(0, onnx.helper.make_node("Cast", [INPUT], [f"{INPUT}_half"], to=FLOAT16))
    graph.node.append(onnx.helper.make_node("Cast", [f"{OUTPUT}_half"], [OUTPUT], to=FLOAT))
    return half
