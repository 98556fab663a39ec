"""Pair sets, the ten-fold protocol and the feature extractor, against golden figures and slow
oracles.
"""

import os
import pickle
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also started by torchrun, below

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from eval import verification
from eval.embed import embed
from eval.verification import evaluate, load_bin, load_targets
from tests.commands import run
from utils import distributed
from utils.errors import InputError
from utils.images import resize_and_crop
from utils.inputs import mirror, to_input

GOLDEN = Path(__file__).parents[1] / "golden"
PROTOCOLS = range(6)


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name) as archive:
        return dict(archive)


# --- pair sets


def encode(image: np.ndarray) -> bytes:
    """PNG, so that reading gives back the same pixels."""
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def faces(count: int, size=(112, 112)) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, *size, 3), np.uint8)


def write(path: Path, content, protocol: int = 4) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("name", ["pairs", "pairs_numpy", "pairs_py2"])
def test_golden_pair_sets(name):
    expected = golden("recordio/expected.npz")
    images, issame = load_bin(GOLDEN / "recordio" / f"{name}.bin")
    assert issame.dtype == bool and images.dtype == np.uint8
    np.testing.assert_array_equal(images, expected["pairs/pixels"])
    np.testing.assert_array_equal(issame, expected["pairs/issame"])


BUFFERS = {
    "bytes": bytes,
    "bytearray": bytearray,
    "array": lambda data: np.frombuffer(data, np.uint8),
    # as cv2.imencode used to return it
    "column": lambda data: np.frombuffer(data, np.uint8)[:, None],
    "fortran": lambda data: np.asfortranarray(np.frombuffer(data, np.uint8)[None]),
}
LABELS = {
    "list": list,
    "numpy bools": lambda labels: [np.bool_(label) for label in labels],
    "array": lambda labels: np.array(labels),
    "integers": lambda labels: np.array(labels, np.int64),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("labels", LABELS)
def test_every_protocol_and_type(tmp_path, protocol, buffer, labels):
    pixels = faces(4)
    content = ([BUFFERS[buffer](encode(image)) for image in pixels], LABELS[labels]([True, False]))
    images, issame = load_bin(write(tmp_path / "set.bin", content, protocol))
    np.testing.assert_array_equal(images, pixels)
    assert issame.tolist() == [True, False] and issame.dtype == bool


def test_old_numpy_module_names(tmp_path):
    pixels = faces(2)
    data = pickle.dumps(
        ([np.frombuffer(encode(image), np.uint8) for image in pixels], [np.bool_(True)]), 2
    )
    old = data.replace(b"numpy._core.", b"numpy.core.")
    assert b"numpy.core." in old  # NumPy 1 writes these names itself
    np.testing.assert_array_equal(load_bin(write(tmp_path / "set.bin", old))[0], pixels)


@pytest.mark.parametrize(
    "shape, scaled",
    [
        ((224, 112), (224, 112)),
        ((100, 150), (112, 168)),
        ((300, 200), (168, 112)),
        ((56, 56), (112, 112)),
    ],
)
def test_other_sizes_short_side_then_centre_crop(tmp_path, shape, scaled):
    image = cv2.GaussianBlur(faces(1, shape)[0], (0, 0), 5)
    images, _ = load_bin(write(tmp_path / "set.bin", ([encode(image)] * 2, [True])))
    method = cv2.INTER_AREA if scaled[0] < shape[0] else cv2.INTER_CUBIC
    whole = image if scaled == shape else cv2.resize(image, scaled[::-1], interpolation=method)
    top, left = (scaled[0] - 112) // 2, (scaled[1] - 112) // 2
    assert images.shape == (2, 112, 112, 3)
    np.testing.assert_array_equal(images[0], whole[top : top + 112, left : left + 112])


def test_target_size_need_not_be_square():
    for rows, columns in [(50, 60), (200, 60), (113, 97), (112, 96), (1, 1)]:
        assert resize_and_crop(np.zeros((rows, columns, 3), np.uint8), (112, 96)).shape == (
            112,
            96,
            3,
        )


class Calls:
    """Pickles as a call, which a plain unpickler would make."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.processes
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "name, function",
    [("system", os.system), ("eval", eval), ("Popen", subprocess.Popen), ("fromfile", np.fromfile)],
)
def test_hostile_pickles_run_nothing(tmp_path, protocol, name, function):
    mark = tmp_path / "mark"
    argument = f"open({str(mark)!r}, 'w')" if function is eval else f"touch {mark}"
    buffers = [encode(image) for image in faces(2)]
    for content in [
        Calls(function, argument),
        (buffers, [Calls(function, argument)]),
        (buffers + [Calls(function, argument)], [True]),
        (np.array([Calls(function, argument)], object), [True]),
    ]:
        path = write(tmp_path / "lfw.bin", content, protocol)
        with pytest.raises(InputError, match=r"lfw\.bin.*refused") as error:
            load_bin(path)
        assert name in str(error.value) or "dtype O8" in str(error.value)
        assert "\n" not in str(error.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    "stream, message",
    [
        # a dotted way to other objects
        (b"cbuiltins\nbytes.__class__\n.", "refused builtins.bytes.__class__"),
        # STACK_GLOBAL
        (b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93.", "refused builtins.getattr"),
        # INST
        (b"(ios\nsystem\n.", "refused os.system"),
        # BUILD on an admitted name
        (b"cbuiltins\nbytes\nN}\x8c\x0c__defaults__Ns\x86b.", "refused to change a function"),
        # all memory
        (b"cbuiltins\nbytearray\n(I999999999999\ntR.", "refused bytes"),
        (b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00rottR.", "refused an encoding"),
        (b"cnumpy\ndtype\n(X\x02\x00\x00\x00O8tR.", "refused numpy dtype O8"),
        (b"cnumpy\ndtype\n(X\x02\x00\x00\x00u1tR(I3\nX\x01\x00\x00\x00>tb.", "refused big-endian"),
        (b"cnumpy.core.multiarray\nscalar\n(NNtR.", "refused a numpy array"),
        (b"\x82\x01.", "extension code"),
        (b"Pname\n.", "persistent"),
        (b"", "EOFError"),
        (b".", "underflow"),
        (b"not a pickle", "UnpicklingError"),
        (b"\x80\xff.", "unsupported pickle protocol"),
    ],
)
def test_hostile_streams(tmp_path, stream, message):
    with pytest.raises(InputError, match=rf"lfw\.bin.*{message}"):
        load_bin(write(tmp_path / "lfw.bin", stream))


def test_truncated_at_any_point(tmp_path):
    whole = pickle.dumps(
        ([np.frombuffer(encode(image), np.uint8) for image in faces(2, (8, 8))], [True]), 2
    )
    for length in range(0, len(whole), 7):
        with pytest.raises(InputError, match=r"lfw\.bin"):
            load_bin(write(tmp_path / "lfw.bin", whole[:length]))


@pytest.mark.parametrize(
    "content, message",
    [
        (([b"", b""], [True]), "image 0 of 2"),
        (([encode(faces(1)[0]), b"no image"], [True]), "image 1 of 2"),
        (([encode(faces(1)[0]), 7], [True]), "image 1 of 2"),
        (([encode(faces(1)[0])] * 3, [True]), "3 images do not fit 1 pairs"),
        (([], []), "0 images"),
        (([encode(faces(1)[0])] * 2, ["yes"]), "booleans"),
        (([encode(faces(1)[0])] * 2, [2]), "booleans"),
        ([1, 2, 3], "not a pair set"),
        ((1, 2), "not a pair set"),
    ],
)
def test_contents_that_are_no_pair_set(tmp_path, content, message):
    with pytest.raises(InputError, match=message) as error:
        load_bin(write(tmp_path / "lfw.bin", content))
    assert "lfw.bin" in str(error.value)


@pytest.mark.parametrize("labels", [[True] * 12, np.zeros(12, np.int64)])
def test_pairs_of_one_kind_are_refused_when_loaded(tmp_path, labels):
    write(tmp_path / "lfw.bin", ([encode(image) for image in faces(2, (8, 8))] * 12, labels))
    kind = "the same person" if labels[0] else "different people"
    for load in (lambda: load_bin(tmp_path / "lfw.bin"), lambda: load_targets(tmp_path, ["lfw"])):
        with pytest.raises(InputError, match=rf"lfw\.bin: all 12 pairs are of {kind}"):
            load()


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "entry, what",
    [
        ("photos/0.jpg", r"text \('photos/0\.jpg'\)"),
        (b"photos/0.jpg", r"text \('photos/0\.jpg'\)"),
        (np.frombuffer(b"photos/0.jpg", np.int8), "a numpy array of int8"),
        (["photos/0.jpg"], "of the type list"),
        (None, "None"),
    ],
)
def test_what_stands_for_an_image_is_named(tmp_path, protocol, entry, what):
    """Names of files instead of their bytes above all; Python 2 writes text as bytes."""
    content = [encode(image) for image in faces(4, (8, 8))]
    content[1] = entry
    path = write(tmp_path / "lfw.bin", (content, [True, False]), protocol)
    message = rf"lfw\.bin: image 1 of 4 is {what}, not an encoded image: .*make_rec\.py --pairs"
    with pytest.raises(InputError, match=message):
        load_bin(path)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numpy_arrays_of_other_types_say_what_to_pickle(tmp_path, protocol):
    files = [encode(image) for image in faces(4, (8, 8))]
    for kind, images, what in (
        ("O8", np.array([*files, None], object)[:4], "Python objects"),
        ("S", np.array(files), "texts of one length"),
        ("U", np.array(["photos/0.jpg"] * 4), "text"),
        ("f4", faces(4, (8, 8)).astype(np.float32), "pixels"),
    ):
        path = write(tmp_path / "lfw.bin", (images, [True, False]), protocol)
        with pytest.raises(InputError, match=rf"refused numpy dtype {kind}.*{what}.*plain lists"):
            load_bin(path)


def test_missing_files_are_named_with_what_is_there(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.bin"):
        load_bin(tmp_path / "nowhere.bin")
    write(tmp_path / "lfw.bin", ([encode(image) for image in faces(2)] * 10, [True, False] * 5))
    assert list(load_targets(tmp_path, ["lfw"])) == ["lfw"]
    with pytest.raises(InputError, match=r"agedb_30\.bin not found; \.bin files there: lfw\.bin"):
        load_targets(tmp_path, ["lfw", "agedb_30"])
    with pytest.raises(InputError, match="none"):
        load_targets(tmp_path / "absent", ["lfw"])
    write(tmp_path / "few.bin", ([encode(image) for image in faces(2)], [True]))
    with pytest.raises(InputError, match=r"few\.bin has 1 pairs, fewer than the 10 folds"):
        load_targets(tmp_path, ["few"])


# --- the protocol


@pytest.mark.parametrize("case", ["easy", "hard", "random"])
def test_golden_evaluation(case):
    expected = {
        key.split("/")[-1]: value
        for key, value in golden("evaluation.npz").items()
        if key.startswith(f"verification/{case}/")
    }
    tpr, fpr, accuracy, *_ = evaluate(expected["embeddings"], expected["issame"])
    np.testing.assert_array_equal(tpr, expected["tpr"])
    np.testing.assert_array_equal(fpr, expected["fpr"])
    np.testing.assert_array_equal(accuracy, expected["accuracy"])


def random_pairs(pairs: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    issame = rng.random(pairs) < 0.5
    left, right = rng.normal(size=(2, pairs, 8))
    right[issame] = left[issame] + noise * right[issame]
    embeddings = np.stack([left, right], axis=1).reshape(2 * pairs, 8)
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True), issame


def slow_evaluate(
    embeddings: np.ndarray, issame: np.ndarray, nrof_folds: int
) -> tuple[np.ndarray, list[float], list[float]]:
    """Accuracy, val and far of each fold, by loops over pairs and thresholds."""
    distances = ((embeddings[0::2] - embeddings[1::2]) ** 2).sum(axis=1)
    accuracies, vals, fars = [], [], []
    for test in np.array_split(np.arange(len(issame)), nrof_folds):
        train = np.setdiff1d(np.arange(len(issame)), test)

        def correct(part, threshold):
            return int(((distances[part] < threshold) == issame[part]).sum())

        def rate(part, threshold, same):
            chosen = distances[part][issame[part] == same]
            return float((chosen < threshold).sum()) / max(len(chosen), 1)

        best = max(np.arange(0, 4, 0.01), key=lambda threshold: correct(train, threshold))
        accuracies.append(correct(test, best) / len(test))
        threshold = max(t for t in np.arange(0, 4, 0.001) if rate(train, t, False) <= 1e-3)
        vals.append(rate(test, threshold, True))
        fars.append(rate(test, threshold, False))
    return np.array(accuracies), vals, fars


@pytest.mark.parametrize(
    "pairs, folds, noise", [(400, 4, 0.3), (103, 10, 1.0), (10, 10, 0.1), (5, 2, 0.0)]
)
def test_evaluate_equals_loops(pairs, folds, noise):
    embeddings, issame = random_pairs(pairs, noise)
    _, _, accuracy, val, val_std, far = evaluate(embeddings, issame, folds)
    accuracies, vals, fars = slow_evaluate(embeddings, issame, folds)
    np.testing.assert_array_equal(accuracy, accuracies)
    assert (val, val_std, far) == pytest.approx(
        (np.mean(vals), np.std(vals), np.mean(fars)), abs=1e-12
    )


def test_val_survives_ties():
    """All impostors at one distance, all mates below: every mate is accepted, where interpolation
    gave 0.
    """
    embeddings = np.tile(np.eye(2), (20, 1))
    embeddings[1:40:4] = embeddings[0:40:4]
    _, _, accuracy, val, _, far = evaluate(embeddings, np.arange(20) % 2 == 0, 10)
    assert (accuracy.mean(), val, far) == (1, 1, 0)


def test_evaluate_refuses_what_it_cannot_measure():
    embeddings, issame = random_pairs(20, 0.5)
    with pytest.raises(InputError, match="9 pairs"):
        evaluate(embeddings[:18], issame[:9], 10)
    with pytest.raises(InputError, match="38 embeddings"):
        evaluate(embeddings[:38], issame)
    embeddings[7, 3] = np.nan
    with pytest.raises(InputError, match="embedding 7"):
        evaluate(embeddings, issame)


# --- features


def small_backbone() -> nn.Module:
    """Its features are sums of 64 numbers below 1, which are sums of 27: off by sqrt(64 + 27) U =
    6e-7, of which torch.testing.assert_close allows ten times as much.
    """
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2),
        nn.BatchNorm2d(4),
        nn.PReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(64, 6),
    )


def plain_loop(backbone: nn.Module, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    backbone.eval()
    rows = []
    with torch.no_grad():
        for image in images:
            x = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
            rows.append((backbone(x)[0], backbone(torch.flip(x, [3]))[0]))
    return tuple(torch.stack(flips) for flips in zip(*rows, strict=True))


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, list])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_embed_equals_a_plain_loop(kind, batch_size, channels_last):
    images = faces(7, (20, 16))
    images.flags.writeable = kind is not np.asarray
    expected = plain_loop(small_backbone(), images)
    backbone = small_backbone()
    for result, flip in zip(
        embed(backbone, kind(images), batch_size, channels_last=channels_last),
        expected,
        strict=True,
    ):
        assert (
            result.dtype == torch.float32 and result.shape == (7, 6) and not result.is_inference()
        )
        torch.testing.assert_close(result, flip)


def test_embed_gives_every_module_its_mode_back():
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("out of memory")

    backbone = small_backbone().train()
    backbone[1].eval()
    embed(backbone, faces(2), 2)
    assert backbone.training and backbone[3].training and not backbone[1].training
    backbone.append(Fails())
    with pytest.raises(RuntimeError):
        embed(backbone, faces(2), 2)
    assert backbone.training and backbone[3].training and not backbone[1].training


def test_embed_compiled_and_reduced_precision():
    images, backbone = faces(5), small_backbone().train()
    exact = embed(backbone, images, 2)
    compiled = torch.compile(backbone, backend="eager")
    torch.testing.assert_close(embed(compiled, images, 2), exact)
    assert backbone.training and compiled.training
    rounded = embed(backbone, images, 2, precision="bf16")
    assert rounded[0].dtype == torch.float32
    # bf16 has 8 bits: two layers' inputs and weights are off by 0.004 each, and their outputs
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.02)
    assert not torch.equal(rounded[0], exact[0])


def test_embed_names_the_first_image_without_features():
    class NotANumber(nn.Module):
        def forward(self, x):
            return torch.where(x.amax(dim=(1, 2, 3), keepdim=True) > 0.99, torch.nan, x).flatten(1)

    images = np.zeros((6, 8, 8, 3), np.uint8)
    images[4, 2, 2, 1] = 255
    with pytest.raises(InputError, match="1 of 6 images, first image index 4"):
        embed(NotANumber(), images, 4)
    with pytest.raises(InputError, match="no images"):
        embed(NotANumber(), images[:0], 4)
    with pytest.raises(InputError, match="fp8"):
        embed(NotANumber(), images, 4, precision="fp8")


def embed_on_rank(folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init("cpu")
    backbone = nn.parallel.DistributedDataParallel(small_backbone())
    torch.save(
        [embed(backbone, faces(count), 2) for count in (1, 2, 8)],
        f"{folder}/{distributed.rank()}.pt",
    )
    dist.barrier()  # no rank closes its connections while another one is still using them
    distributed.shutdown()


@pytest.mark.processes
def test_embed_on_three_ranks_equals_one(tmp_path):
    run(Path(__file__), tmp_path, ranks=3)
    expected = [embed(small_backbone(), faces(count), 2) for count in (1, 2, 8)]
    for rank in range(3):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected)


def test_to_input_flips_chosen_images_and_nothing_else():
    images = torch.from_numpy(faces(3, (6, 5)))
    plain, chosen = (
        to_input(images),
        to_input(images, torch.tensor([True, False, True]), channels_last=True),
    )
    assert plain.is_contiguous() and chosen.is_contiguous(memory_format=torch.channels_last)
    assert plain.min() >= -1 and plain.max() <= 1
    torch.testing.assert_close(chosen[1], plain[1])
    torch.testing.assert_close(chosen[::2], mirror(plain)[::2])
    assert to_input(
        torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8)
    ).flatten().tolist() == pytest.approx([-1, 1, -0.6])
    with pytest.raises(TypeError, match="uint8"):
        to_input(images.float())


def test_to_input_equals_the_formula_for_every_value_also_rounded():
    """Bit for bit: the table of the CPU path, and that a convolution under bf16 autocast rounds its
    input to the same.
    """
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(2, 1, 1, 3)
    formula = (
        ((torch.arange(256, dtype=torch.float32) / 255 - 0.5) / 0.5)
        .reshape(1, 1, 16, 16)
        .expand(2, 3, 16, 16)
    )
    assert torch.equal(to_input(images), formula)
    flip = torch.tensor([True, False])
    rounded = to_input(images, flip, channels_last=True, dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16 and rounded.is_contiguous(
        memory_format=torch.channels_last
    )
    assert torch.equal(rounded, to_input(images, flip).bfloat16())
    convolution = torch.nn.Conv2d(3, 8, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(
            convolution(rounded), convolution(to_input(images, flip, channels_last=True))
        )


def test_verification_of_a_network(tmp_path):
    pixels = faces(24, (16, 16))
    pixels[1::4] = pixels[0::4]
    issame = np.arange(12) % 2 == 0
    backbone = small_backbone()
    result = verification.test((pixels, issame), backbone, batch_size=5, nfolds=3)
    plain, mirrored = plain_loop(backbone, pixels)
    total = plain + mirrored
    accuracy = evaluate((total / total.norm(dim=1, keepdim=True)).numpy(), issame, 3)[2]
    norms = torch.cat([plain, mirrored]).norm(dim=1)
    assert result == pytest.approx(
        {
            "Accuracy-Flip": accuracy.mean(),
            "Accuracy-Std": accuracy.std(),
            "XNorm": float(norms.mean()),
        }
    )


if __name__ == "__main__":
    embed_on_rank(sys.argv[1])
