"""1:1 verification on pair sets (LFW, CFP-FP, AgeDB-30, CALFW, CPLFW, …): InsightFace's ``.bin``
files, CVLFace's Arrow folders, and the ten-fold protocol.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn

from eval.bootstrap import PairPeople
from eval.embed import embed
from eval.sets.arrow import METADATA, open_pairs
from utils.errors import InputError
from utils.images import decode_rgb, resize_and_crop
from utils.safe_pickle import as_plain, encoded_image, load_pickle, refuse_one_kind
from utils.saved_table import is_saved

ACCURACY_THRESHOLDS = np.arange(0, 4, 0.01)  # squared L2 distance of unit vectors lies in 0…4
VAL_THRESHOLDS = np.arange(0, 4, 0.001)
VAL_FAR = 1e-3
FOLDS = 10
# of the accuracy: 16 MB of counts
DRAWS_AT_A_TIME = 256

DataSet = tuple[np.ndarray, np.ndarray]  # images (2N, H, W, 3) uint8 RGB, issame (N,) bool


def load_bin(path: str | Path, image_size: tuple[int, int] = (112, 112)) -> DataSet:
    """Read a pair set: a pickle of (2N encoded images, N booleans), as InsightFace and AdaDistill
    ship them, or a folder of CVLFace's (``eval/sets/arrow.py``).

    ``image_size``: (height, width); other images are resized by the short side and cropped in the
    centre. Returns uint8 RGB images (2N, H, W, 3), of which 2i and 2i+1 are a pair, and bools (N,),
    True for the same person. Raises InputError naming the file when it is missing, damaged, asks
    for anything but plain data, does not fit together, or holds pairs of one kind only.
    """
    path = Path(path)
    content = open_pairs(path) if is_saved(path) else load_pickle(path)
    buffers, issame = _check_pairs(path, content)

    def load_image(index: int) -> np.ndarray:
        where = f"{path}: image {index} of {len(buffers)}"
        encoded = encoded_image(buffers[index], where)
        try:
            return resize_and_crop(decode_rgb(encoded), image_size)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error

    images = np.empty((len(buffers), *image_size, 3), np.uint8)
    # OpenCV decodes outside the interpreter's lock
    with ThreadPoolExecutor() as pool:
        for index, image in enumerate(pool.map(load_image, range(len(buffers)))):
            images[index] = image
    return images, issame


def find_pair_set(root: str | Path, name: str) -> Path:
    """``<root>/<name>.bin``, or else the Arrow folder ``<root>/<name>``.

    Raises InputError if neither is there, listing what is.
    """
    root = Path(root)
    path = root / f"{name}.bin"
    if path.is_file():
        return path
    if is_saved(root / name):
        return root / name
    files = ", ".join(other.name for other in bin_files(root)) or "none"
    folders = ", ".join(folder.name for folder in arrow_folders(root)) or "none"
    raise InputError(
        f"validation set {name}: {path.resolve()} not found; .bin files there: {files}; Arrow "
        f"folders: {folders}"
    )


def list_pair_sets(root: str | Path) -> list[str]:
    """The names of the pair sets in a folder, sorted."""
    names = {path.stem for path in bin_files(Path(root))}
    return sorted(names.union(folder.name for folder in arrow_folders(Path(root))))


def bin_files(root: Path) -> list[Path]:
    return sorted(root.glob("*.bin"))


def arrow_folders(root: Path) -> list[Path]:
    """The saved folders that are pair sets: those of IJB and TinyFace have metadata.pt."""
    folders = sorted(root.glob("*/"))
    return [folder for folder in folders if is_saved(folder) and not (folder / METADATA).exists()]


def load_targets(
    root: str | Path, names: Sequence[str], image_size: tuple[int, int] = (112, 112)
) -> dict[str, DataSet]:
    """Read the pair set of every name; see ``find_pair_set`` and ``load_bin``.

    Raises InputError when one is missing, saying where it was looked for and which sets are there.
    """
    paths = {name: find_pair_set(root, name) for name in names}
    sets = {name: load_bin(path, image_size) for name, path in paths.items()}
    for name, (_, issame) in sets.items():
        if len(issame) < FOLDS:
            raise InputError(
                f"{paths[name]} has {len(issame)} pairs, fewer than the {FOLDS} folds "
                "of the protocol"
            )
    return sets


def test(
    data_set: DataSet,
    backbone: nn.Module,
    batch_size: int,
    nfolds: int = FOLDS,
    *,
    device: torch.device | str | None = None,
    precision: str = "fp32",
    channels_last: bool = False,
) -> dict[str, float]:
    """Verification accuracy of a network on a pair set, images and mirror images added; all ranks
    call it together.

    ``data_set``: as ``load_bin`` returns it; the keyword arguments are those of
    ``eval.embed.embed``. Returns fractions "Accuracy-Flip" and "Accuracy-Std" (mean and standard
    deviation over the folds) and "XNorm", the mean L2 norm of the features before adding and
    normalising.
    """
    images, issame = data_set
    return figures(
        embed(
            backbone,
            images,
            batch_size,
            device=device,
            precision=precision,
            channels_last=channels_last,
        ),
        issame,
        nfolds,
    )


def figures(
    flips: tuple[torch.Tensor, torch.Tensor], issame: np.ndarray, nfolds: int = FOLDS
) -> dict[str, float]:
    """The dict of ``test`` from the features (2N, D) of the images and of their mirror images."""
    accuracy = evaluate(add_flips(flips), issame, nfolds)[2]
    return {
        "Accuracy-Flip": float(accuracy.mean()),
        "Accuracy-Std": float(accuracy.std()),
        "XNorm": float(torch.cat(flips).norm(dim=1).mean()),
    }


def add_flips(flips: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
    """The embeddings (2N, D) that are compared: both flips added, then L2-normalised."""
    return nn.functional.normalize(flips[0] + flips[1]).numpy()


def evaluate(
    embeddings: np.ndarray, actual_issame: np.ndarray, nrof_folds: int = FOLDS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, float, float]:
    """Ten-fold verification as in InsightFace's and FaceNet's ``verification.py``.

    ``embeddings``: (2N, D) L2-normalised, rows 2i and 2i+1 a pair; ``actual_issame``: (N,) bool.
    Folds are contiguous; a pair is accepted when its squared L2 distance is below the threshold,
    which is chosen on the other folds. Returns (tpr (400,), fpr (400,), accuracy (folds,), val,
    val_std, far): the ROC over thresholds 0…4 averaged over folds, the accuracy of each fold, and
    the true accept rate (mean, std) and false accept rate at a training FAR of at most 1e-3. Unlike
    published code, which interpolates between tied FARs, val uses the largest such threshold.
    Raises InputError for fewer pairs than folds, embeddings that do not fit the labels or are not
    finite.
    """
    issame = np.asarray(actual_issame, bool)
    embeddings = np.asarray(embeddings)
    _check(embeddings, issame, nrof_folds)
    distances, folds = _distances(embeddings), _folds(len(issame), nrof_folds)
    tpr, fpr, accuracy = _roc(distances, issame, folds, nrof_folds)
    val, far = _val(distances, issame, folds, nrof_folds)
    return tpr, fpr, accuracy, float(val.mean()), float(val.std()), float(far.mean())


def sample_accuracy(
    embeddings: np.ndarray, issame: np.ndarray, people: PairPeople, nrof_folds: int = FOLDS
) -> np.ndarray:
    """The mean accuracy of the folds in every draw of people, (draws,); a fold without any pair
    that was drawn does not count.
    """
    folds = _folds(len(issame), nrof_folds)
    cell, shape = _cells(_distances(embeddings), issame, folds, nrof_folds, ACCURACY_THRESHOLDS)
    order = np.argsort(cell, kind="stable")
    occupied, starts = np.unique(cell[order], return_index=True)
    accuracies = []
    for part in people.parts(DRAWS_AT_A_TIME):
        weights = part.weights(order)
        counts = np.zeros((np.prod(shape), weights.shape[1]), np.int64)
        counts[occupied] = np.add.reduceat(weights, starts, axis=0, dtype=np.int64)
        counts = counts.reshape(*shape, -1).cumsum(axis=2)
        with np.errstate(invalid="ignore"):
            accuracies.append(_accuracies(counts[:, :, :-1], counts[:, :, -1]))
    return np.nanmean(np.concatenate(accuracies, axis=1), axis=0)


def _distances(embeddings: np.ndarray) -> np.ndarray:
    return np.square(embeddings[0::2] - embeddings[1::2]).sum(axis=1)


def _folds(pairs: int, nrof_folds: int) -> np.ndarray:
    sizes = [len(part) for part in np.array_split(np.arange(pairs), nrof_folds)]
    return np.repeat(np.arange(nrof_folds), sizes)


def _roc(
    distances: np.ndarray, issame: np.ndarray, folds: np.ndarray, nrof_folds: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    accepts, totals = _count_accepts(distances, issame, folds, nrof_folds, ACCURACY_THRESHOLDS)
    false_rates, true_rates = _rates(accepts, totals).swapaxes(0, 1)
    return true_rates.mean(axis=0), false_rates.mean(axis=0), _accuracies(accepts, totals)


def _accuracies(accepts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """(folds, ...) from accepts (folds, 2, thresholds, ...) and totals (folds, 2, ...)."""
    correct = accepts[:, 1] + totals[:, 0, None] - accepts[:, 0]
    # on all other folds; the first of equals
    best = (correct.sum(axis=0) - correct).argmax(axis=1)
    return np.take_along_axis(correct, best[:, None], axis=1)[:, 0] / totals.sum(axis=1)


def _val(
    distances: np.ndarray, issame: np.ndarray, folds: np.ndarray, nrof_folds: int
) -> tuple[np.ndarray, np.ndarray]:
    """True and false accept rate of each fold, (folds,) each, at the threshold that the other folds
    give for VAL_FAR.
    """
    accepts, totals = _count_accepts(distances, issame, folds, nrof_folds, VAL_THRESHOLDS)
    training_far = _rates(accepts.sum(axis=0) - accepts, totals.sum(axis=0) - totals)[:, 0]
    # FAR grows with the threshold and is 0 at threshold 0, so one is always admissible.
    chosen = (training_far <= VAL_FAR).sum(axis=1) - 1
    rates = _rates(accepts, totals)[np.arange(nrof_folds), :, chosen]
    return rates[:, 1], rates[:, 0]


def _count_accepts(
    distances: np.ndarray,
    issame: np.ndarray,
    folds: np.ndarray,
    nrof_folds: int,
    thresholds: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs with distance < threshold, (folds, 2, thresholds), and all pairs, (folds, 2); the
    middle axis is different, same.
    """
    cell, shape = _cells(distances, issame, folds, nrof_folds, thresholds)
    counts = np.bincount(cell, minlength=np.prod(shape)).reshape(shape).cumsum(axis=-1)
    return counts[..., :-1], counts[..., -1]


