"""The header against the float64 golden vectors, and its behaviour at the edges."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.rounding import U, cosine, feature_gradient, logit
from utils.errors import InputError
from utils.losses import build_header, center_products

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "headers.npz")
CASES = sorted({key.split("/kernel0")[0] for key in GOLDEN.files if key.endswith("kernel0")})


def relative(ours, golden):
    ours = np.asarray(ours, dtype=np.float64)
    return np.linalg.norm(ours - golden) / max(np.linalg.norm(golden), 1e-12)


def header_of(case, method=None):
    own_method, loss, *options = case.split("/")
    kernel = torch.from_numpy(GOLDEN[f"{case}/kernel0"])
    header = build_header(
        method or own_method,
        loss,
        *kernel.shape,
        s=float(GOLDEN[f"{case}/s"]),
        m=float(GOLDEN[f"{case}/m"]),
        adaptive_alpha="weighted" in options,
        use_geom_margin="geom" in options,
        geom_margin_warmup_epoch=1,
    )
    header.load_kernel(kernel)
    return header


def check_three_steps(header, case, autocast):
    """Feed the three golden steps and compare everything the vectors hold, which is float64.

    Bounds in units of a cosine's rounding: alpha is a product of two cosines, lam * c; the geometry
    margin 3 (lam - c) lam of three; margin_scaler has it added; a centre alpha w + (1 - alpha) t
    moves by alpha's error times (w - t), whose numbers are below 1, twice where the old one is off.
    """
    off = cosine(header.state_dict()["kernel"].shape[0])
    for step in range(3):
        value = {
            key.rsplit("/", 1)[1]: GOLDEN[key]
            for key in GOLDEN.files
            if key.rsplit("/", 1)[0] == f"{case}/{step}"
        }
        features = torch.from_numpy(value["embeddings"]).requires_grad_(True)
        teacher = torch.from_numpy(value["embeddings_t"]) if "embeddings_t" in value else None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, stats = header(
                features, torch.from_numpy(value["label"]), teacher, float(value.get("epoch", 0))
            )
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(float(value["loss"]), abs=2 * logit(features.shape[1]))
        assert np.linalg.norm(features.grad.numpy() - value["grad_embeddings"]) < feature_gradient(
            features
        )
        state = header.state_dict()
        for name, cosines in (("cos_st", 1), ("lam", 1), ("alpha", 2), ("margin_scaler", 10)):
            if name in value:
                assert stats[name].shape == () and stats[name].item() == pytest.approx(
                    value[name].mean(), abs=cosines * off
                ), name
        if "geom_weighted" in value:
            assert stats["geom"].item() == pytest.approx(value["geom_weighted"].mean(), abs=9 * off)
        # norms, their mean over the batch, a step towards it
        for name in ("batch_mean", "batch_std"):
            if name in value:
                assert state[name].item() == pytest.approx(float(value[name]), rel=16 * U)
        if "kernel" in value:
            assert np.abs(state["kernel"].numpy() - value["kernel"]).max() < 4 * off


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast-bf16"])
@pytest.mark.parametrize("case", CASES)
def test_golden(case, autocast):
    check_three_steps(header_of(case), case, autocast)


@pytest.fixture(params=[2, 3])
def threads(request, monkeypatch):
    """So many threads, each of which takes a share also of few classes."""
    monkeypatch.setattr(center_products, "LARGE_SHARE", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_golden_where_threads_share_out_the_classes(threads):
    for case in CASES:
        check_three_steps(header_of(case), case, autocast=False)


def test_a_product_in_shares_is_the_product(threads):
    """Against float64; of columns of a larger matrix, whose number the threads do not divide."""
    generator = torch.Generator().manual_seed(0)
    grad, block = (
        torch.randn(5, 120, generator=generator)[:, 10:111],
        torch.randn(101, 7, generator=generator),
    )
    # sums of 101 terms, whose magnitudes add up to some ten times the sums themselves
    assert (
        relative(center_products.product(grad, block), (grad.double() @ block.double()).numpy())
        < 10 * 101**0.5 * U
    )


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("standalone")])
def test_amldistill_is_standalone_with_frozen_centers(case):
    header = header_of(case, "AMLDistill")
    before = header.state_dict()["kernel"].clone()
    check_three_steps(header, case, autocast=False)
    assert torch.equal(header.state_dict()["kernel"], before) and not list(header.parameters())


@pytest.mark.parametrize("loss", ["MLLoss", "CosFace", "ArcFace", "AdaFace"])
def test_finite_where_student_meets_its_center(loss):
    torch.manual_seed(0)
    for method in ("standalone", "AdaDistill"):
        header = build_header(method, loss, 16, 5)
        kernel = header.state_dict()["kernel"]
        features = torch.cat([kernel.t(), -kernel.t()]).clone().requires_grad_(True)
        value, _ = header(features, torch.arange(5).repeat(2), features.detach())
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(features.grad).all()
        assert all(torch.isfinite(p.grad).all() for p in header.parameters())


def test_two_images_of_one_class_are_averaged_whatever_their_order():
    torch.manual_seed(1)
    features, teacher, labels = (
        torch.randn(6, 8),
        torch.randn(6, 8),
        torch.tensor([3, 1, 3, 0, 3, 1]),
    )
    kernels = []
    for order in (torch.arange(6), torch.tensor([4, 2, 0, 5, 1, 3])):
        torch.manual_seed(2)
        header = build_header("AdaDistill", "ArcFace", 8, 5)
        old = header.state_dict()["kernel"].t().double()
        header(features[order], labels[order], teacher[order])
        kernels.append(header.state_dict()["kernel"])
    assert torch.equal(*kernels)
    f, t = (torch.nn.functional.normalize(x.double()) for x in (features, teacher))
    for label in (0, 1, 3):
        moved = []
        for i in (labels == label).nonzero()[:, 0]:
            lam = (torch.nn.functional.normalize(old[label], dim=0) @ t[i]).clamp(1e-6, 1)
            alpha = ((f[i] @ t[i]).clamp(-1, 1) * lam).clamp(1e-6, 1)
            moved.append(alpha * old[label] + (1 - alpha) * t[i])
        assert torch.allclose(
            kernels[0].t()[label].double(), torch.stack(moved).mean(0), atol=4 * cosine(8)
        )
    assert torch.equal(kernels[0].t()[[2, 4]].double(), old[[2, 4]])


@pytest.mark.parametrize(
    "options", [dict(alpha=0.9), dict(alpha=0.9, adaptive_alpha=False), dict(adaptive_alpha=False)]
)
def test_constant_and_plain_alpha_against_float64(options):
    """Three steps of CosFace with a class twice in the batch, by the formula."""
    size, people, s, m = 16, 5, 64.0, 0.35
    header = build_header("AdaDistill", "CosFace", size, people, s=s, m=m, **options)
    kernel = header.state_dict()["kernel"].t().double().numpy()
    random = np.random.default_rng(0)
    labels = np.array([2, 0, 2, 4])
    # centres start short: the first update gives them the length of (1 - alpha) t
    bound = 4 * cosine(size)
    for _ in range(3):
        t = unit(random.standard_normal((4, size)))
        f = unit(t + 0.1 * random.standard_normal((4, size)))
        cos_st = (f * t).sum(1)
        alpha = np.full(4, options["alpha"]) if "alpha" in options else cos_st.clip(1e-6, 1)
        lam = (unit(kernel[labels]) * t).sum(1).clip(1e-6, 1)
        moved = alpha[:, None] * kernel[labels] + (1 - alpha[:, None]) * t
        for label in set(labels):
            kernel[label] = moved[labels == label].mean(0)
        logits = s * (f @ unit(kernel).T - m * (labels[:, None] == np.arange(people)))
        own = logits[range(4), labels]
        expected = (np.log(np.exp(logits - own[:, None]).sum(1))).mean()

        loss, stats = header(*map(torch.from_numpy, (3 * f, labels, 2 * t)))
        assert loss.item() == pytest.approx(expected, abs=4 * logit(size))
        assert np.abs(header.state_dict()["kernel"].t().numpy() - kernel).max() < bound
        for name, value in (("alpha", alpha), ("cos_st", cos_st), ("lam", lam)):
            assert stats[name].item() == pytest.approx(value.mean(), abs=bound)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_geometry_margin_widens_arcface_and_cosface():
    torch.manual_seed(0)
    features, teacher, labels = torch.randn(6, 8), torch.randn(6, 8), torch.arange(6)
    for loss in ("ArcFace", "CosFace"):
        plain, geometric = (
            build_header("AMLDistill", loss, 8, 6, use_geom_margin=on) for on in (False, True)
        )
        kernel = teacher.t() + 0.1 * torch.randn(8, 6)
        plain.load_kernel(kernel), geometric.load_kernel(kernel)
        lam = torch.nn.functional.cosine_similarity(kernel.t(), teacher).clamp(1e-6, 1)
        g = 3 * (lam - torch.nn.functional.cosine_similarity(features, teacher)).clamp_min(0) * lam
        value, stats = geometric(features, labels, teacher)
        assert stats["geom"].item() == pytest.approx(g.mean().item(), abs=9 * cosine(8))
        assert value > plain(features, labels)[0]


@pytest.mark.parametrize("header_weight", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("method", ["AMLDistill", "AdaDistill"])
def test_the_feature_term_against_float64(method, header_weight):
    """header_weight * cross-entropy + feature_weight * mean(1 - cos(f, t)), and its gradient.

    The second part's is a sum of unit vectors by (weight / B) / |f|, off by a cosine's rounding in
    its factor and as much in its directions.
    """
    torch.manual_seed(0)
    features, teacher, labels = 3 * torch.randn(6, 16), torch.randn(6, 16), torch.arange(6)
    weights = dict(header_weight=header_weight, feature_weight=32.0)
    header = build_header(method, "CosFace", 16, 9, m=0.3, **weights)
    ours = features.clone().requires_grad_(True)
    loss, stats = header(ours, labels, teacher)
    loss.backward()

    # after the centres have moved, as in AdaDistill's step
    kernel = header.state_dict()["kernel"].double()
    exact = features.double().requires_grad_(True)
    f, t, w = (torch.nn.functional.normalize(x) for x in (exact, teacher.double(), kernel.t()))
    logits = 64 * (f @ w.t() - 0.3 * torch.eye(6, 9))
    feature = 1 - (f * t).sum(1).mean()
    entropy = torch.nn.functional.cross_entropy(logits, labels)
    expected = header_weight * entropy + 32 * feature
    expected.backward()
    off = 2 * cosine(16)
    assert abs(stats["feature"] - feature) < off
    assert abs(loss - expected) < header_weight * 2 * logit(16) + 32 * off
    gradient = header_weight * feature_gradient(features)
    gradient += off * float((32 / 6 / features.norm(dim=1)).norm())
    assert (ours.grad - exact.grad).norm() < gradient


@pytest.mark.parametrize("method", ["AMLDistill", "AdaDistill"])
def test_a_header_of_weight_0_does_not_move(method):
    header = build_header(method, "AdaFace", 8, 5, header_weight=0.0, feature_weight=1.0)
    before = {key: value.clone() for key, value in header.state_dict().items()}
    _, stats = header(torch.randn(4, 8), torch.arange(4), torch.randn(4, 8))
    assert list(stats) == ["feature"]
    assert all(torch.equal(value, before[key]) for key, value in header.state_dict().items())


def test_weights_that_make_no_sense_are_refused():
    for message, method, weights in (
        ("feature_weight needs a teacher", "standalone", dict(feature_weight=1.0)),
        ("leave nothing to learn from", "standalone", dict(header_weight=0.0)),
        ("leave nothing to learn from", "AdaDistill", dict(header_weight=0.0)),
        ("header_weight=-1.0 must be at least 0", "AdaDistill", dict(header_weight=-1.0)),
    ):
        with pytest.raises(InputError, match=message):
            build_header(method, "ArcFace", 8, 5, **weights)
    header = build_header("AMLDistill", "ArcFace", 8, 5, feature_weight=1.0)
    with pytest.raises(ValueError, match="feature_weight need the teacher's features"):
        header(torch.randn(4, 8), torch.arange(4))


def test_sampled_negatives_keep_the_positives_and_their_updates():
    torch.manual_seed(0)
    features, teacher, labels = torch.randn(4, 8), torch.randn(4, 8), torch.tensor([7, 70, 7, 99])
    whole, part = (
        build_header("AdaDistill", "CosFace", 8, 100, sample_rate=rate) for rate in (1.0, 0.1)
    )
    whole.load_kernel(part.state_dict()["kernel"])
    whole(features, labels, teacher)
    loss, _ = part(features, labels, teacher)
    assert torch.equal(
        whole.state_dict()["kernel"], part.state_dict()["kernel"]
    ) and torch.isfinite(loss)
    torch.manual_seed(3)
    header = build_header("standalone", "CosFace", 8, 100, sample_rate=0.1)
    header(features, labels)[0].backward()
    touched = header.centers.weight.grad.abs().sum(1) > 0
    assert touched.sum() == 10 and touched[[7, 70, 99]].all()


def test_state_survives_a_round_trip_and_other_states_are_refused():
    header = build_header("standalone", "AdaFace", 8, 6)
    header(torch.randn(4, 8), torch.arange(4))
    other = build_header("standalone", "AdaFace", 8, 6)
    other.load_state_dict(header.state_dict())
    assert all(
        torch.equal(a, b)
        for a, b in zip(header.state_dict().values(), other.state_dict().values(), strict=True)
    )
    with pytest.raises(InputError, match="kernel is"):
        build_header("AMLDistill", "ArcFace", 8, 7).load_kernel(header.state_dict()["kernel"])
    with pytest.raises(InputError, match="keys"):
        build_header("standalone", "ArcFace", 8, 6).load_state_dict(header.state_dict())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("standalone", "ArcFase", 8, 6), "did you mean 'ArcFace'"),
        (("AdaDistil", "ArcFace", 8, 6), "did you mean 'AdaDistill'"),
    ],
)
def test_unknown_names(arguments, message):
    with pytest.raises(InputError, match=message):
        build_header(*arguments)


@pytest.mark.parametrize(
    "name, call",
    [
        ("MLLoss", '"standalone", "MLLoss"'),
        ("ArcFace", '"standalone", "ArcFace"'),
        ("CosFace", '"standalone", "CosFace"'),
        ("AdaFace", '"standalone", "AdaFace"'),
        ("AdaptiveAArcFace", '"AdaDistill", "ArcFace"'),
        ("AdaptiveACosFace", '"AdaDistill", "CosFace"'),
        ("AdaptiveAAdaFace", '"AdaDistill", "AdaFace"'),
        ("ACosFace", '"AdaDistill", "CosFace"'),
    ],
)
def test_classes_of_adadistill_name_the_call_that_replaces_them(name, call):
    with pytest.raises(ImportError, match=re.escape(f"header = build_header({call}, ")) as caught:
        exec(f"from utils.losses import {name}")
    assert ("alpha=0.9" in str(caught.value)) == (name == "ACosFace")
    with pytest.raises(ImportError, match="cannot import name 'ArcFaces'"):
        exec("from utils.losses import ArcFaces")
    exec("from utils.losses import margins")


def test_combinations_that_make_no_sense():
    for alpha in (-0.1, 1.1):
        with pytest.raises(InputError, match=f"alpha={alpha} must be at least 0"):
            build_header("AdaDistill", "ArcFace", 8, 6, alpha=alpha)
    with pytest.raises(InputError, match="needs a teacher"):
        build_header("standalone", "ArcFace", 8, 6, use_geom_margin=True)
    with pytest.raises(InputError, match="MLLoss has none"):
        build_header("AdaDistill", "MLLoss", 8, 6, use_geom_margin=True)
    with pytest.raises(InputError, match="outside 0..5"):
        build_header("standalone", "ArcFace", 8, 6)(torch.randn(2, 8), torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="teacher's features"):
        build_header("AdaDistill", "ArcFace", 8, 6)(torch.randn(2, 8), torch.tensor([0, 1]))
