"""Hybrids saved and loaded again, adapted and given back, and refused."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapt.conftest import CONFIG, fingerprint, prompts
from reference.hybrid import FAMILIES, hybrid_config, hybrid_model
from reference.toy import documents_of
from transformers import AutoModelForCausalLM

import refine_verl
from refine_verl.kernels.patch import allow_attention_layers
from refine_verl.models import ModelError, inspect_model, load_model, make_actor
from refine_verl.models.weights import check_weights


def test_saved_and_reloaded(family: str, tmp_path: Path) -> None:
    """By transformers itself: the same names, the same logits, from a model that was an actor."""
    model, tokens = hybrid_model(family, torch.float32), documents_of([20]).tokens
    names = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    with torch.no_grad():
        wanted = model(input_ids=tokens).logits
    make_actor(model).run(documents_of([20]).whole, None, keep_state=True)
    model.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, experts_implementation="eager"
    )
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {name: tuple(value.shape) for name, value in again.state_dict().items()} == names
    check_weights(tmp_path, inspect_model(tmp_path).config)
    with torch.no_grad():
        for other in (again.eval(), load_model(tmp_path, config=again.config).eval()):
            assert torch.equal(other(input_ids=tokens).logits, wanted)


def test_adapting_gives_everything_back(family: str) -> None:
    model = hybrid_model(family, torch.float32)
    before = fingerprint(model)
    with refine_verl.adapt(model, prompts(), CONFIG) as adapted:
        inside = fingerprint(model)
        answers = adapted.generate(max_new_tokens=3)
        assert all(1 <= len(answer) <= 3 for answer in answers)
    after = fingerprint(model)
    assert [name for name in before if before[name] != after[name]] == []
    weights = [name for name in before if name.endswith(":bits")]
    moved = [name for name in weights if inside[name] != before[name]]
    assert len(moved) > 0.8 * len(weights)  # negative control; an expert may see no token


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sliding window": (
        {"layer_types": ["linear_attention", "sliding_attention"] * 2},
        "layers of the kind sliding_att",
    ),
    "another attention": (
        {"attn_implementation": "flash_attention_2"},
        "attn_implementation=flash_attention_2 of config.json: .* eager and sdpa can be had. Remove it",
    ),
    "no linear layer": ({"layer_types": ["full_attention"] * 4}, "no linear layer"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act=gelu"),
    "rotation": ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type=dynamic"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_forked_is_refused(why: str, tmp_path: Path) -> None:
    changes, said = REFUSED[why]
    hybrid_config("qwen3_5_text").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = {
        **json.loads(file.read_text()),
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    }
    file.write_text(json.dumps(values))
    inspect_model(tmp_path)
    file.write_text(json.dumps({**values, **changes}))
    with pytest.raises(ModelError, match=said) as refusal:
        inspect_model(tmp_path)
    assert str(tmp_path) in str(refusal.value)


FLA_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sliding window": ({"attn": {"layers": [1], "num_heads": 2, "window_size": 8}}, r"sliding window \(window_size=8"),
    "attention alone": ({"attn": {"layers": [0, 1, 2], "num_heads": 2}}, "all layers of this delta_net are softmax"),
    "residuals": ({"attnres_block_size": 2}, "attnres_block_size, which is not supported"),
}


@pytest.mark.parametrize("why", FLA_REFUSED)
def test_what_cannot_be_forked_of_flas_is_refused(why: str, tmp_path: Path) -> None:
    changes, said = FLA_REFUSED[why]
    hybrid_config("delta_net", **changes).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=said):
        inspect_model(tmp_path)


def test_flas_attention_layers_are_made_without_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """And their own forward function says what it needs."""
    layers = importlib.import_module("fla.layers.attn")
    monkeypatch.setattr(layers, "flash_attn_func", None)
    with pytest.raises(ImportError, match="Please install Flash Attention"):
        hybrid_model("delta_net")
    allow_attention_layers()
    model = hybrid_model("delta_net", torch.float32)
    hidden, _ = make_actor(model).run(documents_of([5]).whole, None, keep_state=False)
    assert hidden.isfinite().all()
    with pytest.raises(ImportError, match="needs flash-attn, which is not installed"):
        layers.flash_attn_func(hidden, hidden, hidden)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("qwen3_5", "reads images.*Save its text model and give that"),
        ("qwen3_5_moe", "reads images, and its text model is none of those supported"),
        ("qwen3_5_moe_text", "with experts have not been compared"),
        ("lfm2_moe", "not delta rules"),
        ("kimi_linear", "transformers does not have it"),
    ],
)
def test_other_hybrids_are_refused_by_name(kind: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ModelError, match=f"'{kind}' is not supported: .*{why}.* olmo_hybrid, qwen3_5_text, qwen3_next"):
        inspect_model(tmp_path)


@pytest.mark.parametrize("version", ["5.9.1", "5.11.0"])
def test_another_transformers_is_refused(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hybrid_config("olmo_hybrid").save_pretrained(tmp_path)
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(ModelError, match=f"transformers >=5.10,<5.11; {version} is installed"):
        inspect_model(tmp_path)


def test_the_text_model_of_one_that_reads_images(tmp_path: Path) -> None:
    """What the refusal says to do."""
    from transformers import AutoConfig, Qwen3_5ForConditionalGeneration

    seen = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 24}
    values = {name: value for name, value in FAMILIES["qwen3_5_text"][1].items() if name != "layer_types"}
    config = AutoConfig.for_model("qwen3_5", text_config={**values, "num_hidden_layers": 4}, vision_config=seen)
    Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path / "whole")
    text = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    text.save_pretrained(tmp_path / "text")
    tokens = documents_of([20]).tokens
    with torch.no_grad():
        again = load_model(tmp_path / "text").eval()
        assert torch.equal(again(input_ids=tokens).logits, text.eval()(input_ids=tokens).logits)
