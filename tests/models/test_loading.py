"""From a directory to a model: everything fits, or the reason is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reference.toy import InSegments, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from refine_verl.models import ModelError, adapters, inspect_model, known_model_types, load_model
from refine_verl.models.adapters import FLA_NOT_SUPPORTED, adapter_for
from refine_verl.models.hybrid.adapter import HybridAdapter
from refine_verl.models.loading import check_family
from refine_verl.models.weights import check_stored_numbers


@pytest.fixture
def checkpoint(family: str, tmp_path: Path) -> Path:
    """A directory as fla and transformers write it."""
    directory = tmp_path / "checkpoint"
    torch.manual_seed(4)
    AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(directory)
    return directory


def test_a_checkpoint_loads_completely_and_computes_the_same(checkpoint: Path) -> None:
    wanted, report = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    info = inspect_model(checkpoint)
    assert info.has_weights and info.vocab_size == 61
    model = load_model(checkpoint)
    saved = load_file(checkpoint / "model.safetensors")
    state = model.state_dict()
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) and state[name].dtype == torch.float32 for name in saved)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, wanted(input_ids=tokens).logits)


def rewrite(checkpoint: Path, rename: dict[str, str | None]) -> None:
    """Rename keys of the weights; None removes them."""
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    renamed = {rename.get(name, name): value for name, value in weights.items()}
    save_file({name: value for name, value in renamed.items() if name}, file, metadata={"format": "pt"})


KEY = "model.layers.1.attn.o_proj.weight"


def test_a_missing_key_is_refused(checkpoint: Path) -> None:
    rewrite(checkpoint, {KEY: None})
    with pytest.raises(ModelError) as error:
        load_model(checkpoint)
    assert f"missing keys: {KEY}" in str(error.value) and str(checkpoint) in str(error.value)


def test_a_renamed_key_is_refused(checkpoint: Path) -> None:
    rewrite(checkpoint, {KEY: "model.layers.1.attn.out.weight"})
    with pytest.raises(ModelError) as error:
        load_model(checkpoint)
    assert f"missing keys: {KEY}" in str(error.value)
    assert "unexpected keys: model.layers.1.attn.out.weight" in str(error.value)


def test_weights_of_another_shape_are_refused(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "vocab_size": 64}))
    with pytest.raises(ModelError, match=r"wrong shapes: lm_head.weight .*61, 32.*64, 32"):
        load_model(checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(checkpoint: Path, value: float) -> None:
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    weights[KEY][3, 1] = value
    save_file(weights, file, metadata={"format": "pt"})
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ModelError, match=f"model.path={checkpoint}: {KEY} holds NaN or infinity"):
            load_model(checkpoint, dtype=dtype)
    with pytest.raises(ModelError, match=f"model.path={checkpoint}: {KEY} holds NaN or infinity"):
        check_stored_numbers(checkpoint, inspect_model(checkpoint).config)


def test_stored_numbers_are_looked_at_whatever_their_type(checkpoint: Path) -> None:
    file, config = checkpoint / "model.safetensors", inspect_model(checkpoint).config
    sound = {name: value.to(torch.float8_e4m3fn) for name, value in load_file(file).items()}
    save_file(sound, file, metadata={"format": "pt"})
    check_stored_numbers(checkpoint, config)
    sound[KEY][3, 1] = float("nan")
    save_file(sound, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="holds NaN"):
        check_stored_numbers(checkpoint, config)


def test_pickles_that_are_none_are_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    for content in (b"<!DOCTYPE html>", b"\x80\x02nonsense", b"PK\x03\x04"):
        (checkpoint / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ModelError, match=f"model.path={checkpoint}: .*(damaged|cannot be read)"):
            load_model(checkpoint)


def test_random_weights_are_a_function_of_the_seed(family: str) -> None:
    state = torch.get_rng_state()
    first, again, other = (load_model(None, config=tiny_config(family), seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is not touched
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_a_directory_with_a_configuration_alone_gives_random_weights(family: str, tmp_path: Path) -> None:
    tiny_config(family).save_pretrained(tmp_path)
    assert not inspect_model(tmp_path).has_weights
    wanted = load_model(None, config=tiny_config(family), seed=3).state_dict()
    got = load_model(tmp_path, seed=3).state_dict()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def refusal(path: Path | None, config: dict[str, object] | None = None) -> str:
    with pytest.raises(ModelError) as error:
        inspect_model(path, config)
    return str(error.value)


def test_a_transformer_is_refused(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path)
    said = refusal(tmp_path)
    assert "'llama' is not a fast-weight model" in said and str(tmp_path) in said
    assert "delta_net, gated_deltanet" in said and "docs/extending.md" in said


def test_attention_over_everything_before_is_refused() -> None:
    said = refusal(None, {"model_type": "lact_swiglu", "window_size": None})
    assert said.startswith("model.config: the attention of this lact_swiglu sees all tokens before (window_size=null)")


def test_another_models_attn_is_its_own_affair(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fla calls its layers of softmax attention may be anything in a configuration of a user's."""
    monkeypatch.setitem(adapters._ADAPTERS, "of_mine", InSegments)
    config = PretrainedConfig(attn="flash")
    config.model_type = "of_mine"
    assert isinstance(adapter_for(config), InSegments)
    check_family(config, on_gpu=False)
    for kind in (*adapters.FLA_VERIFIED_ON_CPU, *adapters.FLA_THROUGH_THE_SAME_ADAPTER):  # negative control
        config.model_type, config.attn = kind, {"layers": [1]}
        assert isinstance(adapter_for(config), HybridAdapter)


def test_directories_without_a_model_are_refused(tmp_path: Path) -> None:
    assert "no such directory" in refusal(tmp_path / "nowhere")
    assert "no config.json in this directory" in refusal(tmp_path)
    for text in ("{ not json", "[]", "3"):
        (tmp_path / "config.json").write_text(text)
        assert "its configuration cannot be read" in refusal(tmp_path)


def test_values_without_a_known_family_are_refused() -> None:
    assert "model.path=DIR_OR_HUB_ID" in refusal(None, {})
    assert "'llama' is not a fast-weight model" in refusal(None, {"model_type": "llama"})
    said = refusal(None, {"model_type": "delta_net", "hiden_size": 32})
    assert "model.config.hiden_size" in said and "Did you mean 'hidden_size'?" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_families_that_need_a_gpu_are_refused_without_one() -> None:
    said = refusal(None, {"model_type": "gla"})
    assert "need a GPU" in said and "delta_net, gated_deltanet" in said


def fla_model_types() -> list[str]:
    """Of every model that the installed fla has registered with transformers."""
    return sorted(
        kind.model_type
        for kind in CONFIG_MAPPING._extra_content.values()
        if kind.__module__.startswith("fla.") and kind.model_type
    )


@pytest.mark.parametrize("kind", fla_model_types())
def test_every_model_of_fla_is_supported_or_refused_with_a_reason(kind: str) -> None:
    """A model that a later fla brings fails here until somebody has looked at it."""
    if kind in known_model_types():
        assert kind not in FLA_NOT_SUPPORTED
        return
    with pytest.raises(ModelError, match=rf"'{kind}' of flash-linear-attention is not supported: .*\. Supported model"):
        inspect_model(None, {"model_type": kind})
