"""InsightFace's arcface_torch, ms1mv2_mbf: a small network without a teacher, by ArcFace on MS1MV2.

    NPROC_PER_NODE=8 ./run_standalone.sh --config config/recipes/arcface_mbf.py \\
        output=output/arcface_mbf

Its values (https://github.com/deepinsight/insightface, recognition/arcface_torch/configs/
ms1mv2_mbf.py): mbf (2.06 M parameters), ArcFace with m=0.5, weight decay 1e-4, 40 epochs with
polynomial decay, 128 images a GPU. Their figures, from the README: IJB-C TAR 93.61 % at FAR 1e-4,
90.28 % at 1e-5; MFR-ALL 62.07 %.
Power: the scheduler of that time (PolyScheduler) decays with power 2; the one that took its place
(PolynomialLRWarmup, lr_scheduler.py) with 1. The figures are older, hence 2.
Rate: theirs is 0.1 whatever the images of a step; here lr counts for 512 images and grows with
them. On eight GPUs of 128, lr=0.05 makes 0.1; with N images a step, set lr to 0.1 x 512 / N.
Not known: on how many GPUs they trained (their instructions are for eight), and by how much the
figures change with the seed. They trained in fp16; precision="auto" takes bf16 or fp32.
"""

config = dict(
    dataset="emoreIresNet",
    network="mbf",
    embedding_size=512,
    loss="ArcFace",
    s=64.0,
    m=0.5,
    batch_size=128,
    lr=0.05,
    momentum=0.9,
    weight_decay=1e-4,
    num_epoch=40,
    warmup_epoch=0,
    schedule="poly",
    schedule_power=2.0,
)
