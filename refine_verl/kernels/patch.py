"""Put the CPU stand-ins in use: the one place that changes anything in fla.

fla's layers import their kernels by name, and fla has no registry in which a CPU implementation could be
entered (its ``dispatch`` decorator chooses between accelerator back-ends only, and does not cover the
operators below). What is left is to replace the names its modules look up at call time. They are listed in
`TARGETS`; each has a comparison test.
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

_originals: dict[str, Any] = {}


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
    return bool(_originals)


def use_cpu_kernels() -> None:
    """Replace fla's Triton kernels by the PyTorch stand-ins, for this process. Calling it again does nothing.

    Raises:
        RuntimeError: if the installed fla lacks one of the names; nothing is replaced then.
    """
    if _originals:
        return
    resolved = {target: _resolve(target) for target in TARGETS}
    for target, (holder, name) in resolved.items():
        _originals[target] = getattr(holder, name)
        setattr(holder, name, TARGETS[target])
    logger.info("no GPU: flash-linear-attention runs on PyTorch CPU kernels (%d replaced)", len(TARGETS))


def _restore() -> None:
    for target, original in _originals.items():
        setattr(*_resolve(target), original)
    _originals.clear()


def accelerator_available() -> bool:
    """Whether PyTorch sees a device that fla's own kernels could run on."""
    return torch.cuda.is_available() or torch.accelerator.is_available()


def ensure_kernels() -> None:
    """Call `use_cpu_kernels` where there is no accelerator; where there is one, fla stays as it is."""
    if not accelerator_available():
        use_cpu_kernels()


@contextlib.contextmanager
def cpu_kernels() -> Iterator[None]:
    """Have the stand-ins in place inside a ``with`` block; afterwards everything is as before."""
    was_in_use = cpu_kernels_in_use()
    use_cpu_kernels()
    try:
        yield
    finally:
        if not was_in_use:
            _restore()
