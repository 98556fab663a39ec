"""Training images: what a set is, in which order it is read, and the processes that read it."""

from utils.dataset.folder import FaceDatasetFolder
from utils.dataset.records import MXFaceDataset

__all__ = ["FaceDatasetFolder", "MXFaceDataset"]
