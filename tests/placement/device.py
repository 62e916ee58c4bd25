"""A second device without a GPU: tensors in the CPU's memory that say they are elsewhere.

PyTorch can have a backend made in Python. An operation that mixes tensors of this one with tensors on the CPU fails as
it does on a GPU, and every time the host would have to wait for a GPU is counted. Values are computed by the CPU's
kernels and must equal the CPU's own.

Registering the backend cannot be undone, and changes what PyTorch says of the machine: only in a process of its own.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

NAME = "elsewhere"
aten = torch.ops.aten

INDEXED = {
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
"""Operations whose indices may lie on the CPU, on a GPU too: they are moved, for which the host waits."""

SIZED_BY_VALUES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.equal.default,
}
"""Operations whose result the host has to look at before it can go on."""


class Waits:
    """How often the host waited for the device.

    Attributes:
        reads: values that were looked at, by the line of this package that did.
        uploads: tensors moved to the device, for which a GPU is waited for too unless `non_blocking`.
    """

    def __init__(self) -> None:
        self.reads: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()


_waits: list[Waits] = []


@contextmanager
def counted_waits() -> Iterator[Waits]:
    """Count inside the block."""
    waits = Waits()
    _waits.append(waits)
    try:
        yield waits
    finally:
        _waits.remove(waits)


def _read() -> None:
    for waits in _waits:
        waits.reads[_line()] += 1


def _uploaded() -> None:
    for waits in _waits:
        waits.uploads[_line()] += 1


def _line() -> str:
    """The innermost line that is neither PyTorch's nor this file's."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and frame.filename != __file__:
            return f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno}"
    return "?"


class Elsewhere(Tensor):
    """A tensor on the device; ``kept`` holds its values."""

    kept: Tensor

    @staticmethod
    def __new__(cls, kept: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            kept.size(),
            strides=kept.stride(),
            storage_offset=kept.storage_offset(),
            dtype=kept.dtype,
            device=torch.device(NAME, 0),
        )
        made.kept = kept
        return made  # type: ignore[no-any-return]

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.kept})"

    def tolist(self) -> Any:
        _read()
        return self.kept.tolist()


def _is_here(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func in _MOVES:
        return _MOVES[func](*args, **kwargs)
    flat = list(_leaves((args, kwargs)))
    mine = [x for x in flat if isinstance(x, Elsewhere)]
    if mine:
        _refuse_mixture(func, args, flat)
        if func is aten._local_scalar_dense.default or func in SIZED_BY_VALUES or _by_mask(func, args):
            _read()
    wrapped = {id(x.kept): x for x in mine}
    inner_kwargs = {name: _mapped(_inner, value) for name, value in kwargs.items() if name != "pin_memory"}
    out = func(*_mapped(_inner, args), **inner_kwargs)
    if not mine and not _is_here(kwargs.get("device")):
        return out
    return _mapped(lambda x: _outer(func, x, wrapped) if isinstance(x, Tensor) else x, out)


def _leaves(tree: Any) -> Iterator[Any]:
    """What an operation is called with; its arguments are lists at most, and torch's pytrees take twice as long."""
    if isinstance(tree, (list, tuple)):
        for part in tree:
            yield from _leaves(part)
    elif isinstance(tree, dict):
        yield from _leaves(list(tree.values()))
    else:
        yield tree


def _mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, (list, tuple)):
        return type(tree)([_mapped(function, part) for part in tree])
    return function(tree)


def _inner(x: Any) -> Any:
    if isinstance(x, Elsewhere):
        return x.kept
    return torch.device("cpu") if isinstance(x, torch.device) and _is_here(x) else x


def _outer(func: Any, x: Tensor, wrapped: dict[int, Elsewhere]) -> Tensor:
    """The tensor that was written to, or a new one."""
    known = wrapped.get(id(x))
    if known is None:
        return Elsewhere(x)
    if known.shape != x.shape or known.stride() != x.stride():
        raise NotImplementedError(f"{func} changes the shape of a tensor in place, which this device cannot")
    return known


def _refuse_mixture(func: Any, args: Any, flat: Sequence[Any]) -> None:
    """Numbers in tensors without dimensions may come from the CPU; indices, too."""
    if func in INDEXED and isinstance(args[0], Elsewhere):
        indices = [x for x in args[1] if x is not None]
        for x in indices:
            if not isinstance(x, Elsewhere):
                _uploaded()
        flat = args[2:]
    for x in flat:
        if isinstance(x, Tensor) and not isinstance(x, Elsewhere) and x.dim() > 0:
            raise RuntimeError(
                f"Expected all tensors to be on the same device: {func} got one of shape {tuple(x.shape)} on the CPU"
            )


def _by_mask(func: Any, args: Any) -> bool:
    return func in INDEXED and any(x is not None and x.dtype == torch.bool for x in args[1])


def _to_copy(x: Tensor, **kwargs: Any) -> Tensor:
    target = kwargs.pop("device", None) or x.device
    kwargs.pop("pin_memory", None)
    out = aten._to_copy.default(_inner(x), **kwargs)
    _count_move(isinstance(x, Elsewhere), _is_here(target), kwargs.get("non_blocking", False))
    return Elsewhere(out) if _is_here(target) else out


def _copy_(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    _count_move(isinstance(source, Elsewhere), isinstance(to, Elsewhere), non_blocking)
    _inner(to).copy_(_inner(source))
    return to


def _copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    return _copy_(to, source, non_blocking)


def _count_move(was_here: bool, is_here: bool, non_blocking: bool) -> None:
    if was_here and not is_here:
        _read()
    elif is_here and not was_here and not non_blocking:
        _uploaded()


_MOVES: dict[Any, Callable[..., Tensor]] = {
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
    aten._copy_from.default: _copy_from,
}

_OWN_KERNELS = (
    "empty.memory_format",
    "empty_strided",
    "_copy_from",
    "_to_copy",
    "arange",
    "arange.start",
    "arange.start_step",
    "eye",
    "eye.m",
)
"""Operations that PyTorch does not hand to a backend's fallback, or makes of ones that change a shape in place."""

_libraries: list[torch.library.Library] = []


def install() -> torch.device:
    """Make the device known to PyTorch, once.

    Raises:
        ImportError: this PyTorch cannot have a backend made in Python.
    """
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    if not _libraries:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
        everything = torch.library.Library("_", "IMPL")
        everything.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
        own = torch.library.Library("aten", "IMPL")
        for name in _OWN_KERNELS:
            packet, _, overload = name.partition(".")
            own.impl(name, _kernel(getattr(getattr(aten, packet), overload or "default")), "PrivateUse1")
        _libraries.extend((everything, own))
    return torch.device(NAME, 0)


def _kernel(op: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: _run(op, args, kwargs)


class _Module:
    """What PyTorch asks a backend: it is there, has one device, draws no random numbers and has no low precision."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]
