"""Eight-bit models: onnxruntime's static quantisation, ranges of activations from real images.

Needs requirements/onnx.txt.
"""

import logging
import tempfile
from contextlib import contextmanager

import numpy as np

from deploy.graph import INPUT
from utils.inputs import to_input
from utils.teacher.onnx_graph import require_onnx

# images
CALIBRATION_BATCH = 16
# the first operator set whose QuantizeLinear has a scale for each channel
LEAST_OPSET = 13


def to_int8(model, images: np.ndarray, uint8: bool = False):
    """A quantised copy of a float model, with QuantizeLinear and DequantizeLinear nodes.

    Weights are int8 with a scale for each output channel, activations int8.
    model: as ``deploy.graph.to_onnx`` gives it. images: (N, 112, 112, 3) uint8 RGB, like those it
    will see. uint8: the model takes them as they are.
    """
    onnx = require_onnx("deploy")
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, quiet():
        plain, prepared, quantised = (
            f"{folder}/{name}.onnx" for name in ("plain", "prepared", "quantised")
        )
        onnx.save(model, plain)
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            quantised,
            calibration_reader(images, uint8),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.MinMax,
        )
        return onnx.load(quantised)


def calibration_reader(images: np.ndarray, uint8: bool):
    """The images in onnxruntime's form: ``get_next`` gives a batch, and None at the end."""
    import torch
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter(range(0, len(images), CALIBRATION_BATCH))

        def get_next(self):
            start = next(self.batches, None)
            if start is None:
                return None
            batch = images[start : start + CALIBRATION_BATCH]
            return {INPUT: batch if uint8 else to_input(torch.from_numpy(batch)).numpy()}

    return Reader()


@contextmanager
def quiet():
    """Keep onnxruntime's advice on its own preparation, which was done, from the user."""
    before = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(before)
