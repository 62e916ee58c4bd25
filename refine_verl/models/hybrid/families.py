"""Two ways in which decoder layers are built, transformers' and fla's: how one of them runs from a state to a state."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from refine_verl.kernels.recording import last_states
from refine_verl.models.casts import cast_inputs_once
from refine_verl.models.hybrid.attention import NAME, AttentionOfLayer, AttentionPlan
from refine_verl.models.hybrid.mixers import MIXERS, LinearOfLayer, LinearState, Mixer
from refine_verl.models.hybrid.state import KeyValue, SharedKeys
from refine_verl.models.lact.attention import rotate
from refine_verl.models.packing import Packed
from refine_verl.models.recompute import OneLayerCache
from refine_verl.models.replaced import LayerForward, replaced_forward


@dataclass(frozen=True)
class Tokens:
    """What layers need to know of the tokens of a pass.

    Attributes:
        packed: the tokens.
        keep: whether the state after them is wanted.
        plan: of the attention layers.
        positions: int64 [B, L], of each token in its own sequence.
        rotations: what the model's trunk turns queries and keys by; None if its layers see to that, or nothing does.
    """

    packed: Packed
    keep: bool
    plan: AttentionPlan
    positions: Tensor
    rotations: Any

    @staticmethod
    def positions_of(packed: Packed, before: SharedKeys) -> Tensor:
        """int64 [B, L], after what ``before`` has read."""
        runs = [torch.arange(seen, seen + count) for seen, count in zip(before.seen, packed.lengths, strict=True)]
        return torch.cat(runs).view(packed.tokens.shape).to(packed.tokens.device, non_blocking=True)


class Family(Protocol):
    """How layers of one make run. ``forward`` is a layer's own, ``layer`` its module, ``hidden`` [B, L, d]."""

    def linear_layers(self, trunk: Any) -> list[bool]:
        """Of each layer whether it is a linear one."""
        ...

    def embed(self, trunk: Any, tokens: Tensor) -> Tensor:
        """[B, L, d]."""
        ...

    def rotations(self, trunk: Any, hidden: Tensor, positions: Tensor) -> Any:
        """See `Tokens`."""
        ...

    def linear(
        self, forward: LayerForward, layer: Any, tokens: Tokens, hidden: Tensor, before: LinearState | None
    ) -> tuple[Tensor, LinearState | None]:
        """A linear layer, and the state after it (None unless it is to be kept)."""
        ...

    def attention(
        self, forward: LayerForward, layer: Any, tokens: Tokens, hidden: Tensor, before: tuple[KeyValue, ...]
    ) -> tuple[Tensor, KeyValue]:
        """An attention layer, and the keys and values of the tokens."""
        ...

    def experts(self, layer: Any) -> nn.Module | None:
        """The experts of a layer and their router, ``experts`` and ``gate``; None if it has none."""
        ...


@dataclass(frozen=True)
class TransformersFamily:
    """Decoder layers have a ``linear_attn`` or a ``self_attn``, which asks transformers' interface for attention.

    Attributes:
        mixer: what a linear layer computes.
    """

    mixer: Mixer

    def linear_layers(self, trunk: Any) -> list[bool]:
        """See `Family`."""
        return [kind == "linear_attention" for kind in trunk.config.layer_types[: len(trunk.layers)]]

    def embed(self, trunk: Any, tokens: Tensor) -> Tensor:
        """See `Family`."""
        embedded: Tensor = trunk.embed_tokens(tokens)
        return embedded

    def rotations(self, trunk: Any, hidden: Tensor, positions: Tensor) -> Any:
        """See `Family`."""
        return None if trunk.rotary_emb is None else trunk.rotary_emb(hidden, positions)

    def linear(
        self, forward: LayerForward, layer: Any, tokens: Tokens, hidden: Tensor, before: LinearState | None
    ) -> tuple[Tensor, LinearState | None]:
        """See `Family`."""
        done = LinearOfLayer(tokens.packed, before, tokens.keep)
        with replaced_forward([layer.linear_attn], functools.partial(_mix, self.mixer, layer.linear_attn, done)):
            return forward(hidden, position_embeddings=tokens.rotations), done.after

    def attention(
        self, forward: LayerForward, layer: Any, tokens: Tokens, hidden: Tensor, before: tuple[KeyValue, ...]
    ) -> tuple[Tensor, KeyValue]:
        """See `Family`."""
        attention = AttentionOfLayer(tokens.plan, before)
        with _attends_to_shared_keys(layer.self_attn.config):
            out = forward(hidden, position_embeddings=tokens.rotations, refine_attention=attention)
        assert attention.made is not None
        return out, attention.made

    def experts(self, layer: Any) -> nn.Module | None:
        """See `Family`."""
        block: nn.Module = layer.mlp
        return block if hasattr(block, "experts") else None


