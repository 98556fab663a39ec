"""AdaDistill with the student and the schedule of arcface_mbf, for the best small network.

    NPROC_PER_NODE=8 ./run_AdaDistill.sh --config config/recipes/adadistill_mbf.py \\
        pretrained_teacher_path=output/teacher/295672backbone.pth output=output/adadistill_mbf

It joins what two publications show apart: mbf (2.06 M parameters) reaches 93.61 / 90.28 % on IJB-C
(TAR at FAR 1e-4 / 1e-5) alone after 40 epochs, see arcface_mbf; AdaDistill lifts a MobileFaceNet of
1.20 M from 89.13 to 93.27 % at 1e-4 after 26, see adadistill_paper.
Their figure: none, nobody has published the two together, and it was not measured here.
Not known: whether the teacher helps a student that trains that long; on a small set longer training
alone catches up with AdaDistill, and a feature_weight of 32 to 64 does not let it (small_set.py).
"""

config = dict(
    dataset="emoreIresNet",
    network="mbf",
    embedding_size=512,
    teacher="iresnet50",
    loss="ArcFace",
    s=64.0,
    m=0.45,
    adaptive_alpha=True,
    batch_size=128,
    # 0.1 at 1024 images a step
    lr=0.05,
    momentum=0.9,
    weight_decay=1e-4,
    num_epoch=40,
    warmup_epoch=0,
    schedule="poly",
    schedule_power=2.0,
)
