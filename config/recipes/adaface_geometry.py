"""AdaDistill with AdaFace's loss and the geometry margin; the teacher is CVLFace's IR-50.

    NPROC_PER_NODE=2 ./run_AdaDistill.sh --config config/recipes/adaface_geometry.py \\
        output=output/adaface_geometry

The values are those of the repository that has added them to AdaDistill
(https://github.com/rayyichen310/adadistill_with_adaface_loss): two GPUs of 384 images, AdaFace with
m=0.4, h=0.333 and t_alpha=0.01, the geometry margin with w=1, k=3 and a warm-up of one epoch. The
teacher is fetched from the hub (docs/teachers.md).
Their figure: none was published, so there is nothing to reproduce. Here, after short runs, it
trails ArcFace by some points; with geom_margin_k=1 or a feature_weight single runs did not
(docs/results.md).
Not known: how it compares with ArcFace after all 26 epochs.
"""

config = dict(
    dataset="emoreIresNet",
    network="mobilefacenet",
    embedding_size=512,
    teacher="cvlface_ir50",
    loss="AdaFace",
    s=64.0,
    m=0.4,
    h=0.333,
    t_alpha=0.01,
    adaptive_alpha=True,
    use_geom_margin=True,
    geom_margin_w=1.0,
    geom_margin_k=3.0,
    geom_margin_warmup_epoch=1.0,
    batch_size=384,
    lr=0.1,
    momentum=0.9,
    weight_decay=5e-4,
    num_epoch=26,
    warmup_epoch=0,
    schedule="step",
    milestones=[8, 14, 20, 25],
)
