"""Which experts tokens go to, as one number for each token: to compare the routes of two passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from refine_verl.models.casts import weight_in_autocast_dtype
from refine_verl.models.replaced import LayerForward, replaced_forward

_BASE = 6364136223846793005
"""Odd, so that multiplying by it loses nothing in 64 bits; different routes have different numbers but by accident."""


def watched(
    forward: LayerForward, block: Any, keep: Callable[[Tensor], None], keep_logits: Callable[[Tensor], None]
) -> LayerForward:
    """The forward function of a layer with experts that tells which routes its router takes.

    Args:
        forward: the layer's.
        block: its experts and their router, ``experts`` and ``gate``.
        keep: is told their `fingerprint`.
        keep_logits: is told what the router thinks of every expert, [tokens, E].
    """

    def watch(choose: LayerForward, _: int, *args: Any, **kwargs: Any) -> Any:
        chosen = choose(*args, **kwargs)
        logits, _, experts = chosen
        keep(fingerprint(experts))
        keep_logits(logits)
        return chosen

    def run(*args: Any, **kwargs: Any) -> Any:
        with replaced_forward([block.gate], watch), _in_autocast_dtype(block.experts, block.gate):
            return forward(*args, **kwargs)

    return run


@contextmanager
def _in_autocast_dtype(*modules: nn.Module) -> Iterator[None]:
    """Inside, an autocast of the caller goes for the modules' own matrices, too.

    PyTorch leaves the products of experts alone, and the router's matrix would be cast in every pass.
    """
    names = [(module, name) for module in modules for name, _ in module.named_parameters(recurse=False)]
    try:
        for module, name in names:  # an attribute of the object comes before a parameter of that name
            module.__dict__[name] = weight_in_autocast_dtype(getattr(module, name))
        yield
    finally:
        for module, name in names:
            module.__dict__.pop(name, None)


@torch.no_grad()
def fingerprint(experts: Tensor) -> Tensor:
    """int64 [tokens], equal for equal sets of ``experts`` int64 [tokens, e]."""
    return _folded(experts.sort(dim=-1).values.unbind(-1))


def combined(layers: Sequence[Tensor]) -> Tensor | None:
    """int64 [tokens], equal where those of all layers are; None of no layers."""
    return _folded(layers) if layers else None


def balance_loss(logits: Sequence[Tensor], routes: int) -> Tensor:
    """See `RoutingAdapter.balance_loss`.

    Args:
        logits: [tokens, E] of the router of every layer.
        routes: of each token.
    """
    count = logits[0].shape[-1]
    probabilities = torch.cat([part.softmax(-1, dtype=_precise(part)) for part in logits])
    chosen = probabilities.topk(routes, dim=-1).indices.flatten()
    # bincount would make the host wait for a GPU
    times = probabilities.new_zeros(count).index_add(0, chosen, probabilities.new_ones(len(chosen)))
    share = times / len(probabilities)
    return count * (share * probabilities.mean(0)).sum()


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _folded(parts: Sequence[Tensor]) -> Tensor:
    folded = torch.zeros_like(parts[0])
    for part in parts:
        folded = (folded + part + 1) * _BASE  # int64 wraps around
        folded = folded ^ (folded >> 32)  # or sums of other layers' numbers would come out the same
    return folded
