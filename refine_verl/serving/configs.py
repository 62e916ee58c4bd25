"""Configurations of fla's DeltaNet and Gated DeltaNet, read without fla, and which of them vLLM's layer computes.

Importing fla takes some ten seconds, and vLLM calls plug-ins in each of its processes, whatever they serve.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

CPU_HEADS = (64, 128)
"""The widths of heads that vLLM's CPU kernels take, keys as wide as values."""

_SHARED: dict[str, Any] = {
    "hidden_size": 2048,
    "use_short_conv": True,
    "allow_neg_eigval": False,
    "conv_size": 4,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "hidden_act": "swish",
    "norm_eps": 1e-6,
    "attn": None,
    "vocab_size": 32000,
    "attnres_block_size": None,
}


class _ServedConfig(PretrainedConfig):
    """Fields and defaults are fla's; those that choose among kernels are kept as attributes.

    ``max_position_embeddings`` is not: these models have no positions, and vLLM would take it for a limit.
    """

    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, **values: Any) -> None:
        values.pop("max_position_embeddings", None)
        values = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "tie_word_embeddings": False} | values
        for name, default in (_SHARED | self.defaults).items():
            setattr(self, name, values.pop(name, default))
        super().__init__(**values)


class DeltaNetConfig(_ServedConfig):
    """``delta_net`` of fla 0.6."""

    model_type = "delta_net"
    defaults: ClassVar[dict[str, Any]] = {
        "expand_k": 1.0,
        "expand_v": 1.0,
        "use_gate": False,
        "use_beta": True,
        "num_heads": 16,
        "qk_norm": "l2",
        "qk_activation": "silu",
        "num_hidden_layers": 24,
    }

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)


class GatedDeltaNetConfig(_ServedConfig):
    """``gated_deltanet`` of fla 0.6."""

    model_type = "gated_deltanet"
    defaults: ClassVar[dict[str, Any]] = {
        "expand_v": 2.0,
        "use_gate": True,
        "head_dim": 256,
        "num_heads": 6,
        "num_v_heads": None,
        "num_hidden_layers": 21,
        "output_gate_activation": "swish",
    }

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)


class LaCTConfig(_ServedConfig):
    """``lact_swiglu``, known so that it is refused with the reason."""

    model_type = "lact_swiglu"
    defaults: ClassVar[dict[str, Any]] = {"num_hidden_layers": 24}

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)


CONFIGS: tuple[type[PretrainedConfig], ...] = (DeltaNetConfig, GatedDeltaNetConfig, LaCTConfig)


def register_configs() -> None:
    """Make the families' configurations known to transformers, where fla has not done so; may be called again."""
    for config in CONFIGS:
        if config.model_type not in CONFIG_MAPPING:
            AutoConfig.register(config.model_type, config)


@dataclass(frozen=True)
class LayerSettings:
    """What vLLM's gated-delta-net layer reads from a configuration, by the names it reads."""

    hidden_size: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    rms_norm_eps: float
    output_gate_type: str
    hidden_act: str = "silu"


def has_decay(config: PretrainedConfig) -> bool:
    """Whether the states of this model decay: Gated DeltaNet's do, DeltaNet's do not."""
    return bool(config.model_type == "gated_deltanet")


def layer_settings(config: PretrainedConfig) -> LayerSettings:
    """The settings of vLLM's layer that computes a layer of this model.

    Args:
        config: of one of the two families, fla's own class or this module's.
    """
    heads = config.num_heads
    if has_decay(config):
        value_heads, key_dim = config.num_v_heads or heads, config.head_dim
        value_dim, gate = int(config.head_dim * config.expand_v), config.output_gate_activation
    else:
        value_heads, key_dim = heads, round(config.hidden_size * config.expand_k) // heads
        value_dim, gate = round(config.hidden_size * config.expand_v) // heads, "swish"
    return LayerSettings(
        hidden_size=config.hidden_size,
        linear_num_key_heads=heads,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=key_dim,
        linear_value_head_dim=value_dim,
        linear_conv_kernel_dim=config.conv_size,
        rms_norm_eps=config.norm_eps,
        # without a gate: sigmoid(0) = 1/2, and the norm's weight is doubled
        output_gate_type=("silu" if gate in ("swish", "silu") else gate) if config.use_gate else "sigmoid",
    )


def mlp_size(config: PretrainedConfig) -> int:
    """Inner width of the MLPs: as given, or the multiple of 256 at or above 2/3 of ``hidden_ratio`` widths."""
    if config.intermediate_size is not None:
        return int(config.intermediate_size)
    return 256 * -(-int(config.hidden_size * (config.hidden_ratio or 4) * 2 / 3) // 256)


def why_not_served(config: PretrainedConfig) -> str | None:
    """What of a model vLLM's layer does not compute, and what to do; None if it serves the model."""
    if config.model_type == "lact_swiglu":
        return (
            "LaCT's memory is an MLP trained on chunks of the text, and vLLM has no layer that computes it. Generate "
            "with this package (docs/evaluation.md)."
        )
    problems = [text for field, bad, text in _problems(config) if bad(getattr(config, field, None))]
    if not problems:
        return None
    return (
        f"{'; '.join(problems)}. vLLM's layer does not compute that; generate with this package (docs/evaluation.md)."
    )


def why_not_on_cpu(settings: LayerSettings) -> str | None:
    """What vLLM's CPU kernels do not take of a layer that its GPU kernels do; None if they take it."""
    key, value = settings.linear_key_head_dim, settings.linear_value_head_dim
    if key == value and key in CPU_HEADS:
        return None
    return (
        f"its heads have keys of {key} and values of {value} numbers, and vLLM's CPU kernels take "
        f"{' or '.join(map(str, CPU_HEADS))}, and both alike. Serve it on a GPU."
    )


def _problems(config: PretrainedConfig) -> list[tuple[str, Any, str]]:
    """Fields, when their value is a problem, and what the problem is."""

    def other_than(*served: Any) -> Any:
        return lambda value: value not in served

    everywhere = [
        ("attn", bool, "it has layers of softmax attention (attn)"),
        ("use_short_conv", other_than(True), "it has no short convolutions (use_short_conv=false)"),
        ("conv_bias", bool, "its short convolutions have a bias (conv_bias=true)"),
        ("allow_neg_eigval", bool, "its states have negative eigenvalues (allow_neg_eigval=true)"),
        ("attnres_block_size", other_than(None), "its residuals attend to earlier layers (attnres_block_size)"),
        (
            "hidden_act",
            other_than("swish", "silu"),
            f"its MLPs have hidden_act={config.hidden_act}",
        ),
        ("quantization_config", other_than(None), "its weights are quantised (quantization_config)"),
    ]
    if has_decay(config):
        return everywhere
    return [
        *everywhere,
        ("qk_norm", other_than("l2"), f"its queries and keys are normalised otherwise (qk_norm={config.qk_norm})"),
        ("qk_activation", other_than("silu"), f"they have another activation (qk_activation={config.qk_activation})"),
        ("use_beta", other_than(True), "its writes have no strength of their own (use_beta=false)"),
    ]
