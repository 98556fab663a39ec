"""Put a header of shares (header_format=shards) into the single file that people exchange.

    python train/export_header.py output/teacher/295672header    # writes 295672header.pth there
    python train/export_header.py output/teacher/295672header --output header.pth

The file holds ``kernel`` (D, C) in float32 and AdaFace's batch_mean and batch_std, as
<step>header.pth does, and is what pretrained_header_path and pretrained_teacher_header_path take.
The whole kernel must fit into this machine's memory twice.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.command_line import command_parser
from utils.errors import InputError, run
from utils.run.folder import save
from utils.run.header_shards import read_whole


def main():
    arguments = parse_arguments()
    tensors = read_whole(arguments.folder)
    weight = tensors.pop("weight")
    save({"kernel": weight.t().contiguous()} | tensors, arguments.output)
    print(f"{arguments.output}: {weight.shape[0]:,} classes, {weight.shape[1]}-d")


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("folder", type=Path, help="<step>header of a run")
    parser.add_argument(
        "--output", type=Path, help="file to write; default: <step>header.pth beside the folder"
    )
    arguments = parser.parse_args()
    arguments.folder = arguments.folder.absolute()
    if not arguments.folder.is_dir():
        hint = ""
        if arguments.folder.suffix == ".pth":
            hint = "; <step>header.pth is the single file already"
        raise InputError(
            f"no folder {arguments.folder}: give the <step>header folder of a run "
            f"with header_format=shards{hint}"
        )
    beside = arguments.folder.with_name(arguments.folder.name + ".pth")
    arguments.output = (arguments.output or beside).absolute()
    return arguments


if __name__ == "__main__":
    run(main)
