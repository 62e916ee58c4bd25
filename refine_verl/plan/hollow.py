"""Run a model's passes without memory or arithmetic, and count the bytes that would be alive.

Floating-point tensors are fake (shapes, dtypes and storages, no values); integers are real, because lengths, positions
and layouts steer the passes. Counting storages by what they are for gives the parts of the peak.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

ACTIVATIONS = "activations"
STATES = "states"
LOGITS = "logits"
LABELS = (ACTIVATIONS, STATES, LOGITS)

_VALUE = torch.ops.aten._local_scalar_dense.default


class HollowRun(TorchDispatchMode):
    """Inside, floating-point tensors are made without storage, and the bytes they would take are counted.

    Where a program asks for the value of a fake tensor it gets 0: checks such as "any NaN?" are answered no.

    Attributes:
        fake: inside, fake tensors are not counted: parameters, their gradients.
        peaks: for each kind of moment, bytes by label (`LABELS`) when most were alive. Kinds are what is being made (a
            label), forward or backward: the peak of each is linear in the size of the model, their maximum is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._now = dict.fromkeys(LABELS, 0)
        self.peaks: dict[str, dict[str, int]] = {}
        self._label = ACTIVATIONS
        self._labels: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """What is made inside is of this kind."""
        before, self._label = self._label, label
        try:
            yield
        finally:
            self._label = before

    def relabel(self, tensors: Iterable[Tensor], label: str) -> None:
        """Say afterwards what tensors are for."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            holder = self._labels.get(storage)
            if holder is not None and holder[0] != label:
                size = storage.nbytes()
                self._now[holder[0]] -= size
                self._now[label] += size
                holder[0] = label

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._run(func, args, kwargs or {})
        for leaf in (result,) if isinstance(result, Tensor) else pytree.tree_leaves(result):
            if isinstance(leaf, FakeTensor):
                self._count(leaf.untyped_storage())
        return result

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = list(_tensors_of((*args, *kwargs.values())))
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return 0 if func is _VALUE else func(*args, **kwargs)
        if tensors:
            return func(*args, **kwargs)
        with self.fake:
            made = func(*args, **kwargs)
        floating = isinstance(made, Tensor) and made.is_floating_point()
        return made if floating else func(*args, **kwargs)

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._labels:
            return
        holder = self._labels[storage] = [self._label]
        size = storage.nbytes()
        self._now[self._label] += size
        moment = f"{self._label}, {'forward' if torch._C._current_autograd_node() is None else 'backward'}"
        if sum(self._now.values()) > sum(self.peaks.get(moment, {}).values()):
            self.peaks[moment] = dict(self._now)
        weakref.finalize(storage, self._gone, size, holder)

    def _gone(self, size: int, holder: list[str]) -> None:
        self._now[holder[0]] -= size


def _tensors_of(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """Those an operation is called with, alone and in lists; a run has 100,000 operations, and pytrees are slow."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors_of(argument)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors reachable through containers and attributes of our own objects (states, traces)."""
    seen: dict[int, Any] = {}
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, (list, tuple)):
            waiting += item
        elif isinstance(item, dict):
            waiting += item.values()
        elif dataclasses.is_dataclass(item) or type(item).__module__.startswith("refine_verl."):
            waiting += getattr(item, "__dict__", {}).values()
    return [item for item in seen.values() if isinstance(item, Tensor)]
