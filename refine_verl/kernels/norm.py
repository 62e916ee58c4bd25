"""CPU stand-ins for fla's fused normalisations."""

from __future__ import annotations

from typing import Any

import torch


def _rstd(x: torch.Tensor, eps: float) -> torch.Tensor:
    """``1 / sqrt(mean(x^2) + eps)`` over the last axis, kept."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    """``x / rms(x) * weight + bias``, maybe times ``act(g)``; keeps only its inputs and one scalar a row."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        g: torch.Tensor | None,
        eps: float,
        activation: str,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        rstd = _rstd(x, eps)
        ctx.save_for_backward(x, weight, bias, g, rstd)
        ctx.activation = activation
        return _normalise(x, rstd, weight, bias, g, activation).to(out_dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, g, rstd = ctx.saved_tensors
        dy, width, d_g = dy.to(rstd.dtype), x.shape[-1], None
        if g is not None:
            gate = g.to(rstd.dtype)
            d_act = dy * _normalise(x, rstd, weight, bias, None, "")
            if ctx.activation == "sigmoid":
                act = torch.sigmoid(gate)
                d_g = torch.ops.aten.sigmoid_backward(d_act, act).to(g.dtype)
            else:
                act = torch.nn.functional.silu(gate)
                d_g = torch.ops.aten.silu_backward(d_act, gate).to(g.dtype)
            dy = dy * act
        x_hat = x * rstd
        product = dy * x_hat
        d_weight = None if weight is None else product.reshape(-1, width).sum(0).to(weight.dtype)
        d_bias = None if bias is None else dy.reshape(-1, width).sum(0).to(bias.dtype)
        if weight is None:
            along, dx = product.mean(-1, keepdim=True), dy.clone()
        else:
            scale = weight.to(rstd.dtype)
            along, dx = (product @ scale).div_(width).unsqueeze(-1), dy * scale
        dx = dx.addcmul_(x_hat, along, value=-1).mul_(rstd).to(x.dtype)
        return dx, d_weight, d_bias, d_g, None, None, None


def _normalise(
    x: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    g: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    y = x * rstd
    if weight is not None:
        y.mul_(weight)
    if bias is not None:
        y.add_(bias)
    if g is None:
        return y
    gate = g.to(rstd.dtype)
    return y.mul_(torch.sigmoid(gate) if activation == "sigmoid" else torch.nn.functional.silu(gate))


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    *,
    gate: torch.Tensor | None = None,
    activation: str = "",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``z = x + residual``, ``y = z / sqrt(mean(z^2) + eps) * weight + bias`` over the last axis.

    Computed in float32 (float64 for float64 inputs) whatever the input's dtype, like fla's kernel. ``gate`` and
    ``activation`` are those of `rms_norm_gated`.

    Returns:
        ``y`` in x's dtype; with ``prenorm`` also ``z`` in the residual's dtype (without a residual: x's, or
        float32 with ``residual_in_fp32``).
    """
    total = x
    if residual is not None:
        total = x.to(torch.promote_types(x.dtype, torch.float32)) + residual
    args = (total, weight, bias, gate)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args):
        y = _RMSNorm.apply(*args, eps, activation, x.dtype)
    else:
        y = _normalise(total, _rstd(total, eps), weight, bias, gate, activation).to(x.dtype)
    if not prenorm:
        return y
    if residual is not None:
        return y, total.to(residual.dtype)
    return y, total.float() if residual_in_fp32 else total


def rms_norm_gated(
    x: torch.Tensor,
    g: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str = "swish",
    residual: torch.Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` times ``act(g)``, ``act`` being ``swish`` (``silu``) or ``sigmoid``.

    Raises:
        ValueError: for another activation.
    """
    if activation not in ("swish", "silu", "sigmoid"):
        raise ValueError(f"rms_norm_gated: activation must be 'swish', 'silu' or 'sigmoid', got {activation!r}")
    return rms_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, gate=g, activation=activation)


def l2norm(x: torch.Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> torch.Tensor:
    """``x / sqrt(sum(x^2) + eps)`` over the last axis, computed in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)
    return y.to(output_dtype or x.dtype)
