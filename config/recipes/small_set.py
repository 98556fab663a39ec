"""A few thousand images of a few hundred people: AdaDistill with a strong feature term.

    ./run_AdaDistill.sh --config config/recipes/small_set.py rec=SET \\
        val_rec=SET val_targets=PAIRS teacher_embeddings=FEATURES embedding_size=128 \\
        output=output/small_set

Found on 9,156 photographs of 449 people, a teacher of 128 dimensions (99 % on LFW's pairs) and
pairs of other people (docs/results.md): after 3 epochs of 143 steps, means of two seeds, 87.9 %
with features, 85.7 % by AdaDistill without and 82.8 % by the student alone; after 8 epochs, one
seed, 92.0 % with features and 87.2 % alone.
Their figure: none, this is no published recipe.
Not known: from how many images or epochs on it does not help any more. s and m are smaller than
usual, since few classes are told apart more easily.
"""

config = dict(
    # as many as the set has
    num_classes=0,
    num_image=0,
    network="mobilefacenet",
    loss="ArcFace",
    s=32.0,
    m=0.3,
    feature_weight=64.0,
    batch_size=64,
    # 0.1 at 64 images a step
    lr=0.8,
    num_epoch=8,
    warmup_epoch=0,
    schedule="step",
    milestones=[5, 7],
)
