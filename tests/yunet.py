"""A face detector of YuNet's form for the tests: real inputs and outputs, real post-processing by
OpenCV, but it finds a pure blue square instead of a face.

A square of 8x8 pixels on the grid of 8 counts as a face whose five points lie around it as POINTS
says. Needs onnx.
"""

from pathlib import Path

import cv2
import numpy as np

from utils.align import TEMPLATE

CELL = 8
ZOOM = 2.0
# pixels from the corner of the square
POINTS = ZOOM * (TEMPLATE.astype(np.float64) - 56)
STRIDES = (8, 16, 32)


def write_detector(path: Path) -> Path:
    """Write the model: twelve outputs, cls, obj, bbox and kps at each stride, a row for each
    cell.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, weights, outputs = (
        [],
        [
            numpy_helper.from_array(np.array([1, -1, 1]), "one"),
            numpy_helper.from_array(np.array([1, -1, 4]), "four"),
            numpy_helper.from_array(np.array([1, -1, 10]), "ten"),
        ],
        [],
    )

    def add(
        name: str, stride: int, weight: np.ndarray, bias: np.ndarray, shape: str, clip: bool = False
    ) -> None:
        """A convolution that looks at each cell, as rows."""
        weights.extend(
            [
                numpy_helper.from_array(weight.astype(np.float32), f"{name}_w"),
                numpy_helper.from_array(bias.astype(np.float32), f"{name}_b"),
            ]
        )
        nodes.append(
            helper.make_node(
                "Conv",
                ["input", f"{name}_w", f"{name}_b"],
                [f"{name}_map"],
                kernel_shape=[stride] * 2,
                strides=[stride] * 2,
            )
        )
        nodes.append(
            helper.make_node("Transpose", [f"{name}_map"], [f"{name}_last"], perm=[0, 2, 3, 1])
        )
        nodes.append(
            helper.make_node("Reshape", [f"{name}_last", shape], [f"{name}_rows" if clip else name])
        )
        if clip:
            nodes.append(helper.make_node("Sigmoid", [f"{name}_rows"], [name]))
        outputs.append(
            helper.make_tensor_value_info(
                name, TensorProto.FLOAT, [1, (640 // stride) ** 2, channels]
            )
        )

    for kind, channels, shape in (
        ("cls", 1, "one"),
        ("obj", 1, "one"),
        ("bbox", 4, "four"),
        ("kps", 10, "ten"),
    ):
        for stride in STRIDES:
            weight, bias = np.zeros((channels, 3, stride, stride)), np.zeros(channels)
            if kind in ("cls", "obj"):
                bias[:] = -20
                # BGR: blue counts for it, green and red against it; a blue of 255 gives a score of
                # sigmoid(6), one of 200 of about 0.62
                if stride == CELL:
                    weight[0] = np.array([1, -1, -1])[:, None, None] / CELL**2 * 0.1
                    bias[:] = -19.5
            elif kind == "bbox":
                bias[2:] = np.log(100 / stride)
            else:
                bias[:] = (POINTS / stride).ravel()
            add(f"{kind}_{stride}", stride, weight, bias, shape, clip=kind in ("cls", "obj"))
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 640, 640])],
        outputs,
        weights,
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7), path
    )
    return path


def advised() -> str:
    """What messages say of YuNet's two files: the one that suits the installed OpenCV first."""
    names = ["face_detection_yunet_2026may.onnx", "face_detection_yunet_2023mar.onnx"]
    if cv2.__version__.startswith("4."):
        names.reverse()
    return f"{names[0]} (for OpenCV {cv2.__version__}; {names[1]} works, too)"


def photograph(
    crops: list[np.ndarray],
    places: list[tuple[int, int]],
    size: tuple[int, int] = (320, 640),
    blue: int = 255,
) -> np.ndarray:
    """(H, W, 3) uint8 RGB, grey, with each aligned crop (112, 112, 3) enlarged around its marker;
    places: (x, y) of the markers, multiples of 8.
    """
    image = np.full((*size, 3), 90, np.uint8)
    for crop, (x, y) in zip(crops, places, strict=True):
        # pixel p of the crop comes to place + ZOOM (p - 56): what alignment by POINTS undoes
        back = np.array([[1 / ZOOM, 0, 56 - x / ZOOM], [0, 1 / ZOOM, 56 - y / ZOOM]])
        face = cv2.warpAffine(crop, back, size[::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
        inside = (
            cv2.warpAffine(
                np.full((112, 112), 255, np.uint8),
                back,
                size[::-1],
                flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
            )
            > 0
        )
        image[inside] = face[inside]
    for x, y in places[: len(crops)]:
        image[y : y + CELL, x : x + CELL] = (0, 0, blue)
    return image
