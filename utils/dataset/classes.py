"""Whether the labels of a training set are those of at least two classes, 0 to C - 1."""

from utils.dataset.base import FaceImages, log
from utils.errors import InputError

# of a set that does not ascend by label as InsightFace's does, and of one that does
LABELS_LOOKED_AT, ASCENDING_LOOKED_AT = 1 << 19, 1 << 12


def check_classes(dataset: FaceImages) -> None:
    """Look at the labels of a training set before it is trained on: at all, at many of a large one.

    Raises InputError if all images are of one class, which trains to a loss of 0 and to nothing
    else, and for a label that is no class. Warns of classes without images.
    """
    indices, ascending = dataset.labels_to_check()
    # an image of each (class of label 0, number of labels, label)
    examples = {}
    for index in indices.tolist():
        label = dataset._label(index)
        if label is not None:
            examples.setdefault((*dataset._classes(index), label), index)
    for first, count in {part[:2] for part in examples}:
        labels = [label for *part, label in examples if part == [first, count]]
        if min(labels) >= 1 and max(labels) == count:
            raise InputError(
                f"{dataset.root_dir}: labels run from {min(labels):g} to {count} (record "
                f"{dataset.name_of(examples[first, count, count])}), but classes are counted from "
                f"0 and there are {count} (0 ... {count - 1}): {dataset.from_1(count)}"
            )
    classes = {dataset._checked(label, index) for (*_, label), index in examples.items()}
    if len(classes) == 1:
        ((*_, label), _) = examples.popitem()
        if all(dataset._label(index) in (label, None) for index in range(len(dataset))):
            raise InputError(f"{dataset.root_dir}: {dataset.one_class(label)}")
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
