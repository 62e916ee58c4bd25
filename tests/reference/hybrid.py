"""Small hybrids, and transformers' layers with their float32 places in float64."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from reference.toy import VOCABULARY
from torch import Tensor
from transformers import AutoConfig

from refine_verl.models import FastWeightActor, load_model, make_actor
from refine_verl.models.hybrid import DeltaRuleHybridAdapter

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "pad_token_id": None,
    "eos_token_id": None,
}
QWEN: dict[str, Any] = {
    **SIZES,
    "head_dim": 12,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
}
FLA: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_heads": 2,
    "vocab_size": VOCABULARY,
    "hidden_ratio": 2,
    "fuse_cross_entropy": False,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo_hybrid": (
        "olmo_hybrid",
        {
            **SIZES,
            "linear_num_value_heads": 4,
            "linear_value_head_dim": 12,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "qwen3_5_text": ("qwen3_5_text", QWEN),
    "qwen3_next": ("qwen3_next", {**QWEN, "num_experts": 0}),
    "delta_net": (
        "delta_net",
        {**FLA, "attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "rope_theta": 100.0}},
    ),
    "gated_deltanet": (
        "gated_deltanet",
        {**FLA, "head_dim": 16, "expand_v": 1.0, "attn": {"layers": [0, 2], "num_heads": 2}},
    ),
    "experts": ("qwen3_next", {**QWEN, **EXPERTS}),
}
"""``model_type`` and values, by a name."""

_MODULES = ("olmo_hybrid", "qwen3_5", "qwen3_next")


class InSegments(DeltaRuleHybridAdapter):
    """Without a trace: documents are read in segments and states are carried or replayed."""

    trace = None  # type: ignore[assignment]


class InPieces(DeltaRuleHybridAdapter):
    """As on a GPU: operators give out final states only and are cut, here around the stand-ins."""

    def cuts_operators(self) -> bool:
        return True


def hybrid_config(family: str, **values: object) -> Any:
    """A tiny configuration of ``family``."""
    kind, sizes = FAMILIES[family]
    config = AutoConfig.for_model(kind, **{**sizes, **values})
    config._experts_implementation = "eager"  # the other one wants float32
    return config


def hybrid_model(family: str, dtype: torch.dtype = torch.float64, **values: object) -> Any:
    """The same model every time, with larger weights than at initialisation: every part of it matters."""
    model = load_model(None, config=hybrid_config(family, **values), dtype=dtype, seed=1)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        for parameter in model.parameters():
            parameter.add_((0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)).to(dtype))
    return model.eval()


def hybrid_actor(family: str, **kwargs: Any) -> FastWeightActor:
    """`hybrid_model` as an actor, ``kwargs`` of `make_actor`."""
    return make_actor(hybrid_model(family), **kwargs)


class _Double:
    """``torch`` as a module of transformers sees it, with float64 for float32."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """What `flash_attn.flash_attn_func` computes, [B, L, heads, D], one score after the other."""
    assert causal and window_size == (-1, -1)
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    seen = torch.ones(scores.shape[-2:]).tril().bool()
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def _rotary(self: Any, q: Tensor, k: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """`fla.modules.RotaryEmbedding` by fla's own reference function."""
    from fla.modules.rotary.ops import rotary_embedding_ref

    precise = torch.promote_types(q.dtype, torch.float32)
    frequency = self.base ** -(torch.arange(0, self.dim, 2, dtype=precise) / self.dim)
    angle = torch.outer(torch.arange(q.shape[1], dtype=precise), frequency)
    turned = [rotary_embedding_ref(x, angle.cos().to(x.dtype), angle.sin().to(x.dtype)) for x in (q, k)]
    return turned[0], turned[1]


@contextmanager
def fla_attention() -> Iterator[None]:
    """Inside, fla's own attention layers run on PyTorch: for comparisons with the models' own forward function."""
    layers = importlib.import_module("fla.layers.attn")
    with (
        mock.patch.object(layers, "flash_attn_func", _attention),
        mock.patch.object(layers.RotaryEmbedding, "forward", _rotary),
    ):
        yield


@contextmanager
def precise() -> Iterator[None]:
    """Inside, what these models do in float32 whatever their dtype is (norms, gates, rotations, routers) is float64."""
    modules = [importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in _MODULES]
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        patches = [mock.patch.object(module, "torch", _Double()) for module in modules]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()