def _cells(
    distances: np.ndarray,
    issame: np.ndarray,
    folds: np.ndarray,
    nrof_folds: int,
    thresholds: np.ndarray,
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """(cell of each pair in an array of (folds, 2, first threshold that accepts it), its shape)."""
    first_accepting = np.searchsorted(thresholds, distances, side="right")
    shape = (nrof_folds, 2, len(thresholds) + 1)
    return np.ravel_multi_index((folds, issame.astype(int), first_accepting), shape), shape


def _rates(accepts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    # A fold without any same (or different) pair has rate 0, as published.
    return accepts / np.maximum(totals, 1)[..., None]


def _check(embeddings: np.ndarray, issame: np.ndarray, nrof_folds: int) -> None:
    if len(embeddings) != 2 * len(issame):
        raise InputError(
            f"{len(embeddings)} embeddings do not fit {len(issame)} pairs: two for each are needed"
        )
    if not 2 <= nrof_folds <= len(issame):
        raise InputError(
            f"{len(issame)} pairs cannot be split into {nrof_folds} folds (at least 2 "
            "folds, a pair in each)"
        )
    finite = np.isfinite(embeddings).all(axis=1)
    if not finite.all():
        raise InputError(f"embedding {int(np.argmin(finite))} is not finite (NaN or infinite)")


def _check_pairs(path: Path, content) -> tuple[list, np.ndarray]:
    """The 2N buffers, still encoded, and the (N,) bool labels in what a pair set holds."""
    if not isinstance(content, (tuple, list)) or len(content) != 2:
        raise InputError(f"{path}: not a pair set, which is a pickle of (images, issame)")
    buffers, labels = content[0], as_plain(content[1])
    if not isinstance(buffers, (tuple, list)) or not isinstance(labels, (tuple, list, np.ndarray)):
        raise InputError(
            f"{path}: not a pair set, which is a pickle of a list of images and a list of booleans"
        )
    if len(buffers) != 2 * len(labels) or not len(labels):
        raise InputError(
            f"{path}: {len(buffers)} images do not fit {len(labels)} pairs: two for each are needed"
        )
    if not all(label in (0, 1) for label in labels):
        raise InputError(f"{path}: the labels of a pair set are booleans")
    # a single pair is of one kind, and no accuracy can be measured on it
    if len(labels) > 1:
        refuse_one_kind(labels, str(path))
    return buffers, np.array(labels, bool)
