"""What fla's delta-rule kernels keep and use on a GPU, as shapes: for counting bytes where no GPU is needed.

Written from fla 0.6's `ChunkDeltaRuleFunction` and `ChunkGatedDeltaRuleFunction`: q, k, v, beta (g), the normalisation
factors and the matrix A of every 64 tokens are saved; everything else, the states before the chunks included, is
computed again in the backward pass.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from refine_verl.kernels.operators import recorded
from refine_verl.models.head import chunk_elements

CHUNK = 64
NAMES = {
    "fla.layers.delta_net": ("chunk_delta_rule", "fused_recurrent_delta_rule"),
    "fla.layers.gated_deltanet": ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"),
}


class _ChunkRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor | None, finals: int
    ) -> tuple[Tensor, Tensor | None]:
        batch, tokens, heads, width = v.shape
        inverse = v.new_empty(batch, tokens, heads, min(CHUNK, tokens))
        work = [torch.empty_like(k), torch.empty_like(v), torch.empty_like(v)]  # w, u, new values
        work.append(_chunk_states(k, v))
        running = None if g is None else torch.empty_like(g, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, beta, running, inverse, state)
        out = torch.empty_like(v)
        del work
        last = v.new_empty(finals, heads, k.shape[-1], width, dtype=torch.float32) if finals else None
        ctx.set_materialize_grads(False)
        return out, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> tuple[Any, ...]:
        q, k, v, beta, running, _, state = ctx.saved_tensors
        work = [torch.empty_like(k), torch.empty_like(v), torch.empty_like(v), _chunk_states(k, v), _chunk_states(k, v)]
        work += [torch.empty_like(v), torch.empty_like(k), torch.empty_like(k)]
        grads = [torch.empty_like(tensor) for tensor in (q, k, v, beta)]
        d_g = None if running is None else torch.empty_like(running)
        del work
        return (*grads, d_g, None if state is None else torch.empty_like(state), None)


def _chunk_states(k: Tensor, v: Tensor) -> Tensor:
    batch, tokens, heads, width = v.shape
    return v.new_empty(batch, -(-tokens // CHUNK), heads, k.shape[-1], width)


def _rule(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    state_v_first: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    rows = v.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    out, final = _ChunkRule.apply(q, k, v, beta, g, initial_state, rows if output_final_state else 0)
    return out, final.mT.contiguous() if final is not None and state_v_first else final


def _named(name: str) -> Any:
    """`_rule` under the name of the operator it is for."""
    rule = functools.wraps(_rule)(lambda **given: _rule(**given))
    rule.__name__ = name
    return rule


@contextlib.contextmanager
def gpu_delta_rules() -> Iterator[None]:
    """Have the shapes in place of the CPU's delta rules, and a GPU's chunks of logits, inside a ``with`` block."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("refine_verl.models.head.chunk_elements", lambda _: chunk_elements("cuda")))
        for module, names in NAMES.items():
            for name in names:
                stack.enter_context(mock.patch(f"{module}.{name}", recorded(_named(name))))
        yield
