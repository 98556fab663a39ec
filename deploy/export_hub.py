"""Turn a checkpoint into a repository of the Hugging Face hub that others can take as a teacher.

    python deploy/export_hub.py --checkpoint output/student/best_backbone.pth --output student
    python deploy/export_hub.py --checkpoint output/student/best_backbone.pth --output student \\
        --license cc-by-nc-4.0 --push owner/student

The folder has CVLFace's file names and keys: model.safetensors (keys under ``model.net.``),
pretrained_model/model.yaml and config.json (network, colour order, feature and input size), of the
networks that CVLFace itself has also pretrained_model/model.pt, which its loader reads, and
README.md, the model card: training configuration from the run's config.json, figures of its
evaluation (--report, else the run's own report), intended use and limits. Training takes it back as
a teacher: pretrained_teacher_path=FOLDER, or teacher_repo_id=owner/student once it is pushed.

The network is recognised by its weights, as deploy/export_onnx.py does. It takes RGB images
afterwards: of a checkpoint that was trained on BGR images the first layer is turned around.
--push needs huggingface_hub and a token (HF_TOKEN, or hf auth login).
"""

import argparse
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from safetensors.torch import save

from deploy.model import Model, add_color_space, load_to_export
from deploy.model_card import (
    Card,
    find_report,
    read_figures,
    read_training,
    write_card,
    yaml_text,
)
from utils.command_line import command_parser
from utils.errors import InputError, run
from utils.files import (
    prepare_folder,
    printable,
    replacing,
    temporary_folder,
    write_json,
    write_text,
)
from utils.teacher.hub import check_repository, upload
from utils.teacher.onnx_graph import NORMALISED
from utils.weights.cvlface import OWN_DEPTHS, published_as, require_yaml

# as its own repositories have them; their code is not part of this project
OWN_CLASSES = {
    "architectures": ["CVLFaceRecognitionModel"],
    "auto_map": {
        "AutoConfig": "wrapper.ModelConfig",
        "AutoModel": "wrapper.CVLFaceRecognitionModel",
    },
}


def main() -> None:
    args = parse_arguments()
    if args.push:
        check_repository(args.push)
    require_yaml("--output")
    check_output(args.output)
    model = load_to_export(args.checkpoint, args.color_space)
    output = args.output.absolute()
    report = args.report or find_report(args.checkpoint)
    method, training = read_training(args.checkpoint)
    card = Card(
        name=args.push.split("/")[1] if args.push else printable(output.name),
        source=f"teacher_repo_id={args.push}" if args.push else "pretrained_teacher_path=FOLDER",
        license=args.license,
        method=method,
        training=training,
        figures=read_figures(report) if report else {},
    )
    with temporary_folder(".export-", output.parent) as folder:
        draft = folder / output.name
        write_weights(draft, model, args.checkpoint.name)
        write_card(draft / "README.md", model, card)
        os.replace(draft, output)
    print(model.describe())
    print(f"figures of {report}" if report else "no figures: no report of this checkpoint is there")
    print(f"written: {output}")
    if args.push:
        print(f"pushed: {upload(output, args.push)}")


def check_output(output: Path) -> None:
    """Make the parent of the folder to write. Raises InputError if the folder is there already."""
    prepare_folder(output.absolute().parent, "--output")
    is_taken = any(output.iterdir()) if output.is_dir() else output.exists()
    if is_taken:
        raise InputError(f"--output: {output.absolute()} is there: remove it, or name another")


def write_weights(folder: Path, model: Model, checkpoint: str) -> None:
    """Weights and configuration in CVLFace's layout. checkpoint: the name of its file."""
    weights = {key: value.contiguous() for key, value in model.network.state_dict().items()}
    about = model.about() | {
        "normalisation": NORMALISED.description,
        "checkpoint": checkpoint,
        # what transformers asks for
        "format": "pt",
    }
    conf = published_as(model.name, model.embedding_size)
    is_own = conf["name"] in OWN_DEPTHS
    (folder / "pretrained_model").mkdir(parents=True)
    with replacing(folder / "model.safetensors") as file:
        tensors = {f"model.net.{key}": value for key, value in weights.items()}
        file.write(save(tensors, {key: printable(str(value)) for key, value in about.items()}))
    if is_own:
        with replacing(folder / "pretrained_model" / "model.pt") as file:
            torch.save({f"net.{key}": value for key, value in weights.items()}, file)
    write_text(folder / "pretrained_model" / "model.yaml", yaml_text(conf))
    classes = OWN_CLASSES if is_own else {}
    write_json(folder / "config.json", classes | {"conf": conf, "torch_dtype": "float32"})


def parse_arguments() -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="<step>backbone.pth, <step>ema.pth, best_backbone.pth, or a published .pth, .ckpt or "
        ".safetensors",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder to write, a new one"
    )
    parser.add_argument(
        "--license",
        default="other",
        metavar="NAME",
        help="the hub's word for the weights' licence, such as cc-by-nc-4.0 (%(default)s: the card "
        "says that it follows the training data)",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="figures for the card: JSON of eval/run_full_eval.py --results-json, or a "
        "<name>_metrics.csv of eval/run_batch_eval.py (default: that of the run, if it is newer "
        "than the checkpoint)",
    )
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload the folder to this repository of the hub"
    )
    add_color_space(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
