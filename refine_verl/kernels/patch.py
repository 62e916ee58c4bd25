"""The one place that changes anything in fla: operators that can be cut, and stand-ins for the CPU.

fla's layers import their kernels by name, and fla has no registry in which another implementation could be
entered (its ``dispatch`` decorator chooses between accelerator back-ends only, and does not cover the
operators below). What is left is to replace the names its modules look up at call time: on every device those of
`OPERATORS` and `CONVOLUTION` by wrappers around what is there (`operators`), and where there is no accelerator those
of `TARGETS` by stand-ins; each of these has a comparison test.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from refine_verl.kernels import conv, delta_rule, loss, mlp, norm
from refine_verl.kernels.operators import recorded, recorded_convolution

logger = logging.getLogger(__name__)

TARGETS: dict[str, Callable[..., Any]] = {
    "fla.layers.delta_net:chunk_delta_rule": delta_rule.chunk_delta_rule,
    "fla.layers.delta_net:fused_recurrent_delta_rule": delta_rule.fused_recurrent_delta_rule,
    "fla.layers.gated_deltanet:chunk_gated_delta_rule": delta_rule.chunk_gated_delta_rule,
    "fla.layers.gated_deltanet:fused_recurrent_gated_delta_rule": delta_rule.fused_recurrent_gated_delta_rule,
    # Without a cache the Gated DeltaNet layer calls the convolution itself instead of through
    # ShortConvolution.
    "fla.layers.gated_deltanet:causal_conv1d": conv.causal_conv1d,
    "fla.modules.causal_conv1d.ops:causal_conv1d": conv.causal_conv1d,
    "fla.modules.causal_conv1d.ops:causal_conv1d_update": conv.causal_conv1d_update,
    "fla.modules.norm.layernorm:rms_norm": norm.rms_norm,
    "fla.modules.norm.fused_norm_gate:rms_norm_gated": norm.rms_norm_gated,
    "fla.modules.norm.l2norm:l2norm": norm.l2norm,
    "fla.modules.mlp:swiglu": mlp.swiglu,
    "fla.modules.mlp:swiglu_linear": mlp.swiglu_linear,
    # The method, not the function below it: the method asserts that its tensors are on an accelerator.
    "fla.modules.fused_cross_entropy.ops:FusedCrossEntropyLoss.forward": loss.cross_entropy_forward,
    "fla.modules.fused_linear_cross_entropy.ops:fused_linear_cross_entropy_loss": (
        loss.fused_linear_cross_entropy_loss
    ),
}
"""``module:attribute`` (``module:Class.method``) in fla, and what stands in for it."""

OPERATORS = (
    "fla.layers.delta_net:chunk_delta_rule",
    "fla.layers.delta_net:fused_recurrent_delta_rule",
    "fla.layers.gated_deltanet:chunk_gated_delta_rule",
    "fla.layers.gated_deltanet:fused_recurrent_gated_delta_rule",
    "fla.layers.gla:chunk_gla",
    "fla.layers.gla:fused_recurrent_gla",
    "fla.layers.hgrn2:chunk_gla",
    "fla.layers.hgrn2:fused_recurrent_gla",
    "fla.layers.kda:chunk_kda",
    "fla.layers.kda:fused_recurrent_kda",
    "fla.layers.gated_deltaproduct:chunk_gated_delta_product",
    "fla.layers.gated_deltaproduct:fused_recurrent_gated_delta_rule",
)
"""Operators from a state to a state, where the layers of fla's families look them up."""

CONVOLUTION = "fla.modules.causal_conv1d.ops:causal_conv1d"
"""The short convolution of all of them, when a state is wanted."""

_originals: dict[str, Any] = {}
_stand_ins = False


