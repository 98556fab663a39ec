"""Data and losses the plain way, as training scripts of this field are mostly written: what a
direct reading of the papers gives. For comparison only.
"""

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import transforms

from utils.recordio.format import unpack
from utils.recordio.indexed import IndexedRecordIO


class PlainSet(torch.utils.data.Dataset):
    """One image at a time, through PIL, to a normalised float tensor; the DataLoader's workers
    stack these and send them over.
    """

    def __init__(self, root: str, mirrored: float = 0.5):
        self.records = IndexedRecordIO(f"{root}/train.idx", f"{root}/train.rec", "r")
        self.transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomHorizontalFlip(mirrored),
                transforms.ToTensor(),
                transforms.Normalize(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5]),
            ]
        )

    def __len__(self) -> int:
        return len(self.records.keys)

    def __getitem__(self, index: int):
        header, encoded = unpack(self.records.read_idx(index))
        bgr = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
        rgb = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
        return self.transform(rgb), torch.tensor(header.label, dtype=torch.long)


class PlainArcFace(nn.Module):
    """ArcFace on the whole (B, C) matrix, with a kernel (D, C) that autograd makes a gradient for,
    used or not.
    """

    def __init__(self, embedding_size: int, num_classes: int, s: float = 64.0, m: float = 0.45):
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(embedding_size, num_classes).normal_(0, 0.01))
        self.s = s
        self.m = m

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        cosine = F.normalize(features) @ F.normalize(self.kernel, dim=0)
        cosine = cosine.clamp(-1 + 1e-7, 1 - 1e-7)
        margin = torch.zeros_like(cosine).scatter_(1, labels[:, None], self.m)
        theta = cosine.clone().acos() + margin
        return F.cross_entropy(theta.cos() * self.s, labels)


class PlainAdaDistill(PlainArcFace):
    """Before that, the centres of the batch's classes follow the teacher's features."""

    def forward(self, features, labels, features_t):
        with torch.no_grad():
            f, t = F.normalize(features), F.normalize(features_t)
            lam = (F.normalize(self.kernel, dim=0)[:, labels] * t.t()).sum(0).clamp(1e-6, 1)
            cos_st = (f * t).sum(1).clamp(-1, 1)
            alpha = (cos_st * lam).clamp(1e-6, 1)
            self.kernel[:, labels] = alpha * self.kernel[:, labels] + (1 - alpha) * t.t()
        return super().forward(features, labels)
