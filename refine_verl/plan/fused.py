"""What PyTorch's fused attention and its products with experts keep, as shapes.

Asked with fake tensors, PyTorch takes the attention that keeps all scores, and refuses the products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty_like(q)
        added = None if mask is None else q.new_empty(mask.shape)  # what a mask of true and false becomes
        ctx.save_for_backward(q, k, v, out, added, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return *(x.new_empty(x.shape) for x in (q, k, v)), None


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, **_: Any) -> Tensor:
    out = _Fused.apply(q, k, v, attn_mask)
    assert isinstance(out, Tensor)
    return out


@contextmanager
def fused_kernels() -> Iterator[None]:
    """Have shapes in place of the attention and the experts of hybrids inside a ``with`` block."""
    with (
        mock.patch("refine_verl.models.hybrid.attention.scaled_dot_product_attention", _attention),
        # fake tensors are refused in float32; as many rows times one expert's matrix are as large
        mock.patch("torch.nn.functional.grouped_mm", lambda rows, experts, **_: rows @ experts[0]),
    ):
        yield
