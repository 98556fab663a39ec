"""What a file is that cannot be read, by its first bytes: for messages that say how to mend it."""

import re
import struct
import zipfile
from pathlib import Path

from safetensors import SafetensorError

# what torch.load raises for files that are cut off, no checkpoints at all, made by another program,
# or not readable from the disk
UNREADABLE = (
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    OverflowError,
    struct.error,
    OSError,
    SafetensorError,
)
# how the program in an archive of torch.jit.save, or of torch.export.save, becomes an ONNX model
FROM_TORCHSCRIPT = (
    "torch.onnx.export(torch.jit.load({path!r}).eval(), torch.zeros(1, 3, 112, 112), 'face.onnx', "
    "dynamo=False, input_names=['x'], dynamic_axes=dict(x=[0]))"
)
FROM_EXPORTED = "torch.onnx.export(torch.export.load({path!r}), f='face.onnx')"
# pattern, kind, what to do
FIRST_BYTES = (
    (
        rb"version https://git-lfs",
        "pointer",
        "a Git LFS pointer instead of the file: fetch the file itself (git lfs pull)",
    ),
    (
        rb"(?i)\s*<(!doctype|html|\?xml)",
        "page",
        "a web page that was saved instead of the file: download it again",
    ),
    (
        rb"PK\x03\x04",
        "checkpoint",
        "a PyTorch checkpoint: name it *.pth, and as a teacher set teacher to its network and "
        "pretrained_teacher_path to it",
    ),
    (rb"(?s).{7}\x00\{", "safetensors", "a safetensors file: name it *.safetensors"),
    # protobuf field 1 (ir_version), a small number, then one of the other fields of a model
    (
        rb"\x08[\x01-\x1f][\x12\x1a\x22\x28\x32\x3a\x42\x72]",
        "onnx",
        "an ONNX model: named .onnx it can be evaluated; training takes one only as a teacher, by "
        "teacher=onnx:PATH",
    ),
)


def bytes_look_like(path: str | Path, expected_kind: str) -> str:
    """What an unreadable file is by its first bytes, in words.

    "" if it is nothing known, or the kind it should be: then it is damaged.
    """
    if program := program_in(path):
        return program
    with open(path, "rb") as file:
        start = file.read(64)
    for pattern, kind, description in FIRST_BYTES:
        if kind != expected_kind and re.match(pattern, start):
            return description
    return ""


def program_in(path: str | Path) -> str:
    """What to do with a file of torch.jit.save or torch.export.save, in words; "" for another."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
    except (*UNREADABLE, zipfile.BadZipFile):
        return ""
    if "constants.pkl" in names:
        kind, export, needs = "TorchScript model", FROM_TORCHSCRIPT, ""
    elif "archive_format" in names or any(name.startswith("models/") for name in names):
        kind, export, needs = "torch.export program", FROM_EXPORTED, ", which needs onnxscript"
    else:
        return ""
    command = f'python -c "import torch; {export.format(path=str(path))}"'
    return (
        f"a {kind}, which is code: export it to ONNX where it runs ({command}{needs}) and name the "
        ".onnx file, as a teacher by teacher=onnx:PATH"
    )
