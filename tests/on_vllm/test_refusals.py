"""What vLLM cannot serve is refused with the reason, before an engine starts or while weights are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from reference.on_vllm import engine
from safetensors.torch import load_file, save_file

CHANGED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "negative eigenvalues": ("gated", {"allow_neg_eigval": True}, {}, "negative eigenvalues"),
    "no convolution": ("delta", {"use_short_conv": False}, {}, "no short convolutions"),
    "convolution bias": ("gated", {"conv_bias": True}, {}, "convolutions have a bias"),
    "attention": ("delta", {"attn": {"layers": [0], "num_heads": 2}}, {}, "softmax attention"),
    "activation": ("delta", {"qk_activation": "relu"}, {}, "qk_activation=relu"),
    "heads": ("gated", {"head_dim": 32}, {}, "vLLM's CPU kernels take 64 or 128"),
    "LaCT": (
        "delta",
        {"model_type": "lact_swiglu", "architectures": ["LaCTForCausalLM"]},
        {},
        "LaCT's memory is an MLP",
    ),
    "float32": ("delta", {}, {"dtype": "float32"}, "compute in bfloat16, not in float32"),
}


def changed(source: Path, directory: Path, **config: Any) -> Path:
    shutil.copytree(source, directory)
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | config))
    return directory


@pytest.mark.parametrize("case", CHANGED)
def test_configurations(case: str, directories: dict[str, Path], tmp_path: Path) -> None:
    from vllm import EngineArgs

    name, config, arguments, reason = CHANGED[case]
    directory = changed(directories[name], tmp_path / "model", **config)
    with pytest.raises(ValueError, match=reason):
        EngineArgs(model=str(directory), skip_tokenizer_init=True, **arguments).create_model_config()


@pytest.mark.parametrize("name", ["gated", "delta"])
def test_the_models_themselves_are_not_refused(name: str, directories: dict[str, Path]) -> None:
    from vllm import EngineArgs

    config = EngineArgs(model=str(directories[name]), skip_tokenizer_init=True).create_model_config()
    assert str(config.dtype) == "torch.bfloat16" and config.is_attention_free


@pytest.mark.parametrize(
    ("removed", "added", "reason"),
    [
        ("model.layers.1.attn.g_proj.weight", None, "lacks model.layers.1.attn.g_proj.weight$"),
        ("model.layers.2.attn.k_conv1d.weight", None, "lacks model.layers.2.attn.k_conv1d.weight$"),
        (None, "model.layers.0.attn.q_conv1d.bias", "q_conv1d.bias: a gated_deltanet as vLLM computes it has no such"),
        (None, "model.layers.0.mlp.other.weight", "mlp.other.weight: a gated_deltanet as vLLM computes it has no such"),
    ],
)
def test_weights(
    removed: str | None, added: str | None, reason: str, directories: dict[str, Path], tmp_path: Path
) -> None:
    """A part of a weight that is left out would be random, and one too many would be ignored."""
    directory = changed(directories["gated"], tmp_path / "model")
    file = directory / "model.safetensors"
    weights = load_file(file)
    if removed is not None:
        del weights[removed]
    if added is not None:
        weights[added] = weights["model.layers.0.attn.dt_bias"].clone()
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=reason), engine(directory):
        pass
