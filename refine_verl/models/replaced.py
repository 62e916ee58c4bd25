"""Run something around the forward functions of a model's modules, for the time of a pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

LayerForward = Callable[..., Any]


@contextmanager
def replaced_forward(layers: Iterable[nn.Module], wrap: Callable[..., Any]) -> Iterator[None]:
    """Inside the block each layer runs ``wrap(its own forward, its index, ...)``."""
    changed = []
    try:
        for index, layer in enumerate(layers):
            changed.append((layer, layer.__dict__.get("forward")))
            layer.__dict__["forward"] = functools.partial(wrap, layer.forward, index)
        yield
    finally:
        for layer, own in reversed(changed):  # one that was there twice, too, gets back what it had
            if own is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = own