def _resolve(target: str) -> tuple[Any, str]:
    """Return the object that holds a target and the attribute's name.

    Raises:
        RuntimeError: if the installed fla has no such name.
    """
    module_name, _, path = target.partition(":")
    *parents, name = path.split(".")
    try:
        holder: Any = importlib.import_module(module_name)
        for parent in parents:
            holder = getattr(holder, parent)
        getattr(holder, name)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"flash-linear-attention {_fla_version()} has no {target}, which the CPU "
            f"kernels replace ({error}). They are written for versions >=0.6,<0.7: install one of these."
        ) from error
    return holder, name


def _fla_version() -> str:
    try:
        return importlib.metadata.version("flash-linear-attention")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def cpu_kernels_in_use() -> bool:
    """Whether the stand-ins are in place."""
    return _stand_ins


def use_cpu_kernels() -> None:
    """Replace fla's Triton kernels by the PyTorch stand-ins, for this process. Calling it again does nothing.

    Raises:
        RuntimeError: if the installed fla lacks one of the names; nothing is replaced then.
    """
    if _stand_ins:
        return
    _put_in_place(TARGETS)
    logger.info("no GPU: flash-linear-attention runs on PyTorch CPU kernels (%d replaced)", len(TARGETS))


def wrap_operators() -> None:
    """Make fla's operators such that states inside a pass can be had. Calling it again does nothing.

    Raises:
        RuntimeError: if the installed fla lacks one of the names; nothing is replaced then.
    """
    if not _originals:
        _put_in_place({})


def _put_in_place(stand_ins: dict[str, Callable[..., Any]]) -> None:
    global _stand_ins
    names = {target: _resolve(target) for target in (*OPERATORS, CONVOLUTION, *stand_ins)}
    _restore()
    for target, (holder, name) in names.items():
        _originals[target] = original = getattr(holder, name)
        used = stand_ins.get(target, original)
        if target in OPERATORS:
            used = recorded(used)
        elif target == CONVOLUTION:
            used = recorded_convolution(used)
        setattr(holder, name, used)
    _stand_ins = bool(stand_ins)


def _restore() -> None:
    global _stand_ins
    for target, original in _originals.items():
        setattr(*_resolve(target), original)
    _originals.clear()
    _stand_ins = False


def allow_attention_layers() -> None:
    """Let models with fla's layers of softmax attention be built where flash-attn is not installed.

    fla's layers refuse to be made without it. Passes of this package do not need it; the models' own forward function
    does, and says so. Calling it again does nothing.
    """
    layers: Any = importlib.import_module("fla.layers.attn")
    if layers.flash_attn_func is None:
        layers.flash_attn_func = layers.flash_attn_varlen_func = _no_flash_attention


def _no_flash_attention(*_: Any, **__: Any) -> Any:
    raise ImportError(
        "the forward function of fla's attention layers needs flash-attn, which is not installed. Training, generation "
        "and evaluation with refine_verl do without it."
    )


def accelerator_available() -> bool:
    """Whether PyTorch sees a device that fla's own kernels could run on."""
    return torch.cuda.is_available() or torch.accelerator.is_available()


def ensure_kernels() -> None:
    """`use_cpu_kernels` where there is no accelerator, `wrap_operators` where there is one."""
    if accelerator_available():
        wrap_operators()
    else:
        use_cpu_kernels()


@contextlib.contextmanager
def cpu_kernels() -> Iterator[None]:
    """Have the stand-ins in place inside a ``with`` block; afterwards everything is as before."""
    were_in_use, wrapped = cpu_kernels_in_use(), bool(_originals)
    use_cpu_kernels()
    try:
        yield
    finally:
        if not were_in_use:
            _restore()
            if wrapped:
                wrap_operators()


@contextlib.contextmanager
def fla_kernels() -> Iterator[None]:
    """Have fla's own kernels in place inside a ``with`` block, on any machine: for those who count them."""
    stand_ins, wrapped = cpu_kernels_in_use(), bool(_originals)
    _restore()
    try:
        yield
    finally:
        _restore()
        if stand_ins:
            use_cpu_kernels()
        elif wrapped:
            wrap_operators()
