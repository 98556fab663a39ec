"""AMLDistill (ArcDistill, CosDistill): train a student against the teacher's frozen class centres.

    ./run_AMLDistill.sh pretrained_teacher_header_path=output/teacher/295672header.pth \\
        loss=ArcFace output=output/ArcDistill

The student's features are pulled to where the teacher's classifier keeps each class
(train/class_centers.py computes it where only a backbone is published); the teacher's network
itself, or teacher_embeddings, is needed only for the geometry margin and for feature_weight:

    ./run_AMLDistill.sh feature_weight=32 teacher_embeddings=data/teacher \\
        pretrained_teacher_header_path=output/teacher/295672header.pth
"""

import logging
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from config.load import parse_arguments
from train import build, start_up
from train.engine import Engine
from train.validation import Validation
from utils.errors import run as run_main


def main():
    cfg, resume = parse_arguments(__doc__, "AMLDistill")
    with start_up.start(cfg, resume) as run:
        engine_of(cfg, run).train()


def engine_of(cfg, run: start_up.Run) -> Engine:
    """All that a run is made of."""
    dataset = build.build_dataset(cfg)
    cfg = build.with_classes(cfg, dataset)
    validation = Validation(cfg)
    student = build.build_student(cfg)
    header = build.build_header(cfg, "AMLDistill")
    build.load_teacher_centers(header, cfg)
    teacher = build.open_teacher(cfg, run, dataset) if header.needs_teacher else None
    if cfg.teacher_embeddings and not teacher:
        logging.info(
            "teacher_embeddings are not read: without the geometry margin and feature_weight "
            "AMLDistill needs the teacher's class centres only"
        )

    def loss_of(student, batch, epoch):
        features_t = teacher(batch) if teacher else None
        return header(student(batch.images), batch.labels, features_t, epoch)

    return Engine(cfg, run, "AMLDistill", dataset, student, header, loss_of, validation)


if __name__ == "__main__":
    run_main(main)
