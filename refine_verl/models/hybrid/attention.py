"""How rows attend to keys and values that they share: each to its own part of them, and to what it reads itself.

The rows of one document make a group. Its keys are those parts of the shared buffers that any row of it refers to,
once, and the tokens that are read; a mask says which of them a token sees. Keys and values are therefore brought
together at most once for each document and layer, never for each rollout.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from refine_verl.models.hybrid.state import KeyValue, SharedKeys, Stretch

NAME = "refine_verl_shared_keys"
"""Under which transformers knows this attention; it builds no masks for names that it does not know."""


@dataclass(frozen=True)
class Group:
    """Rows that attend to the same keys.

    Attributes:
        tokens: what they read, as (first, stop) stretches of the tokens of the pass.
        spans: (buffer, first, stop) of what they read before.
        mask: bool [tokens, keys], whether a token sees a key; None: all before it and itself (``causal``), or all.
        causal: see there.
    """

    tokens: tuple[tuple[int, int], ...]
    spans: tuple[tuple[int, int, int], ...]
    mask: Tensor | None
    causal: bool

    @staticmethod
    def of(rows: Sequence[int], keys: SharedKeys, starts: Sequence[int], lengths: Sequence[int]) -> Group:
        """Of the rows ``rows`` of a pass, in which row r reads ``lengths[r]`` tokens from ``starts[r]`` on."""
        spans = _union([stretch for row in rows for stretch in keys.stretches[row]])
        tokens = _joined([(starts[row], starts[row] + lengths[row]) for row in rows])
        if not spans and len(rows) == 1:
            return Group(tokens, (), None, causal=lengths[rows[0]] > 1)
        before = torch.zeros(len(rows), sum(stop - first for _, first, stop in spans), dtype=torch.bool)
        columns = list(itertools.accumulate((stop - first for _, first, stop in spans), initial=0))
        for place, row in enumerate(rows):
            for buffer, first, count in keys.stretches[row]:
                span = next(i for i, (b, lo, hi) in enumerate(spans) if b == buffer and lo <= first < hi)
                column = columns[span] + first - spans[span][1]
                before[place, column : column + count] = True
        sizes = torch.tensor([lengths[row] for row in rows])
        owner = torch.arange(len(rows)).repeat_interleave(sizes)
        places = torch.arange(len(owner))
        own = (owner[:, None] == owner) & (places <= places[:, None])
        mask = torch.cat([before.index_select(0, owner), own], dim=1)
        return Group(tokens, spans, None if bool(mask.all()) else mask, causal=False)


@dataclass(frozen=True)
class AttentionPlan:
    """What all attention layers of one pass need to know; made of integers alone.

    Attributes:
        groups: of rows.
        order: int64 [tokens], from the order of the groups to that of the pass; None if they are the same.
    """

    groups: tuple[Group, ...]
    order: Tensor | None

    @staticmethod
    def of(keys: SharedKeys, lengths: Sequence[int], device: torch.device) -> AttentionPlan:
        """For rows of ``keys`` that read ``lengths`` tokens each, concatenated."""
        starts = [0, *itertools.accumulate(lengths)]
        together: dict[tuple[int, ...], list[int]] = {}
        for row, stretches in enumerate(keys.stretches):
            # rows with the same beginning are those of one document; others share nothing
            key = stretches[0][:2] if stretches else (-1, row)
            together.setdefault(key, []).append(row)
        groups = [Group.of(rows, keys, starts, lengths) for rows in together.values()]
        places = torch.cat([torch.arange(*span) for group in groups for span in group.tokens])
        in_order = bool((places == torch.arange(len(places))).all())
        moved = [_on(group, device) for group in groups]
        return AttentionPlan(tuple(moved), None if in_order else places.argsort().to(device, non_blocking=True))


def attend(plan: AttentionPlan, query: Tensor, new: KeyValue, buffers: Sequence[KeyValue], scale: float) -> Tensor:
    """Softmax attention of the tokens of a pass.

    Args:
        plan: of the pass.
        query: [tokens, heads, D].
        new: keys and values of these tokens, [tokens, H, D]; ``heads`` is a multiple of H.
        buffers: those that were read before.
        scale: of the scores.

    Returns:
        [tokens, heads, D], differentiable with respect to all tensors.
    """
    outputs = []
    for group in plan.groups:
        keys, values = (
            _cat(
                [
                    *(buffers[buffer][part][first:stop] for buffer, first, stop in group.spans),
                    *(new[part][first:stop] for first, stop in group.tokens),
                ]
            )
            for part in (0, 1)
        )
        # heads that share keys become a batch of views of them: PyTorch would repeat keys and values on a CPU
        asking = _cat([query[first:stop] for first, stop in group.tokens]).unflatten(1, (keys.shape[1], -1))
        keys, values = (x.transpose(0, 1).expand(asking.shape[2], -1, -1, -1) for x in (keys, values))
        found = scaled_dot_product_attention(
            asking.permute(2, 1, 0, 3), keys, values, attn_mask=group.mask, is_causal=group.causal, scale=scale
        )
        outputs.append(found.permute(2, 1, 0, 3).flatten(1, 2))
    out = _cat(outputs)
    return out if plan.order is None else out.index_select(0, plan.order)


class AttentionOfLayer:
    """What the attention of one layer reads and leaves behind; the layer's module hands it to `through_interface`.

    Attributes:
        plan: of the pass.
        buffers: keys and values of what was read before.
        made: those of the tokens of the pass, once the layer has run.
    """

    def __init__(self, plan: AttentionPlan, buffers: Sequence[KeyValue]) -> None:
        self.plan, self.buffers = plan, buffers
        self.made: KeyValue | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[B, L, heads, D] from queries, and keys and values as they are stored, [B, L, H, D]."""
        # with autocast queries and keys may come out of their rotation in float32
        self.made = key.flatten(0, 1).to(value.dtype), value.flatten(0, 1)
        out = attend(self.plan, query.flatten(0, 1).to(value.dtype), self.made, self.buffers, scale)
        return out.unflatten(0, query.shape[:2])


def through_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    refine_attention: AttentionOfLayer,
    **_: Any,
) -> tuple[Tensor, None]:
    """`AttentionOfLayer` as an attention function of transformers: [B, heads, L, D] to [B, L, heads, D]."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return refine_attention(query, key, value, scaling), None


AttentionInterface.register(NAME, through_interface)


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _union(stretches: Sequence[Stretch]) -> tuple[tuple[int, int, int], ...]:
    """The tokens of all stretches, as (buffer, first, stop), each token once."""
    spans: list[tuple[int, int, int]] = []
    for buffer, first, count in sorted(set(stretches)):
        if spans and spans[-1][0] == buffer and first <= spans[-1][2]:
            spans[-1] = (buffer, spans[-1][1], max(spans[-1][2], first + count))
        else:
            spans.append((buffer, first, first + count))
    return tuple(spans)


def _joined(spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The same tokens in the same order, neighbouring stretches as one."""
    joined: list[tuple[int, int]] = []
    for first, stop in spans:
        if joined and joined[-1][1] == first:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((first, stop))
    return tuple(joined)


def _on(group: Group, device: torch.device) -> Group:
    if group.mask is None:
        return group
    return Group(group.tokens, group.spans, group.mask.to(device, non_blocking=True), group.causal)
