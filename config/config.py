"""The configuration: edit the values below and run a script, or override them on its command line.

    ./run_AdaDistill.sh                                                     # what stands here
    ./run_AdaDistill.sh loss=CosFace m=0.35 output=output/cos               # some values changed
    ./run_AdaDistill.sh --config my_config.py                               # a copy of this file

What belongs to a data set stands in DATASETS at the end; set such a key in the block or on the
command line and it wins over the table. Relative paths here start at the repository root, on the
command line at the current directory.
"""

from easydict import EasyDict


class Config(EasyDict):
    """An EasyDict that looks up a key that was not set in the entry of the chosen data set."""

    def __missing__(self, key):
        return DATASETS[self["dataset"]][key]

    def __getattr__(self, key):
        if key.startswith("__") or key not in DATASETS.get(dict.get(self, "dataset"), {}):
            raise AttributeError(f"the configuration has no key {key!r}")
        return self[key]


config = Config()

# --- the run
# a name of DATASETS
config.dataset = "emoreIresNet"
# checkpoints, logs and TensorBoard files of this run
config.output = "output/AdaDistill"
# weights, order of the images, mirrors
config.seed = 42
# "auto" (a CUDA GPU if there is one, else the CPU), "cpu", "cuda", "cuda:N", or "mps": an Apple
# GPU, one process in float32 (its arguments and checks are tested, training on such a machine is
# not)
config.device = "auto"
# resume from the state of this step; 0: start (or --resume: the newest state)
config.global_step = 0

# --- student
# mobilefacenet, mbf, mbf_large, iresnet18/34/50/100/200, ir18, ir50, ir101
config.network = "mobilefacenet"
config.embedding_size = 512
# squeeze-and-excitation, iresnet only
config.SE = False
# start the student from a backbone.pth (fine-tuning)
config.pretrained_backbone_path = ""
# start the class centres from a header.pth
config.pretrained_header_path = ""

# --- loss
# MLLoss, CosFace, ArcFace, AdaFace
config.loss = "ArcFace"
# scale of the logits
config.s = 64.0
# margin; None: ArcFace 0.45, CosFace 0.35, AdaFace 0.4
config.m = None
# AdaFace: how much of the norm's spread the margin uses
config.h = 0.333
# AdaFace: momentum of the norm statistics
config.t_alpha = 0.01
# AdaDistill: weight alpha by the teacher's confidence
config.adaptive_alpha = True
# AdaDistill: alpha as a constant, e.g. 0.9 (the paper's ablation); 0: adaptive
config.alpha = 0.0
# more margin where the teacher is sure and the student is not there yet
config.use_geom_margin = False
config.geom_margin_w = 1.0
config.geom_margin_k = 3.0
# epochs until the geometry margin counts fully; 0: at once
config.geom_margin_warmup_epoch = 1.0
# weight of the loss above; 0: leave it out, the class centres stay as they are
config.header_weight = 1.0
# AMLDistill and AdaDistill add feature_weight x mean(1 - cos(student's feature, teacher's)); 32 to
# 64 weighs as much as the loss above
config.feature_weight = 0.0
# share of the classes in each softmax, those of the batch always among them (Partial FC)
config.sample_rate = 1.0
# where class centres and their momentum lie: "auto" (with the network), "cpu" (the host's memory,
# for millions of classes)
config.centers_device = "auto"
# how they are kept: "fp32", "bf16" (half the memory; products are fp32 all the same)
config.centers_precision = "fp32"

