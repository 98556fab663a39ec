"""Configuration files of the shape of AdaDistill's and of its extension by AdaFace: values first,
then a block for each data set, which sets the learning rate as a function of the epoch.
"""

from pathlib import Path

PLAIN = """\
from easydict import EasyDict as edict

config = edict()
config.dataset = "emoreIresNet"  # which block below counts
config.embedding_size = 512
config.momentum = 0.9
config.weight_decay = 5e-4
config.batch_size = 128  # of each GPU
config.lr = 0.1
config.output = "output/AdaArc/"
config.pretrained_teacher_path = "output/teacher/9000backbone.pth"
config.pretrained_teacher_header_path = "output/teacher/9000header.pth"
config.global_step=0
config.s=64.0
config.m=0.45
config.adaptive_alpha=True
config.loss="ArcFace"
config.network = "mobilefacenet"
config.teacher = "iresnet50"
config.SE=False

if config.dataset == "emoreIresNet":
    config.rec = "./data/ms1mv2"
    config.db_file_format = "rec"
    config.num_classes = 85742
    config.num_image = 5822653
    config.num_epoch = 26
    config.warmup_epoch = -1
    config.val_targets = ["lfw", "agedb_30"]
    config.eval_step = 5686

    def drops(epoch):
        if epoch < -1:
            return ((epoch + 1) / 5) ** 2
        return 0.1 ** len([m for m in (8, 14, 20, 25) if m - 1 <= epoch])

    config.lr_func = drops

if config.dataset == "Idifface":
    config.rec = "./data/ms1mv2"
    config.data_path = "./dataset/Idifface"
    config.db_file_format = "folder"
    config.num_classes = 10049
    config.num_image = 502450
    config.num_epoch = 60
    config.warmup_epoch = -1
    config.val_targets = ["lfw"]
    config.eval_step = 982 * 4

    def drops(epoch):
        if epoch < config.warmup_epoch:
            return ((epoch + 1) / 5) ** 2
        return 0.1 ** len([m for m in (40, 48, 52) if m - 1 <= epoch])

    config.lr_func = drops
    config.sample = 50
"""

GEOMETRY = """\
from easydict import EasyDict as edict

config = edict()
config.dataset = "emoreIresNet"
config.embedding_size = 512
config.batch_size = 384
config.lr = 0.1
config.output = "output/geometry/"
config.pretrained_teacher_path = ""
config.teacher_repo_id = "owner/ir50"
config.teacher_cache = "~/.cvlface_cache/owner/ir50"
config.global_step=0
config.s=64.0
config.m=0.4
config.h=0.333
config.t_alpha=0.01
config.use_geom_margin = True  # 啟用幾何間隔
config.geom_margin_w = 1.0      # 縮放
config.geom_margin_k = 3.0
config.geom_margin_mask = 0.8   # 教師信心的門檻
config.geom_margin_baseline = 0.25
config.geom_margin_warmup_epoch = 1 # 0 表示不暖機
config.adaptive_alpha=True
config.loss="AdaFace"
config.network = "mobilefacenet"
config.teacher = "cvlface_ir50"
config.SE=False
config.run_eval_at_start = False
config.val_eval_every_n_epoch = 1
config.eval_every_n_epoch = 4
config.eval_ijb = True
config.ijb_root = "./dataset/facerec_val"
config.ijb_targets = ["IJBB_gt_aligned", "IJBC_gt_aligned"]
config.ijb_batch_size = 384
config.ijb_num_workers = 16
config.ijb_flip = True
config.eval_tinyface = True
config.tinyface_root = "./dataset/facerec_val"
config.tinyface_targets = ["tinyface_aligned_pad_0.1"]
config.tinyface_batch_size = 384
config.tinyface_num_workers = 16
config.tinyface_flip = True

if config.dataset == "emoreIresNet":
    config.rec = "./dataset/ms1mv2"
    config.val_rec = "./dataset/pairs"
    config.db_file_format="rec"
    config.num_classes = 85742
    config.num_image = 5822653
    config.num_epoch =  26
    # 前 warmup_epoch 個 epoch 暖機
    config.warmup_epoch = 2
    config.val_targets =  ["lfw", "vgg2_fp"]
    config.eval_step=5686
    def curve(epoch: int):
        # epoch 從 0 開始
        if epoch < config.warmup_epoch:
            return ((epoch + 1) / (config.warmup_epoch + 1)) ** 2
        return 0.1 ** len([m for m in [8, 14, 20, 25] if m - 1 <= epoch])
    config.lr_func = curve
"""


def write(folder: Path, text: str, dataset: str = "emoreIresNet") -> Path:
    """A file of this text, in which another data set may be chosen."""
    path = folder / "theirs.py"
    path.write_text(text.replace('"emoreIresNet"', repr(dataset), 1), encoding="utf-8")
    return path
