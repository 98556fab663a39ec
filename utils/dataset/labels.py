"""What messages say about labels that are no class, and how to mend them."""

from utils.errors import InputError


def wrong_label(dataset, index: int, label: float) -> InputError:
    """The error of a record whose label is none of the set's."""
    _, count = dataset.class_range(index)
    hint = f"; if its labels run from 1, {from_1(dataset, count)}" if label == count else ""
    return InputError(
        f"record {dataset.name_of(index)} of {dataset.root_dir} has label {label:g}, but the set "
        f"has {count} classes (0 ... {count - 1}); mend its property file or "
        f"config.num_classes{hint}"
    )


def from_1(dataset, count: int) -> str:
    """How to train where labels are 1 ... count."""
    or_set = f", or set num_classes={count + 1}" if count == dataset.num_classes else ""
    return (
        f"let the property file say {count + 1} classes{or_set} (class 0 then stays empty), or "
        "make the set again with labels from 0"
    )


def one_class(dataset, label: float) -> str:
    """What to say where all images have this label."""
    if hasattr(dataset, "identities"):
        return (
            f"all images are of one identity ({dataset.identities[int(label)]}): training needs "
            "two or more, a sub-folder for each"
        )
    return (
        f"all labels are {label:g}: training needs two classes or more, and the identities of "
        "this set are elsewhere (in a list beside it?); pack its images again with "
        "data/make_rec.py, a folder for each identity"
    )
