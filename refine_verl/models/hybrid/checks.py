"""Which hybrids are supported, told from a configuration before there is a model."""

from __future__ import annotations

from typing import Any

import transformers
from packaging.version import Version

from refine_verl.config.refusals import with_article
from refine_verl.models.hybrid.families import attention_layers

TESTED = Version("5.10"), Version("5.11")
"""From (inclusive), to (exclusive): the versions of transformers whose layers this package has been run with."""

KINDS = {"linear_attention", "full_attention"}
"""Layers of a hybrid: those with a state, and those whose keys and values are kept."""

_TEXT_ALONE = (
    "it also reads images, which nothing here trains. Save its text model and give that: "
    "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(TEXT_DIR)"
)
_NOT_IN_TRANSFORMERS = "transformers does not have it (5.10), and code that comes with a checkpoint is not run"
HYBRIDS_NOT_SUPPORTED = {
    "qwen3_5": _TEXT_ALONE,
    "qwen3_5_moe": "it also reads images, and its text model is none of those supported",
    "qwen3_5_moe_text": "forked states of a Qwen3.5 with experts have not been compared with recomputed ones",
    **dict.fromkeys(("kimi_linear", "jet_nemotron", "minicpm_sala", "ring_linear"), _NOT_IN_TRANSFORMERS),
    **dict.fromkeys(
        (
            "bamba",
            "falcon_h1",
            "granitemoehybrid",
            "jamba",
            "lfm2",
            "lfm2_moe",
            "minimax",
            "nemotron_h",
            "recurrent_gemma",
            "zamba2",
        ),
        "its linear layers are not delta rules, and forked states of it have not been compared with recomputed ones",
    ),
}
"""Hybrids without an adapter, and why."""


def why_not_supported(config: Any) -> str | None:
    """Why a hybrid of a supported family is refused, and what to do; None if it is not.

    Args:
        config: with ``layer_types``.
    """
    kind, layers = config.model_type, list(config.layer_types)
    first, after = TESTED
    if not first <= Version(transformers.__version__) < after:
        return (
            f"{with_article(kind)} runs layers of transformers, and this package has been tried with transformers "
            f">={first},<{after}; {transformers.__version__} is installed. Install one of these."
        )
    if unknown := sorted(set(layers) - KINDS):
        return (
            f"this {kind} has layers of the kind {', '.join(unknown)} (layer_types). Supported are full_attention and "
            "linear_attention: no sliding windows."
        )
    if "linear_attention" not in layers:
        return f"this {kind} has no linear layer (layer_types), so there are no fast weights to train."
    if "full_attention" not in layers:
        return f"this {kind} has no attention layer (layer_types): it is no hybrid. gated_deltanet is one without them."
    for whole, part in (
        ("num_attention_heads", "num_key_value_heads"),
        ("linear_num_value_heads", "linear_num_key_heads"),
    ):
        if getattr(config, whole) % getattr(config, part):
            return f"{whole}={getattr(config, whole)} of this {kind} is no multiple of {part}={getattr(config, part)}."
    if getattr(config, "num_experts", 0) and config.num_experts_per_tok > config.num_experts:
        return f"num_experts_per_tok={config.num_experts_per_tok} is more than this {kind} has: {config.num_experts}."
    if config.attention_dropout:
        return f"attention_dropout={config.attention_dropout}: a fork would differ from its prefix. Set it to 0."
    if config.hidden_act != "silu":
        return f"hidden_act={config.hidden_act}: short convolutions with silu alone are supported."
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        return (
            f"rope_type={rope} turns keys by the length of the whole text, which forks and prefixes of "
            "it do not share. Supported are rotations that depend on a token's own position."
        )
    return None


def attention_not_supported(config: Any) -> str | None:
    """Why a model of fla with layers of softmax attention is refused, and what to do; None if it is not.

    Args:
        config: with ``attn``.
    """
    kind, specs = config.model_type, [config.attn] if isinstance(config.attn, dict) else config.attn
    for spec in specs:
        if config.hidden_size % spec.get("num_heads", 1):
            return f"num_heads={spec['num_heads']} of config.attn does not divide hidden_size={config.hidden_size}."
    if windows := sorted({spec["window_size"] for spec in specs if spec.get("window_size") is not None}):
        return (
            f"the attention layers of this {kind} have a sliding window (window_size={windows[0]} of config.attn). "
            "Supported are layers that see all tokens before."
        )
    if len(attention_layers(config)) >= config.num_hidden_layers:
        return f"all layers of this {kind} are softmax attention (config.attn), so there are no fast weights to train."
    if getattr(config, "attnres_block_size", None) is not None:
        return f"this {kind} has both attention layers (config.attn) and attnres_block_size, which is not supported."
    return None
