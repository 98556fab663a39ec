"""AdaDistill (Boutros et al., ECCV 2024): class centres are a moving average of teacher features,
weighted by how well the student follows.

    ./run_AdaDistill.sh pretrained_teacher_path=output/teacher/295672backbone.pth \\
        output=output/AdaArcDistill
    ./run_AdaDistill.sh pretrained_teacher_path=... loss=AdaFace use_geom_margin=True
    # its features, from train/cache_teacher.py: it is not run again
    ./run_AdaDistill.sh teacher_embeddings=data/teacher

No gradient ever moves a centre: every step sets w_y <- alpha w_y + (1 - alpha) t, with alpha the
student's cosine to the teacher (times the teacher's to the centre, if adaptive_alpha), and the
student learns by cross-entropy against these centres.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from config.load import parse_arguments
from train import build, start_up
from train.engine import Engine
from train.validation import Validation
from utils.errors import run as run_main


def main():
    cfg, resume = parse_arguments(__doc__, "AdaDistill")
    with start_up.start(cfg, resume) as run:
        engine_of(cfg, run).train()


def engine_of(cfg, run: start_up.Run) -> Engine:
    """All that a run is made of."""
    dataset = build.build_dataset(cfg)
    cfg = build.with_classes(cfg, dataset)
    validation = Validation(cfg)
    student = build.build_student(cfg)
    header = build.build_header(cfg, "AdaDistill")
    build.load_pretrained_centers(header, cfg)
    teacher = build.open_teacher(cfg, run, dataset)

    def loss_of(student, batch, epoch):
        return header(student(batch.images), batch.labels, teacher(batch), epoch)

    return Engine(cfg, run, "AdaDistill", dataset, student, header, loss_of, validation)


if __name__ == "__main__":
    run_main(main)
