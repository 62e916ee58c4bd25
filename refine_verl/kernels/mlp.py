"""CPU stand-ins for fla's SwiGLU operators."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def _swiglu(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.silu(x).mul_(y)


class _SwiGLULinear(torch.autograd.Function):
    """``(silu(x) * y) W^T + b``; the product, the widest tensor of a block, is recomputed instead of kept."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(
        ctx: Any, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, y, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(_swiglu(x, y), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(  # type: ignore[override]  # custom_bwd is untyped
        ctx: Any, d_out: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x, y, weight = ctx.saved_tensors
        d_x = d_y = d_weight = d_bias = None
        rows = d_out.reshape(-1, d_out.shape[-1])
        if ctx.needs_input_grad[2]:
            d_weight = torch.mm(rows.t(), _swiglu(x, y).reshape(-1, x.shape[-1])).to(weight.dtype)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            dz = torch.mm(rows, weight).to(x.dtype).view_as(x)
            d_x, d_y = torch.ops.aten.silu_backward(dz * y, x), _swiglu(x, dz)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
            d_bias = rows.sum(0).to(ctx.bias_dtype)
        return d_x, d_y, d_weight, d_bias


def swiglu(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``silu(x) * y`` for tensors of one shape and dtype."""
    return F.silu(x) * y


def swiglu_linear(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``linear(silu(x) * y, weight, bias)`` for ``[..., I]`` inputs and an ``[O, I]`` weight."""
    if not torch.is_grad_enabled():
        return F.linear(_swiglu(x, y), weight, bias)
    return _SwiGLULinear.apply(x, y, weight, bias)