# --- teacher
# the network of the file below: any of the above, iresnet50_se, ...; cvlface_ir50, cvlface_ir101;
# onnx:PATH
config.teacher = "iresnet50"
# its <step>backbone.pth, a published one, or a CVLFace folder: AdaDistill
config.pretrained_teacher_path = ""
# AMLDistill: the teacher's class centres
config.pretrained_teacher_header_path = ""
# a CVLFace repository on the Hugging Face hub, instead of a path; cvlface_* know theirs
config.teacher_repo_id = ""
# where repositories are kept; "": the hub's own folder
config.teacher_cache = ""
# features of the teacher, from train/cache_teacher.py: it is not run again
config.teacher_embeddings = ""
# the colours that a file of weights was trained on: of the teacher, of pretrained_backbone_path, in
# evaluation of the checkpoint: "RGB", "BGR"; "auto": as its configuration says, BGR for AdaFace's
# .ckpt files, else RGB. Files that a run of this project wrote are RGB.
config.color_space = "auto"

# --- optimisation
# images per process and forward pass, at least 2
config.batch_size = 128
# forward passes per optimizer step
config.accumulate = 1
# at 512 images a step; scaled by batch_size x processes / 512
config.lr = 0.1
# its factor over the run: "step" (x 0.1 from each of `milestones` on), "poly" ((1 - t/T)^power) or
# "cosine" ((1 + cos(pi t/T)) / 2), t of T steps after the warm-up of warmup_epoch epochs
config.schedule = "step"
# the power of "poly"
config.schedule_power = 1.0
# a list of factors, one an epoch, instead of warm-up and schedule
config.lr_func = None
# factor on that of the network; the class centres learn at the whole rate
config.backbone_lr = 1.0
# epochs at the start in which the class centres learn alone (fine-tuning on few people)
config.freeze = 0
# decay of an average of the network's weights that is kept beside it, measured and saved as
# <step>ema.pth; 0: none
config.ema = 0.0
config.momentum = 0.9
config.weight_decay = 5e-4
# largest gradient norm of the backbone; 0: unbounded
config.grad_clip = 5.0
# "auto" (bf16 where the hardware has it, else fp32), "fp32", "bf16", "fp16" (with a loss scaler)
config.precision = "auto"
# the faster layout of images in memory; left out on MPS
config.channels_last = True
# torch.compile: a minute at the start, faster steps
config.compile = False

# --- data
# "native", or "mxnet" to read records by MXNet itself (requirements/mxnet.txt)
config.rec_backend = "native"
# reading processes per training process; 0: none
config.num_workers = 4
# of several folders in `rec`: "shared" (a label is one person in all), "separate" (each has people
# of its own); "auto": ask
config.rec_labels = "auto"
# a folder on a disk of each machine: records and teacher_embeddings are copied there once and read
# from it
config.stage_to = ""
config.shuffle = True
# For disks that hate random reads: so many records that lie together (256 to 1024) are read in one
# go, and images are shuffled among 64 such blocks; 0: among all. Larger blocks read faster, but
# InsightFace's sets are sorted by person: 64 x 256 images of MS1MV2 are of about 300 people, so the
# batches of a while see few others. With im2rec's shuffled lists, or data/make_rec.py --layout
# plain, the file itself is mixed, and nothing is lost.
config.shuffle_block = 0
# mirror half of the images
config.flip = True
# besides the mirror: random crops, low resolution, brightness and contrast (AdaFace's recipe)
config.augment = False
# more unreadable images than this end the run
config.max_bad_records = 100

# --- logging and checkpoints
# steps between log lines
config.log_every = 50
# steps between states to resume from, besides the end of every epoch
config.state_every = 2000
# "file": <step>header.pth; "shards": a folder that all ranks write to; "auto": a file up to 1 GB
# (train/export_header.py makes one of shards)
config.header_format = "auto"
# minutes without any progress after which the rank that hangs is named and the run ends; 0: wait
# for ever
config.timeout = 30.0
# newest states that are kept; backbones of epoch ends all are
config.keep_states = 2

