"""Whether the labels of a training set are those of at least two classes, 0 to C - 1."""

import logging

from utils.dataset.base import FaceImages
from utils.dataset.labels import from_1, one_class
from utils.errors import InputError

log = logging.getLogger(__name__)


def check_classes(dataset: FaceImages) -> None:
    """Look at the labels of a training set before it is trained on: at all, at many of a large one.

    Raises InputError if all images are of one class, which trains to a loss of 0 and to nothing
    else, and for a label that is no class. Warns of classes without images.
    """
    indices, ascending = dataset.labels_to_check()
    # (class of label 0, number of labels) -> label -> an image that has it
    examples = {}
    for index in indices.tolist():
        label = dataset.label_of(index)
        if label is not None:
            examples.setdefault(dataset.class_range(index), {}).setdefault(label, index)
    classes = set()
    for (_, count), images in examples.items():
        if min(images) >= 1 and max(images) == count:
            raise InputError(
                f"{dataset.root_dir}: labels run from {min(images):g} to {count} (record "
                f"{dataset.name_of(images[count])}), but classes are counted from "
                f"0 and there are {count} (0 ... {count - 1}): {from_1(dataset, count)}"
            )
    for images in examples.values():
        classes |= {dataset.class_of(index, label) for label, index in images.items()}
    if len(classes) == 1:
        (label,) = images
        if all(dataset.label_of(index) in (label, None) for index in range(len(dataset))):
            raise InputError(f"{dataset.root_dir}: {one_class(dataset, label)}")
    elif classes:
        warn_of_empty(dataset, classes, len(indices) == len(dataset), ascending)


def warn_of_empty(dataset: FaceImages, classes: set[int], all_seen: bool, ascending: bool) -> None:
    """Log which classes have no image, as far as ``classes``, those that were seen, show it."""
    smallest = min(classes)
    if smallest and (all_seen or ascending):
        log.warning(
            "labels of %s begin at %d: class 0 has no image and stays empty; if labels should "
            "count from 0, make the set again",
            dataset.root_dir,
            smallest,
        )
    empty = [number for number in range(smallest, dataset.num_classes) if number not in classes]
    if all_seen and empty:
        log.warning(
            "%d of the %d classes of %s have no image, class %d for one; data/check_rec.py lists "
            "them",
            len(empty),
            dataset.num_classes,
            dataset.root_dir,
            empty[0],
        )
