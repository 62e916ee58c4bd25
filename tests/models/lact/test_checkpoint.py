"""Saved, reloaded, and refused where configuration and weights contradict each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.toy import documents_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from refine_verl.models import ModelError, inspect_model, load_model
from refine_verl.models.lact import LaCTConfig, LaCTForCausalLM
from refine_verl.models.weights import check_weights

Build = Callable[..., LaCTForCausalLM]
FIELDS: dict[str, dict[str, Any]] = {
    "dense": {"use_muon": True},
    "low rank": {"w0_w2_low_rank": 3, "attn_qk_norm": True, "qkv_bias": True, "inter_multi": 1.5},
    "tied": {"tie_word_embeddings": True, "use_momentum": False, "learnable_ttt_scale": False, "lr_dim": 12},
}


@pytest.fixture(params=FIELDS)
def saved(request: pytest.FixtureRequest, lact: Build, tmp_path: Path) -> tuple[Path, LaCTForCausalLM]:
    model = lact(torch.float32, **FIELDS[request.param])
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_saved_and_reloaded(saved: tuple[Path, LaCTForCausalLM]) -> None:
    directory, model = saved
    again, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is LaCTForCausalLM and inspect_model(directory).has_weights
    check_weights(directory, again.config)
    tokens = documents_of([20]).tokens
    with torch.no_grad():
        for other in (again.eval(), load_model(directory).eval()):
            assert torch.equal(other(input_ids=tokens).logits, model(input_ids=tokens).logits)
    tied = model.config.tie_word_embeddings
    assert (again.lm_head.weight is again.model.embeddings.weight) == tied
    assert ("lm_head.weight" in load_file(directory / "model.safetensors")) != tied


def test_another_layout_of_files(lact: Build, tmp_path: Path) -> None:
    """In several files and in bfloat16, as published ones are."""
    model = lact(torch.float32, w0_w2_low_rank=3).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = load_model(tmp_path, dtype=torch.float32)
    assert all(p.dtype == torch.float32 for p in again.parameters())
    wanted = model.state_dict()
    assert all(torch.equal(value, wanted[name].float()) for name, value in again.state_dict().items())


CONTRADICTIONS = {
    "num_lact_heads": (4, 2),
    "w0_w2_low_rank": (-1, 3),
    "inter_multi": (1, 1.5),
    "attn_qk_norm": (False, True),
    "qkv_bias": (False, True),
    "use_momentum": (False, True),
    "learnable_ttt_scale": (False, True),
}


@pytest.mark.parametrize("saved", ["low rank"], indirect=True)
@pytest.mark.parametrize("field", CONTRADICTIONS)
def test_contradictions_name_both(saved: tuple[Path, LaCTForCausalLM], field: str) -> None:
    directory, _ = saved
    written, told = CONTRADICTIONS[field]
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, field: written}))
    message = f"{field} is {written} in the configuration and {told} in the weights"
    for refuse in (load_model, lambda path: check_weights(path, inspect_model(path).config)):
        with pytest.raises(ModelError) as error:
            refuse(directory)
        assert message in str(error.value) and str(directory) in str(error.value)
        assert str(error.value).count("in the configuration") == 1  # nothing follows from it but itself


def test_all_contradictions_at_once_and_none_without_weights() -> None:
    with torch.device("meta"):
        model = LaCTForCausalLM(LaCTConfig(num_hidden_layers=1, lr_dim=512, use_momentum=False))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model.config.check_weights(shapes)
    LaCTConfig().check_weights({})
    with pytest.raises(ValueError, match="lr_dim is 1 .* 512 in the weights; .*use_momentum is True .* False in the"):
        LaCTConfig().check_weights(shapes)


@pytest.mark.parametrize("saved", ["low rank"], indirect=True)
def test_missing_and_unexpected_keys_are_refused(saved: tuple[Path, LaCTForCausalLM]) -> None:
    directory, _ = saved
    file = directory / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.attn.rotary.inv_freq"] = torch.ones(3)
    del weights["model.layers.1.attn.w1"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing keys: model.layers.1.attn.w1"):
        load_model(directory)


def test_unknown_fields_are_kept(lact: Build, tmp_path: Path) -> None:
    lact(torch.float32, future_field=[1, 2]).save_pretrained(tmp_path)
    assert inspect_model(tmp_path).config.future_field == [1, 2]
