"""README.md of an exported network: the model card, with the hub's front matter."""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

from config.rules import SCHEDULE_KEYS
from deploy.model import Model
from eval.report import figure_keys, tables
from eval.report.files import read_metrics, table_line
from utils.errors import InputError
from utils.files import read_json, write_text
from utils.run.folder import RunFolder
from utils.teacher.names import ONNX
from utils.teacher.onnx_graph import NORMALISED
from utils.weights.cvlface import OWN_DEPTHS, published_as, require_yaml
from utils.weights.load import run_beside
from utils.weights.read import split_mark

# values of the run's config.json that a card shows: none of them is a path
TRAINING_KEYS = (
    "dataset num_classes num_image loss s m h t_alpha adaptive_alpha alpha use_geom_margin "
    "geom_margin_w geom_margin_k geom_margin_warmup_epoch sample_rate feature_weight header_weight "
    "batch_size accumulate lr backbone_lr lr_func schedule schedule_power milestones warmup_epoch "
    "num_epoch freeze momentum weight_decay grad_clip ema precision flip augment seed"
).split()
LIMITS = """\
For research on face recognition: comparing faces, and teaching smaller networks.

* Input are faces that were found, and aligned by five points to 112×112 as InsightFace does. Faces
  aligned otherwise score lower.
* Whether two faces are the same person is decided at a threshold. Choose it on faces like those it
  is used on, at the false accept rate that can be borne; among many people, chance finds a
  look-alike more often.
* Accuracy differs between groups of people, cameras and ages, as far as the training data does, and
  with low resolution, covered and turned faces. None of this was measured here beyond the figures
  above.
* It does not tell a living face from a photograph of one.
* Do not use it to identify people without their knowledge and a legal basis, nor alone for
  decisions about them.
"""


class Card(NamedTuple):
    """What a card tells besides what the model itself knows.

    name: of the network. source: the configuration's key=value by which training takes it.
    license: the hub's word for it. method: of training, "" if that is not known. training: {key:
    value} of the configuration, empty if that is not known. figures: {dotted key: value} of an
    evaluation, empty if there is none.
    """

    name: str
    source: str
    license: str
    method: str
    training: dict
    figures: dict


def read_training(checkpoint: Path) -> tuple[str, dict]:
    """The method and the configuration of the run beside a checkpoint, as far as they are known."""
    beside = run_beside(checkpoint)
    if beside is None:
        return "", {}
    cfg = read_json(beside, "a dict of configuration values")
    # lr_func takes the place of a schedule
    without = (*SCHEDULE_KEYS, "schedule_power") if cfg.get("lr_func") else ("lr_func",)
    training = {key: cfg[key] for key in TRAINING_KEYS if key in cfg and key not in without}
    if cfg.get("pretrained_backbone_path"):
        training["started from"] = f"weights: {Path(cfg['pretrained_backbone_path']).name}"
    if is_average(checkpoint, cfg):
        training["weights"] = "their exponential average"
    folder = RunFolder(beside.parent)
    # config.json names a teacher whether or not it was asked
    if (folder.path / "teacher.json").is_file():
        training["teacher"] = teacher_of(cfg)
    method = cfg.get("method", "")
    steps = folder.steps("state")
    if not steps:
        return method, training
    # only the state knows how many processes ran, and the method of earlier versions
    state = folder.load_state(steps[-1])
    training["processes"] = len(state["rng"])
    return method or state["method"], training


def is_average(checkpoint: Path, cfg: dict) -> bool:
    if split_mark(checkpoint)[1] or checkpoint.stem.endswith("ema"):
        return True
    return checkpoint.name == "best_backbone.pth" and bool(cfg.get("ema"))


def teacher_of(cfg: dict) -> str:
    """The teacher in words, without the paths of the machine that it was on."""
    teacher = cfg.get("teacher", "")
    if teacher.startswith(ONNX):
        return ONNX + Path(teacher.removeprefix(ONNX)).name
    repo_id = cfg.get("teacher_repo_id")
    return f"{teacher} of {repo_id}" if repo_id else teacher


def find_report(checkpoint: Path) -> Path | None:
    """The figures of a checkpoint that eval/run_batch_eval.py wrote where it does by default.

    None if there are none that are newer than the checkpoint.
    """
    if split_mark(checkpoint)[1]:
        # the average in a file, of which there is no report by this name
        return None
    run = checkpoint.absolute().parent
    for path in (
        run / "reports" / f"{checkpoint.stem}_metrics.csv",
        run.parent / "reports" / f"{run.name}_{checkpoint.stem}_metrics.csv",
    ):
        if path.is_file() and path.stat().st_mtime_ns >= checkpoint.stat().st_mtime_ns:
            return path
    return None


def read_figures(path: Path) -> dict[str, float]:
    """{dotted key: value} of a report, JSON or CSV.

    Raises InputError if it is missing or damaged, or has none of the figures that papers compare.
    """
    if not path.is_file():
        raise InputError(
            f"--report: no file at {path.absolute()}; eval/run_full_eval.py --results-json writes "
            "one"
        )
    if path.suffix == ".json":
        content = read_json(path, "the figures of an evaluation")
        try:
            figures = figure_keys.flatten(content)
        except InputError as error:
            raise InputError(f"--report: {path}: {error}") from error
    else:
        figures = read_metrics(path)
    if not figure_keys.headlines(figures):
        raise InputError(
            f"--report: {path} has no figure of a pair set, IJB or TinyFace; "
            "eval/run_full_eval.py --results-json writes them"
        )
    return figures


