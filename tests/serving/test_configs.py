"""Configurations read without fla are fla's, and what vLLM's layer does not compute is refused with the reason."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import fla.models
import pytest
import torch
from transformers import AutoModelForCausalLM

from refine_verl.serving import configs
from refine_verl.serving.configs import layer_settings, mlp_size, why_not_on_cpu, why_not_served

PAIRS = {
    "delta_net": (configs.DeltaNetConfig, fla.models.DeltaNetConfig),
    "gated_deltanet": (configs.GatedDeltaNetConfig, fla.models.GatedDeltaNetConfig),
}
SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "num_heads": 2, "vocab_size": 11}


@pytest.mark.parametrize("kind", PAIRS)
def test_defaults_are_those_of_fla(kind: str) -> None:
    """A saved configuration leaves defaults out, so ours must be fla's."""
    ours, theirs = (cls() for cls in PAIRS[kind])
    names = (configs._SHARED | PAIRS[kind][0].defaults).keys() | {"bos_token_id", "eos_token_id", "tie_word_embeddings"}
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}
    assert PAIRS[kind][0].model_type == kind == theirs.model_type


@pytest.mark.parametrize("kind", PAIRS)
def test_a_saved_configuration_is_read(kind: str) -> None:
    """Every field that is not its default arrives, whichever class reads it; the limit on lengths does not."""
    ours, theirs = PAIRS[kind]
    saved = theirs(**SMALL, norm_eps=1e-3, tie_word_embeddings=True, max_position_embeddings=7).to_dict()
    read = ours.from_dict(saved)
    assert layer_settings(read) == layer_settings(theirs.from_dict(saved))
    assert (read.hidden_size, read.norm_eps, read.vocab_size, read.tie_word_embeddings) == (64, 1e-3, 11, True)
    assert not hasattr(read, "max_position_embeddings") and hasattr(theirs(), "max_position_embeddings")


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("delta_net", {}),
        ("delta_net", {"expand_k": 0.5, "expand_v": 2.0, "use_gate": True, "conv_size": 3, "hidden_ratio": 3}),
        ("gated_deltanet", {"head_dim": 16}),
        ("gated_deltanet", {"head_dim": 16, "num_v_heads": 4, "expand_v": 1, "intermediate_size": 40}),
        ("gated_deltanet", {"head_dim": 16, "use_gate": False, "hidden_size": 200}),
    ],
)
def test_sizes_are_those_of_the_model(kind: str, fields: dict[str, Any]) -> None:
    config = PAIRS[kind][1](**SMALL | fields)
    with torch.device("meta"):
        block = AutoModelForCausalLM.from_config(config).model.layers[0]
    settings, layer = layer_settings(config), block.attn
    assert layer.q_proj.out_features == settings.linear_num_key_heads * settings.linear_key_head_dim
    assert layer.v_proj.out_features == settings.linear_num_value_heads * settings.linear_value_head_dim
    assert (layer.head_k_dim, layer.head_v_dim) == (settings.linear_key_head_dim, settings.linear_value_head_dim)
    assert layer.q_conv1d.weight.shape[-1] == settings.linear_conv_kernel_dim
    assert block.mlp.gate_proj.out_features == mlp_size(config)
    assert layer.b_proj.out_features == settings.linear_num_value_heads
    assert why_not_served(config) is None


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("delta_net", {"allow_neg_eigval": True}, "negative eigenvalues (allow_neg_eigval=true)"),
    ("gated_deltanet", {"allow_neg_eigval": True}, "negative eigenvalues (allow_neg_eigval=true)"),
    ("delta_net", {"use_short_conv": False}, "no short convolutions (use_short_conv=false)"),
    ("gated_deltanet", {"conv_bias": True}, "have a bias (conv_bias=true)"),
    ("delta_net", {"qk_activation": "relu"}, "qk_activation=relu"),
    ("delta_net", {"qk_norm": "sum"}, "qk_norm=sum"),
    ("delta_net", {"use_beta": False}, "use_beta=false"),
    ("delta_net", {"attn": {"layers": [0], "num_heads": 2}}, "softmax attention (attn)"),
    ("gated_deltanet", {"attnres_block_size": 2}, "attnres_block_size"),
    ("gated_deltanet", {"hidden_act": "powlu"}, "hidden_act=powlu"),
    ("delta_net", {"quantization_config": {"quant_method": "fp8"}}, "quantised (quantization_config)"),
]


@pytest.mark.parametrize(("kind", "fields", "reason"), REFUSED)
def test_what_the_layer_does_not_compute_is_refused(kind: str, fields: dict[str, Any], reason: str) -> None:
    refusal = why_not_served(PAIRS[kind][0](**SMALL | fields))
    assert refusal is not None and reason in refusal and "docs/evaluation.md" in refusal


def test_all_reasons_are_given_at_once() -> None:
    refusal = why_not_served(configs.DeltaNetConfig(use_beta=False, qk_norm="sum"))
    assert refusal is not None and "use_beta" in refusal and "qk_norm" in refusal


def test_lact_is_refused_with_the_reason() -> None:
    refusal = why_not_served(configs.LaCTConfig())
    assert refusal is not None and "LaCT's memory is an MLP" in refusal


@pytest.mark.parametrize(
    ("head_dim", "expand_v", "taken"), [(64, 1, True), (128, 1, True), (32, 1, False), (64, 2, False)]
)
def test_heads_of_the_cpu_kernels(head_dim: int, expand_v: int, taken: bool) -> None:
    reason = why_not_on_cpu(layer_settings(configs.GatedDeltaNetConfig(head_dim=head_dim, expand_v=expand_v)))
    assert (reason is None) == taken
    assert taken or f"keys of {head_dim} and values of {head_dim * expand_v}" in str(reason)


def test_reading_a_configuration_does_not_load_fla() -> None:
    """vLLM loads plug-ins in each of its processes; fla would cost each of them some ten seconds."""
    script = (
        "import sys, refine_verl.serving.configs; print(*sorted({'fla', 'vllm', 'verl', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == []
