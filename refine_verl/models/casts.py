"""What autocast casts, cast once: weights for all passes of an actor, a layer's input for all its projections.

Autocast has a cache, but through a cached copy the gradients of all passes are summed in bf16, so passes with gradients
do without it: each casts each weight, some in the backward pass once more, and keeps a copy. Here passes share the
copy, and their gradients are summed in the weight's own dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refine_verl.models.replaced import LayerForward, replaced_forward


class _SumOfGradients(torch.autograd.Function):
    """From a weight to what its uses hang on: its backward pass comes after theirs, and takes the sum they leave.

    It is the first use's part of the graph. Under FSDP2 that pass has to be part of the loss, as S is of every loss
    here: the layer's gradients are reduced when its own backward pass is done.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, left: list[Tensor]) -> Tensor:
        ctx.dtype, ctx.left = weight.dtype, left
        ctx.set_materialize_grads(False)
        return weight.new_empty(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, None]:
        return ctx.left.pop().to(ctx.dtype) if ctx.left else None, None


class _Use(torch.autograd.Function):
    """The cast weight, for one pass."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, cast: Tensor, left: list[Tensor]) -> Tensor:
        ctx.dtype, ctx.left = handle.dtype, left
        return cast.view_as(cast)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.left.append(ctx.left.pop().to(ctx.dtype).add_(gradient) if ctx.left else gradient)
        return None, None, None


@dataclass
class _Cast:
    """A weight in another dtype.

    Attributes:
        weight: it is held, so that its id stays its own.
        cast: without gradient.
        handle: see `_SumOfGradients`; None as long as no pass with gradients has asked.
        left: the gradient of the passes whose backward pass is done: one tensor, or none yet.
    """

    weight: Tensor
    cast: Tensor
    handle: Tensor | None = None
    left: list[Tensor] = field(default_factory=list)

    def use(self) -> Tensor:
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return self.cast
        if self.handle is None:
            self.handle = _SumOfGradients.apply(self.weight, self.left)
        used: Tensor = _Use.apply(self.handle, self.cast, self.left)
        return used


_casts: ContextVar[dict[int, _Cast] | None] = ContextVar("refine_verl_casts", default=None)


def in_autocast_dtype(x: Tensor) -> Tensor:
    """``x`` in the dtype of an autocast that is on, if one is."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if _is_cast(x) else x


def _is_cast(x: Tensor) -> bool:
    """Whether an autocast is on and would cast ``x``; it leaves float64 alone."""
    device = x.device.type
    return torch.is_autocast_enabled(device) and x.dtype not in (torch.float64, torch.get_autocast_dtype(device))


def weight_in_autocast_dtype(weight: Tensor) -> Tensor:
    """`in_autocast_dtype` of a parameter; the same copy for all that ask inside `shared_casts`."""
    casts = _casts.get()
    if casts is None or not _is_cast(weight):
        return in_autocast_dtype(weight)
    if id(weight) not in casts:
        with torch.no_grad():
            casts[id(weight)] = _Cast(weight, in_autocast_dtype(weight))
    return casts[id(weight)].use()


@contextmanager
def shared_casts(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block each weight of the linear modules below ``modules`` is cast by autocast once.

    A block inside another one shares with it. The copies are gone after the block, but for those that backward passes
    need.
    """
    if _casts.get() is not None:
        yield
        return
    below = dict.fromkeys(module for layer in modules for module in layer.modules())
    # one with a forward function of its own, such as accelerate gives, does more than multiply
    linear = [m for m in below if type(m).forward is nn.Linear.forward and "forward" not in m.__dict__]
    # fla's MLP hands the weight of its last projection to a module of its own
    fused = [module for module in below if type(module).__name__ == "SwiGLULinear"]
    token = _casts.set({})
    try:
        with replaced_forward(linear, functools.partial(_linear, linear)), replaced_forward(fused, _swiglu_linear):
            yield
    finally:
        _casts.reset(token)


@contextmanager
def casts_apart() -> Iterator[None]:
    """Inside the block nothing is shared: for what runs again in the backward pass, where nothing is there to share."""
    token = _casts.set(None)
    try:
        yield
    finally:
        _casts.reset(token)


def _linear(modules: Sequence[Any], forward: LayerForward, index: int, input: Tensor) -> Tensor:
    if _casts.get() is None:
        result: Tensor = forward(input)
        return result
    module = modules[index]
    bias = None if module.bias is None else weight_in_autocast_dtype(module.bias)
    return F.linear(input, weight_in_autocast_dtype(module.weight), bias)


def _swiglu_linear(forward: LayerForward, _: int, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    if _casts.get() is None:
        return forward(x, y, weight, bias)
    return forward(x, y, weight_in_autocast_dtype(weight), None if bias is None else weight_in_autocast_dtype(bias))


def cast_inputs_once(layers: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Inside the block fla's layers hand their input to its projections in autocast's dtype.

    The projections, four or more, would each make and keep a copy of it otherwise.
    """
    norms = [norm for layer in layers if isinstance(norm := getattr(layer, "attn_norm", None), nn.Module)]
    return replaced_forward(norms, _output_in_autocast_dtype)


def _output_in_autocast_dtype(forward: LayerForward, _: int, *args: Any, **kwargs: Any) -> Tensor:
    return in_autocast_dtype(forward(*args, **kwargs))