class FlaFamily:
    """Blocks of fla have an ``attn``: the family's own mixer, with fla's cache, or softmax attention."""

    def linear_layers(self, trunk: Any) -> list[bool]:
        """See `Family`."""
        attention = attention_layers(trunk.config)
        return [index not in attention for index in range(len(trunk.layers))]

    def embed(self, trunk: Any, tokens: Tensor) -> Tensor:
        """See `Family`."""
        embedded: Tensor = trunk.embeddings(tokens)
        return embedded

    def rotations(self, trunk: Any, hidden: Tensor, positions: Tensor) -> None:
        """See `Family`."""

    def linear(
        self, forward: LayerForward, layer: Any, tokens: Tokens, hidden: Tensor, before: LinearState | None
    ) -> tuple[Tensor, LinearState | None]:
        """See `Family`."""
        if before is not None and not torch.is_grad_enabled() and max(tokens.packed.lengths) == 1:
            # fla's single-token decoding overwrites the convolution states it is given
            before = {name: _copied(part) if name == "conv_state" else part for name, part in before.items()}
        cache = OneLayerCache(layer.layer_idx, before) if before is not None or tokens.keep else None
        bounds = {} if tokens.packed.cu_seqlens is None else {"cu_seqlens": tokens.packed.cu_seqlens}
        with cast_inputs_once([layer]), last_states(tokens.keep):
            out, *_ = forward(hidden, past_key_values=cache, use_cache=cache is not None, **bounds)
        return out, cache.state if cache is not None and tokens.keep else None

    def attention(
        self, forward: LayerForward, layer: Any, tokens: Tokens, hidden: Tensor, before: tuple[KeyValue, ...]
    ) -> tuple[Tensor, KeyValue]:
        """See `Family`."""
        attention = AttentionOfLayer(tokens.plan, before)
        attend = functools.partial(_fla_attention, layer.attn, attention, tokens.positions)
        with replaced_forward([layer.attn], attend), cast_inputs_once([layer]):
            out, *_ = forward(hidden)
        assert attention.made is not None
        return out, attention.made

    def experts(self, layer: Any) -> None:
        """See `Family`."""


def family_of(config: PretrainedConfig) -> Family:
    """By what a model's layers are built of."""
    mixer = MIXERS.get(config.model_type)
    return FlaFamily() if mixer is None else TransformersFamily(mixer)


def attention_layers(config: Any) -> set[int]:
    """Numbers of the layers of a model of fla that are softmax attention (``attn`` of its configuration)."""
    specs = getattr(config, "attn", None) or []
    return {layer for spec in ([specs] if isinstance(specs, dict) else specs) for layer in spec["layers"]}


def _mix(mixer: Mixer, module: Any, done: LinearOfLayer, _: Any, __: int, hidden_states: Tensor, **___: Any) -> Tensor:
    return mixer(module, done, hidden_states)


@contextmanager
def _attends_to_shared_keys(config: Any) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _fla_attention(
    module: Any,
    attention: AttentionOfLayer,
    positions: Tensor,
    _: LayerForward,
    __: int,
    hidden_states: Tensor,
    past_key_values: Any = None,
    **___: Any,
) -> tuple[Tensor, None, Any]:
    """fla's softmax attention, [B, L, d], with its parameters and without flash-attn."""
    q, k, v = (
        projection(hidden_states).unflatten(-1, (-1, module.head_dim))
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    if module.qk_norm:
        q, k = module.q_norm(q), module.k_norm(k)
    precise = torch.promote_types(v.dtype, torch.float32)
    exponent = torch.arange(0, module.head_dim, 2, device=v.device, dtype=precise) / module.head_dim
    angle = positions.to(precise)[..., None, None] * (1.0 / module.rotary.base**exponent)
    table = angle.cos().to(v.dtype), angle.sin().to(v.dtype)
    out = attention(rotate(q, table), rotate(k, table), v, module.head_dim**-0.5)
    return module.o_proj(out.flatten(2)), None, past_key_values


def _copied(part: Any) -> Any:
    return part.clone() if isinstance(part, Tensor) else None if part is None else tuple(_copied(x) for x in part)