# --- verification during training (<val_rec>/<target>.bin) and larger benchmarks
# verify every so many steps; 0: only as the next line says, and at the end
config.eval_step = 0
# verify after every n-th epoch; 0: only at the end
config.val_eval_every_n_epoch = 1
config.val_batch_size = 128
config.run_eval_at_start = False
# IJB and TinyFace, after every n-th epoch; 0: only at the end
config.eval_every_n_epoch = 1
# during training; eval/run_full_eval.py measures on whatever is there
config.eval_ijb = False
# the folder of the folders named next (InsightFace's layout, or CVLFace's <name>_gt_aligned)
config.ijb_root = "data/ijb"
config.ijb_targets = ["IJBB", "IJBC"]
config.ijb_batch_size = 128
# reading processes per training process
config.ijb_num_workers = 4
# add the features of the mirror images
config.ijb_flip = True
config.eval_tinyface = False
# likewise: the official tree <name>/Testing_Set, or CVLFace's <name>_aligned_pad_0.1
config.tinyface_root = "data"
config.tinyface_targets = ["tinyface"]
config.tinyface_batch_size = 128
config.tinyface_num_workers = 4
config.tinyface_flip = True

# --- data sets: everything that changes with the set
#   db_file_format "rec": train.rec in the folder `rec`, or its shards train*.rec, or a list of
#   folders and .rec files (utils/recordio/files.py);
#   "folder": one folder per identity in `data_path`, at most `sample` images of each (0: all).
#   Milestone m: learning rate x 0.1 from epoch index m - 1. num_classes, num_image 0: as many as
#   the set has.
LFW_AND_CO = ["lfw", "cfp_fp", "cfp_ff", "agedb_30", "calfw", "cplfw"]


def archive(folder: str, num_classes: int, num_image: int) -> dict:
    """An entry for a large set; epochs, milestones and pair sets as InsightFace's for Glint360K."""
    return dict(
        db_file_format="rec",
        rec=folder,
        data_path="",
        sample=0,
        num_classes=num_classes,
        num_image=num_image,
        num_epoch=20,
        warmup_epoch=0,
        milestones=[8, 12, 15, 18],
        val_rec=folder,
        val_targets=["lfw", "cfp_fp", "agedb_30"],
    )


DATASETS = {
    "emoreIresNet": dict(
        db_file_format="rec",
        rec="data/faces_emore",
        data_path="",
        sample=0,
        num_classes=85742,
        num_image=5822653,
        num_epoch=26,
        warmup_epoch=0,
        milestones=[8, 14, 20, 25],
        val_rec="data/faces_emore",
        val_targets=LFW_AND_CO,
    ),
    "CASIA_WebFace": dict(
        db_file_format="rec",
        rec="data/faces_webface_112x112",
        data_path="",
        sample=0,
        num_classes=10572,
        num_image=501195,
        num_epoch=60,
        warmup_epoch=0,
        milestones=[40, 48, 52],
        val_rec="data/faces_webface_112x112",
        val_targets=LFW_AND_CO,
    ),
    "MS1MV3": archive("data/ms1m-retinaface-t1", 93431, 5179510),
    "Glint360K": archive("data/glint360k", 360232, 17091657),
    "WebFace4M": archive("data/WebFace4M", 205990, 4235242),
    "WebFace12M": archive("data/WebFace12M", 617970, 12720066),
    "WebFace42M": archive("data/WebFace42M", 2059906, 42474557),
    "Idifface": dict(
        db_file_format="folder",
        rec="",
        data_path="data/Idifface",
        sample=50,
        num_classes=10049,
        num_image=502450,
        num_epoch=60,
        warmup_epoch=0,
        milestones=[40, 48, 52],
        val_rec="data/faces_emore",
        val_targets=LFW_AND_CO,
    ),
    "synthetic": dict(
        db_file_format="rec",
        rec="data/synthetic",
        data_path="",
        sample=0,
        num_classes=0,
        num_image=0,
        num_epoch=10,
        warmup_epoch=0,
        milestones=[7, 9],
        val_rec="data/synthetic",
        val_targets=["frontal", "pose", "lowres"],
    ),
}
