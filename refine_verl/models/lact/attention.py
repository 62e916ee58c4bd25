"""Sliding-window attention from a state: a query sees itself and the W-1 tokens before it.

Long runs of tokens are cut into blocks of half a window; a block attends to itself and the two before it, so memory
grows with T * W. Short ones (decoding, branches) attend to the state where it lies, in two matmuls, and are put
into the tail of the state instead of moving the window. As with the fast weights, everything that only depends on
lengths and positions is worked out once per pass.

Shapes: H attention heads of D features, R rows, P slots of a window buffer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from refine_verl.models.lact.attention_plan import Group, LongPlan, Plan, ShortPlan
from refine_verl.models.lact.state import LayerState
from refine_verl.models.lact.take import Take

Pair = tuple[Tensor, Tensor]


def rotary_table(positions: Tensor, config: Any, dtype: torch.dtype) -> Pair:
    """cos and sin [tokens, 1, D / 2] for positions [tokens], computed in at least float32 and rounded to ``dtype``."""
    precise = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=precise) / config.head_dim
    angle = positions.to(precise)[:, None, None] * (1.0 / config.rope_theta**exponent)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, table: Pair) -> Tensor:
    """x [tokens, H, D]: features i and i + D/2 are turned together; computed in at least float32."""
    out = _Rotate.apply(x, *table)
    assert isinstance(out, Tensor)
    return out


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back, so nothing but the angles is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        precise = torch.promote_types(x.dtype, torch.float32)
        cos, sin = cos.to(precise), sin.to(precise)
        out = torch.empty_like(x, dtype=precise, memory_format=torch.contiguous_format)
        first, second = x.to(precise).chunk(2, dim=-1)
        one, other = out.chunk(2, dim=-1)
        torch.mul(first, cos, out=one).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=other).addcmul_(first, sin)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grad, cos, -sin), None, None


def attend(
    plan: Plan | None, state: LayerState, window: int | None, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, LayerState]:
    """Carry out a plan in one layer.

    Args:
        plan: of this pass.
        state: of this layer before the pass.
        window: W.
        q, k, v: rotated queries and keys, and values, [tokens, H, D].

    Returns:
        [tokens, H, D] and ``state`` with window and tail of after the pass.
    """
    if plan is None:
        return v, state
    return _short(plan, state, q, k, v) if isinstance(plan, ShortPlan) else _long(plan, state, window, q, k, v)


def _short(plan: ShortPlan, state: LayerState, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, LayerState]:
    rows, length, near = plan.shape
    q = plan.queries(q).unflatten(0, (rows, length))
    kept = [
        plan.near(new if state.tail is None else torch.cat([state.tail[i].flatten(0, 1), new])).unflatten(
            0, (rows, near)
        )
        for i, new in enumerate((k, v))
    ]
    outputs = [_short_group(group, state, q, kept[0], kept[1]) for group in plan.groups]
    out = plan.back(torch.cat(outputs) if len(outputs) > 1 else outputs[0])
    return out, replace(state, tail=(kept[0], kept[1]))


def _short_group(group: Group, state: LayerState, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [R, L, H, D], near k and v [R, n, H, D] -> [U * G * L, H, D]."""
    q, k, v = (
        group.rows(part).unflatten(0, group.grid).permute(0, 3, 1, 2, 4) for part in (q, k, v)
    )  # [U, H, G, L, D]
    q = q * q.shape[-1] ** -0.5
    masks, scores = [group.near], [q @ k.mT]
    base = None
    if group.base is not None:
        base = state.window[group.buffer]
        if group.values is not None:
            base = (base[0].index_select(0, group.values), base[1].index_select(0, group.values))
        masks.insert(0, group.base)
        scores.insert(0, (q.flatten(2, 3) @ base[0].to(q.dtype).mT).unflatten(2, q.shape[2:4]))
    mask, score = torch.cat(masks, dim=-1), torch.cat(scores, dim=-1)
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    # not -inf: a place without a row sees nothing at all
    weights = score.masked_fill(~mask, torch.finfo(score.dtype).min).softmax(dim=-1).to(v.dtype)
    split = 0 if base is None else base[0].shape[2]
    out = weights[..., split:] @ v
    if base is not None:
        out = out + (weights[..., :split].flatten(2, 3) @ base[1].to(v.dtype)).unflatten(2, q.shape[2:4])
    return out.permute(0, 2, 3, 1, 4).flatten(0, 2)


def _long(
    plan: LongPlan, state: LayerState, window: int | None, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, LayerState]:
    def whole(i: int, new: Tensor) -> Tensor:
        parts = [state.window[b][i].transpose(1, 2).flatten(0, 1) for b in plan.buffers]
        parts += [state.tail[i].flatten(0, 1)] if state.tail else []
        return torch.cat([*parts, new]).to(new.dtype) if parts else new

    keys, values = whole(0, k), whole(1, v)
    if plan.packed is not None and q.dtype in (torch.float16, torch.bfloat16):
        out = _flash(plan.packed, window, q, keys, values)
    else:
        out = plan.queries.inverse(torch.cat(_blocks(plan, plan.queries(q), keys, values)))
    if plan.window is None:
        return out, state
    take, rows = plan.window, (-1, plan.slots)
    kept = tuple(take(part).unflatten(0, rows).transpose(1, 2).contiguous() for part in (keys, values))
    return out, replace(state, window=((kept[0], kept[1]),), tail=None)


def _blocks(plan: LongPlan, q: Tensor, keys: Tensor, values: Tensor) -> list[Tensor]:
    """Outputs in the order of ``plan.queries``, [.., H, D] each."""
    rows, length = plan.starts
    outputs, at = [], rows * length
    if at:
        parts = (q[:at], plan.start_keys(keys), plan.start_keys(values))
        out = _sdpa(*(part.unflatten(0, (rows, length)) for part in parts), is_causal=True)
        outputs.append(out)
    if len(plan.plain) + len(plan.masked):
        blocks = [plan.blocks(part).unflatten(0, (-1, plan.size)) for part in (keys, values)]
        for triples, mask in ((plan.plain, plan.band), (plan.masked, plan.holes)):
            if len(triples):
                count = len(triples) // 3
                mine = [part.index_select(0, triples).unflatten(0, (count, 3)).flatten(1, 2) for part in blocks]
                queries = q[at : at + count * plan.size].unflatten(0, (count, plan.size))
                outputs.append(_sdpa(queries, *mine, attn_mask=mask))
                at += count * plan.size
    return outputs


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    """[rows, tokens, H, D] -> [rows * tokens, H, D]."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **kwargs).transpose(1, 2).flatten(0, 1)


def _flash(
    packed: tuple[Take, Tensor, Tensor, int, int], window: int | None, q: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    take, borders_q, borders_k, longest_q, longest_k = packed
    out = flash_attn_varlen_func(
        q,
        take(keys),
        take(values),
        cu_seqlens_q=borders_q,
        cu_seqlens_k=borders_k,
        max_seqlen_q=longest_q,
        max_seqlen_k=longest_k,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )
    assert isinstance(out, Tensor)
    return out