def write_card(path: Path, model: Model, card: Card) -> None:
    text = yaml_text(front_matter(model, card))
    write_text(path, f"---\n{text}---\n\n{body(model, card)}")


def yaml_text(content: dict) -> str:
    """Raises InputError if PyYAML is missing."""
    return require_yaml("--output").safe_dump(content, sort_keys=False, allow_unicode=True)


def front_matter(model: Model, card: Card) -> dict:
    """What the hub reads of a card."""
    tags = ["face-recognition", "face-verification", model.name]
    if card.method not in ("", "standalone"):
        tags.append("knowledge-distillation")
    content = {
        "license": card.license,
        "library_name": "pytorch",
        "pipeline_tag": "image-feature-extraction",
        "tags": tags,
    }
    results = results_of(card.figures)
    if results:
        content["model-index"] = [{"name": card.name, "results": results}]
    return content


def results_of(figures: dict) -> list[dict]:
    """The headline figures of each set in percent, but for what it cannot resolve or lacks."""
    results = {}
    for key in figure_keys.headlines(figures):
        if figure_keys.mark_of(key, figures) or not math.isfinite(figures[key]):
            continue
        set_key = figure_keys.set_of(key)
        kind, name = set_key.split(".", 1)
        metric = {
            # rates at a false accept rate and at a rank are shares of what should be accepted
            "type": "accuracy" if kind == "verification" else "recall",
            "name": f"{key.removeprefix(set_key + '.')} (%)",
            "value": round(figure_keys.scaled(key, figures[key]), 2),
        }
        result = results.setdefault(
            set_key,
            {
                "task": {"type": "image-feature-extraction", "name": "Face recognition"},
                # the hub takes letters, digits, "-", "_" and "."
                "dataset": {"type": re.sub(r"[^\w.-]+", "-", name.lower()), "name": name},
                "metrics": [],
            },
        )
        result["metrics"].append(metric)
    return list(results.values())


def body(model: Model, card: Card) -> str:
    sections = {
        "Input and output": describe_use(model),
        "As a teacher": describe_teaching(model, card.source),
        "Training": describe_training(model, card),
        "Figures": describe_figures(card.figures),
        "Intended use and limits": LIMITS,
        "Licence": describe_license(card.license),
    }
    title = (
        f"# {card.name}\n\nA face-recognition network: {model.name}, {model.parameters:,} "
        f"parameters, {model.embedding_size}-dimensional embeddings.\n"
    )
    return title + "".join(f"\n## {head}\n\n{text}" for head, text in sections.items())


def describe_license(license: str) -> str:
    if license != "other":
        return f"{license}\n"
    return (
        "No licence was named: that of the weights follows the data that they, and those of the "
        "teacher, were trained on. Most sets of faces are for non-commercial research only.\n"
    )


def describe_use(model: Model) -> str:
    turned = ""
    if model.color_space == "BGR":
        turned = " It was trained on BGR images; its first layer has been turned around."
    return (
        f"* Input: (N, 3, 112, 112) float32, aligned faces in **RGB**, {NORMALISED.description}."
        f"{turned}\n"
        f"* Output: (N, {model.embedding_size}) float32, **not normalised**: add the embedding of "
        "the mirror image, then divide by the L2 norm. The product of two is their cosine.\n"
    )


def describe_teaching(model: Model, source: str) -> str:
    conf = published_as(model.name, model.embedding_size)
    family = Path(conf["yaml_path"]).parts[1]
    files = (
        "The files are named as CVLFace names them; `pretrained_model/model.yaml` and "
        f"`config.json` state the network, `{conf['name']}` of the family `{family}`."
    )
    own = "CVLFace itself loads IR networks only, not this one."
    if conf["name"] in OWN_DEPTHS:
        own = (
            "CVLFace itself loads IR networks only; this is one: its code builds it from "
            "`pretrained_model/model.yaml` and loads `pretrained_model/model.pt`. For `AutoModel`, "
            "put `wrapper.py` and `models/` of one of its own repositories beside these files. Of "
            "the family `iresnet_insightface` its code builds ir101 with 512 dimensions only."
        )
    return (
        "With the scripts of this project (face-recognition distillation: AdaDistill and its "
        "relatives):\n\n```\n"
        f"./run_AdaDistill.sh teacher={model.name} embedding_size={model.embedding_size} {source}\n"
        f"```\n\n{files} {own}\n"
    )


def describe_training(model: Model, card: Card) -> str:
    step = f" after {model.step} steps" if model.step else ""
    origin = f"From a checkpoint{step} with the SHA-256 `{model.sha256}`.\n"
    if not card.training:
        return f"{origin}\nHow it was trained is not known.\n"
    rows = {"method": card.method} | card.training if card.method else card.training
    lines = [table_line(["key", "value"]), "|---|---|"]
    lines += [table_line([key, json.dumps(value)]) for key, value in rows.items()]
    return origin + "\n" + "\n".join(lines) + "\n"


def describe_figures(figures: dict) -> str:
    """Rates in percent as a table."""
    if not figures:
        return "It has not been evaluated.\n"
    lines = [table_line(["figure", "%"]), "|---|---|"]
    for key, label in figure_keys.headlines(figures).items():
        cell = figure_keys.show(key, figures)
        deviation = key.replace("Accuracy-Flip", "Accuracy-Std")
        if deviation != key and deviation in figures:
            cell += f" ± {figure_keys.show(deviation, figures)}"
        lines.append(table_line([label, cell]))
    text = "\n".join(lines) + "\n"
    return f"{text}\n{tables.EXPLANATION}\n" if tables.MARK in text else text
