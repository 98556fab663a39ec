"""AdaDistill (Boutros et al., ECCV 2024): MobileFaceNet learns from a ResNet50 on MS1MV2.

    NPROC_PER_NODE=4 ./run_AdaDistill.sh --config config/recipes/adadistill_paper.py \\
        pretrained_teacher_path=output/teacher/295672backbone.pth output=output/adadistill_paper

The values are those of the authors' config.py (https://github.com/fdbtrs/AdaDistill): four GPUs of
128 images, ArcFace with m=0.45, alpha weighted by the teacher's confidence.
Their figure: IJB-C TAR 93.27 % at FAR 1e-4 and 89.32 % at 1e-5; the student alone has 89.13 % at
1e-4 (arXiv 2407.01332; quoted from a summary of it, see docs/results.md).
Not known: the weights of their teacher, which were not published (train your own:
docs/training.md), and by how much the figures change with the seed.
"""

config = dict(
    dataset="emoreIresNet",
    network="mobilefacenet",
    embedding_size=512,
    teacher="iresnet50",
    loss="ArcFace",
    s=64.0,
    m=0.45,
    adaptive_alpha=True,
    batch_size=128,
    lr=0.1,
    momentum=0.9,
    weight_decay=5e-4,
    num_epoch=26,
    warmup_epoch=0,
    schedule="step",
    milestones=[8, 14, 20, 25],
)
