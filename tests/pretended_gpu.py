"""Tensors that pretend to lie on a CUDA GPU, and an end to whoever waits for that GPU.

PyTorch's FakeTensorMode gives tensors of every shape, type and device without memory behind them.
Operations on them check devices, types and shapes and compute nothing. What a number of the host
would be read from is a guess: 1.0, -1 or True.
"""

from collections import defaultdict
from contextlib import contextmanager
from functools import wraps

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

GPU = torch.device("cuda", 0)
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
COPIES = {"aten::_to_copy", "aten::copy_"}


class HostReads(TorchDispatchMode):
    """Refuses, while ``strict``, every operation for which the host would wait for the GPU."""

    def __init__(self):
        super().__init__()
        self.strict = False
        # copies from the GPU that were let pass
        self.fetched = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        reason = why_it_waits(func, args, kwargs)
        if reason and self.strict:
            raise HostRead(f"{func.name()}: {reason}")
        if func is torch.ops.aten._local_scalar_dense.default:
            return guess(args[0].dtype)
        if func is torch.ops.aten._fused_sgd_.default:
            # PyTorch has no pretended one; it writes to its arguments and returns nothing
            weights, gradients, momentum = args
            assert {x.device for x in [*weights, *gradients, *momentum]} == {GPU}
            return None
        self.fetched += reason == "a copy to the host"
        return func(*args, **kwargs)


class HostRead(AssertionError):
    """The host would wait for the GPU here."""


def why_it_waits(func, args, kwargs) -> str:
    """Why the host would wait for the GPU in this operation; "": it would not."""
    name = func.name().partition(".")[0]
    tensors = [x for x in [*args, *kwargs.values()] if isinstance(x, torch.Tensor)]
    if name in COPIES:
        source = tensors[-1].device.type
        target = args[0].device if name == "aten::copy_" else kwargs.get("device")
        target = torch.device(target).type if target else source
        if (source, target) == ("cuda", "cpu"):
            return "a copy to the host"
        blocking = not (kwargs.get("non_blocking") or name == "aten::copy_" and args[2:] == (True,))
        if (source, target) == ("cpu", "cuda") and blocking:
            return "a copy from the host that is waited for"
        return ""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return ""
    if name in INDEXING:
        is_mask = any(index is not None and index.dtype == torch.bool for index in args[1])
        return "indexing with a mask counts its true values" if is_mask else ""
    if torch.Tag.data_dependent_output in func.tags:
        return "a value is read"
    if torch.Tag.dynamic_output_shape in func.tags:
        return "the shape of the result depends on values"
    return ""


def guess(dtype: torch.dtype):
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else -1


def backward(output: torch.Tensor, gradient: torch.Tensor | None = None) -> None:
    """``output.backward(gradient)`` node by node, without autograd's engine, which asks the driver.

    Gradients arrive in another order than the engine's where more than two meet.
    """
    first = output.grad_fn
    missing = defaultdict(int)
    nodes, stack = {first}, [first]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            missing[node] += 1
            if node not in nodes:
                nodes.add(node)
                stack.append(node)
    arrived = defaultdict(dict)
    arrived[first][output.output_nr] = torch.ones_like(output) if gradient is None else gradient
    ready = [first]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            for (following, slot), grad in zip(
                node.next_functions, gradients_of(node, arrived.pop(node, {})), strict=True
            ):
                if following is None:
                    continue
                if grad is not None:
                    add(arrived[following], slot, grad, following._input_metadata[slot])
                missing[following] -= 1
                if not missing[following]:
                    ready.append(following)


def gradients_of(node, arrived: dict) -> tuple:
    """What a node of the graph makes of the gradients of its outputs {number: gradient}."""
    if not arrived:
        return (None,) * len(node.next_functions)
    # a node in C++ is called, one of torch.autograd.Function has apply
    run = node if callable(node) else node.apply
    gradients = run(*(arrived.get(number) for number in range(len(node._input_metadata))))
    if not isinstance(gradients, tuple):
        gradients = (gradients,)
    return gradients[: len(node.next_functions)]


def add(arrived: dict, slot: int, grad: torch.Tensor, metadata) -> None:
    """Add a gradient, in the shape and type that autograd's engine brings it to."""
    if grad.shape != metadata.shape:
        grad = grad.sum_to_size(metadata.shape)
    grad = grad.to(metadata.dtype)
    arrived[slot] = arrived[slot] + grad if slot in arrived else grad


def grad_of(output: torch.Tensor, leaf: torch.Tensor) -> tuple[torch.Tensor]:
    """``torch.autograd.grad(output, leaf)`` for a leaf."""
    backward(output)
    gradient, leaf.grad = leaf.grad, None
    return (gradient,)


class PretendedGPU:
    """Functions run ``on_it`` or, while it is there, ``beside_it``; ``reads``: the HostReads."""

    def __init__(self, patch: pytest.MonkeyPatch):
        # networks are made beside it and may move to it
        self.fake = FakeTensorMode(allow_fallback_kernels=False, allow_non_fake_inputs=True)
        self.reads = HostReads()
        self.entered = False
        patch.setattr(torch.Tensor, "backward", backward)
        patch.setattr(torch.autograd, "grad", grad_of)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_args, **_kwargs: True)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)

    def on_it(self, function):
        """The function, whose tensors are pretended."""

        @wraps(function)
        def pretended(*args, **kwargs):
            if self.entered:
                return function(*args, **kwargs)
            self.entered = True
            try:
                with self.fake, self.reads:
                    return function(*args, **kwargs)
            finally:
                self.entered = False

        return pretended

    def beside_it(self, function):
        """The function, which works with real tensors of the host."""

        @wraps(function)
        def real(*args, **kwargs):
            with _disable_current_modes():
                return function(*args, **kwargs)

        return real

    @contextmanager
    def without_waiting(self, strict: bool = True):
        """The host waits for nothing in this block; strict=False: it may."""
        before, self.reads.strict = self.reads.strict, strict
        try:
            yield
        finally:
            self.reads.strict = before
