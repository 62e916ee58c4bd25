"""CPU stand-ins for fla's fused cross-entropy losses, over torch's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from refine_verl.kernels.delta_rule import check_unknown

_UNSUPPORTED = {
    "logit_scale": 1.0,
    "lse_square_scale": 0.0,
    "logit_softcapping": None,
    "process_group": None,
    "return_z_loss": False,
}
"""Options that no supported model sets, and the values that leave them without effect."""


def _cross_entropy(logits: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
    """Computed in float32 at least, like fla's kernel."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target, **options)


def cross_entropy_forward(self: Any, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``FusedCrossEntropyLoss.forward``, whose original asserts that its tensors are on an accelerator.

    Args:
        self: the fla module, for its reduction, ignored index and label smoothing.
        input, target: logits ``[N, V]`` and targets ``[N]``. Logits are never overwritten.

    Raises:
        NotImplementedError: for an option that has no CPU implementation.
    """
    options = {name: getattr(self, name) for name in _UNSUPPORTED}
    _refuse("FusedCrossEntropyLoss", options)
    return _cross_entropy(
        input,
        target,
        ignore_index=self.ignore_index,
        reduction=self.reduction,
        label_smoothing=self.label_smoothing,
    )


def fused_linear_cross_entropy_loss(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    num_chunks: int = 8,
    reduction: str = "mean",
    use_l2warp: bool = False,
    l2_penalty_factor: float = 1e-4,
    accumulate_grad_in_fp32: bool = True,
    **options: Any,
) -> torch.Tensor:
    """Cross-entropy of ``linear(x, weight, bias)``; on the CPU all logits are held at once.

    Args:
        x: ``[N, D]``.
        target: ``[N]``.
        weight, bias: ``[V, D]`` and ``[V]``.
        ignore_index, label_smoothing: as in torch.
        num_chunks, accumulate_grad_in_fp32: accepted for fla's signature and not needed here.
        reduction: ``"mean"`` over the targets that count, or ``"sum"``.
        use_l2warp, l2_penalty_factor: pull the largest logit of each row towards zero (gradient only).
        **options: fla's others, refused unless without effect.

    Returns:
        The scalar loss.

    Raises:
        NotImplementedError: for an option that has no CPU implementation.
    """
    del num_chunks, accumulate_grad_in_fp32
    _refuse("fused_linear_cross_entropy_loss", options)
    logits = F.linear(x, weight, bias)
    loss = _cross_entropy(
        logits, target, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    if use_l2warp:
        from fla.modules.l2warp import l2_warp

        loss = l2_warp(loss, logits.unsqueeze(0), l2_penalty_factor)
    return loss


def _refuse(name: str, options: dict[str, Any]) -> None:
    check_unknown(name, {key: value for key, value in options.items() if value != _UNSUPPORTED.get(key)})
