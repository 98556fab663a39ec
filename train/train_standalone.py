"""Train a network on its own: a teacher (config.network="iresnet50") or the student that
distillation is compared with.

    ./run_standalone.sh                                          # config/config.py
    ./run_standalone.sh network=iresnet50 loss=ArcFace output=output/teacher

Class centres are learned by SGD together with the network. The last <step>backbone.pth and
<step>header.pth are what AMLDistill and AdaDistill take as teacher.
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
    cfg, resume = parse_arguments(__doc__, "standalone")
    with start_up.start(cfg, resume) as run:
        engine_of(cfg, run).train()


def engine_of(cfg, run: start_up.Run) -> Engine:
    """All that a run is made of."""
    dataset = build.build_dataset(cfg)
    cfg = build.with_classes(cfg, dataset)
    validation = Validation(cfg)
    student = build.build_student(cfg)
    header = build.build_header(cfg, "standalone")
    build.load_pretrained_centers(header, cfg)

    def loss_of(student, batch, epoch):
        return header(student(batch.images), batch.labels)

    return Engine(cfg, run, "standalone", dataset, student, header, loss_of, validation)


if __name__ == "__main__":
    run_main(main)
