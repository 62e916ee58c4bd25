"""CPU stand-ins for fla's fused cross-entropy losses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_ROWS_PER_CHUNK = 1024
# Rows of logits that `fused_linear_cross_entropy_loss` holds at a time.


def _refuse_sharded(name: str, process_group: Any) -> None:
    if process_group is not None:
        raise NotImplementedError(f"{name} on the CPU does not support a vocabulary sharded over a process group")


def cross_entropy_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    logit_softcapping: float | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unreduced cross-entropy of ``[N, V]`` logits and ``[N]`` targets, computed in float32 at least.

    Args:
        logits, target: see above.
        label_smoothing: weight of the uniform distribution in the target.
        logit_scale, logit_softcapping: logits become ``cap * tanh(scale * logits / cap)``.
        lse_square_scale: coefficient of the squared log-sum-exp, part of the loss.
        ignore_index: target that contributes neither loss nor gradient.
        inplace_backward: accepted for fla's signature; logits are never overwritten.
        process_group: must be ``None``.

    Returns:
        The loss and its z-loss part (detached), both ``[N]``.
    """
    del inplace_backward
    _refuse_sharded("cross_entropy_loss", process_group)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if logit_softcapping is not None:
        logits = logit_softcapping * torch.tanh(logits / logit_softcapping)
    loss = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
    if lse_square_scale == 0.0:
        return loss, torch.zeros_like(loss)
    z_loss = lse_square_scale * torch.logsumexp(logits, -1).square()
    z_loss = z_loss.masked_fill(target == ignore_index, 0.0)
    return loss + z_loss, z_loss.detach()


def cross_entropy_forward(
    self: Any, input: torch.Tensor, target: torch.Tensor
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``FusedCrossEntropyLoss.forward``, whose original asserts that its tensors are on an accelerator."""
    losses = cross_entropy_loss(
        input,
        target,
        self.label_smoothing,
        self.logit_scale,
        self.lse_square_scale,
        self.logit_softcapping,
        self.ignore_index,
        self.inplace_backward,
        self.process_group,
    )
    if self.reduction != "none":
        count = (target != self.ignore_index).sum() if self.reduction == "mean" else 1
        losses = (losses[0].sum() / count, losses[1].sum() / count)
    return losses if self.return_z_loss else losses[0]


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss of ``linear(x, weight, bias)``; its gradients are computed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        divisor: torch.Tensor,
        options: dict[str, Any],
        l2_factor: float,
    ) -> torch.Tensor:
        params = [weight] if bias is None else [weight, bias]
        leaves = [p.detach().requires_grad_() for p in params]
        d_params = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]
        d_x, total = torch.empty_like(x), d_params[0].new_zeros(())
        for start in range(0, len(x), _ROWS_PER_CHUNK):
            rows = slice(start, start + _ROWS_PER_CHUNK)
            with torch.enable_grad():
                part = x[rows].detach().requires_grad_()
                logits = F.linear(part, *leaves)
                loss = cross_entropy_loss(logits, target[rows], **options)[0].sum() / divisor
                # The L2 pull on the largest logit has a gradient but no value, as in fla.
                pull = logits.max(-1).values.to(loss.dtype).square().sum() * (0.5 * l2_factor / len(x))
                grads = torch.autograd.grad(loss + pull if l2_factor else loss, [part, *leaves])
            total += loss.detach()
            d_x[rows] = grads[0]
            for accumulator, grad in zip(d_params, grads[1:], strict=True):
                accumulator.add_(grad)
        ctx.save_for_backward(d_x, *(d.to(p.dtype) for d, p in zip(d_params, params, strict=True)))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_x, d_weight, *d_bias = (saved * d_loss.to(saved.dtype) for saved in ctx.saved_tensors)
        return d_x, None, d_weight, d_bias[0] if d_bias else None, None, None, None


def fused_linear_cross_entropy_loss(
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    logit_softcapping: float | None = None,
    num_chunks: int = 8,
    reduction: str = "mean",
    use_l2warp: bool = False,
    l2_penalty_factor: float = 1e-4,
    accumulate_grad_in_fp32: bool = True,
    process_group: Any = None,
) -> torch.Tensor:
    """Cross-entropy of ``linear(x, weight, bias)`` that never holds the logits of all rows.

    Args:
        x: ``[N, D]``.
        target: ``[N]``.
        weight, bias: ``[V, D]`` and ``[V]``.
        ignore_index, label_smoothing, logit_scale, logit_softcapping: see `cross_entropy_loss`.
        num_chunks, accumulate_grad_in_fp32: accepted for fla's signature; chunks have a fixed number of rows,
            and parameter gradients are always accumulated in float32 at least.
        reduction: ``"mean"`` over the targets that count, or ``"sum"``.
        use_l2warp, l2_penalty_factor: pull the largest logit of each row towards zero (gradient only).
        process_group: must be ``None``.

    Returns:
        The scalar loss.
    """
    del num_chunks, accumulate_grad_in_fp32
    _refuse_sharded("fused_linear_cross_entropy_loss", process_group)
    counted = (target != ignore_index).sum().clamp_min(1)
    options = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "logit_scale": logit_scale,
        "logit_softcapping": logit_softcapping,
    }
    divisor = counted if reduction == "mean" else torch.ones_like(counted)
    return _LinearCrossEntropy.apply(
        x, target, weight, bias, divisor, options, l2_penalty_factor if use_l2warp else 0.0
    )
