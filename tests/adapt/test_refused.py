"""Bad input is refused before the model is touched, with the place and the cure."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference.toy import InSegments
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import refine_verl
from refine_verl.adaptation import AdaptSettings, PromptError
from refine_verl.adaptation.settings import read_settings
from refine_verl.config import ConfigError, LossSettings, NSPSettings
from refine_verl.models import ModelError, make_actor

from .conftest import CONFIG, build, fingerprint, prompts

ROW = list(range(20))


@pytest.mark.parametrize(
    ("input_ids", "message"),
    [
        ([], "no prompts (an empty batch)"),
        (torch.zeros(0, 5, dtype=torch.int64), "no prompts (an empty batch)"),
        (torch.zeros(2, 0, dtype=torch.int64), "row 0 is empty"),
        ([ROW, []], "row 1 is empty"),
        ([ROW, ROW[:6]], "row 1 has 6 tokens, fewer than 7: one position in each of nsp.chunks=3 chunks"),
        (ROW[:6], "row 0 has 6 tokens, fewer than 7"),
        ([ROW, [*ROW, 61]], "row 1, position 20: token id 61 is outside 0 ... 60"),
        ([[*ROW, -100]], "row 0, position 20: token id -100 is outside"),
        (torch.rand(1, 20), "row 0 holds torch.float32, expected integers"),
        ([[0.5, 1.5]], "row 0 holds torch.float64, expected integers"),
        (torch.ones(1, 20, dtype=torch.bool), "row 0 holds torch.bool"),
        (torch.zeros(1, 2, 20, dtype=torch.int64), "expected shape [T] or [B, T], got [1, 2, 20]"),
        ([torch.zeros(2, 20, dtype=torch.int64)], "row 0 has shape [2, 20], expected [T]"),
        ("a text", "got text. Tokenise it first"),
        (["a text"], "row 0 is text. Tokenise it first"),
        ({"input_ids": [ROW]}, "got a mapping. Give the token ids alone, without padding"),
        (7, "expected a tensor [T] or [B, T], or a list of rows, got a int"),
    ],
)
def test_prompts(input_ids: Any, message: str) -> None:
    model = build()
    before = fingerprint(model)
    with pytest.raises(PromptError, match=re.escape(message)):
        refine_verl.adapt(model, input_ids, CONFIG)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    "input_ids",
    [
        ROW,
        [ROW],
        torch.tensor(ROW),
        torch.tensor([ROW], dtype=torch.int32),
        np.array(ROW),
        [np.array(ROW)],
        [torch.tensor([ROW])],
        tuple(ROW),
        [torch.tensor(token) for token in ROW],
    ],
    ids=lambda value: type(value).__name__,
)
def test_ways_to_give_one_prompt(input_ids: Any) -> None:
    with refine_verl.adapt(build(), input_ids, CONFIG) as adapted:
        got = adapted.history
    with refine_verl.adapt(build(), torch.tensor([ROW]), CONFIG) as adapted:
        assert got == adapted.history


def test_the_shortest_prompt_works(family: str) -> None:
    with refine_verl.adapt(build(family), ROW[:7], CONFIG) as adapted:
        assert adapted.history[0]["actor/pg_loss"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(PromptError, match=r"row 0 has 1 tokens, fewer than 2: nothing to predict"):
        refine_verl.adapt(build(family), [3], {"method": "sft"})


# Models


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=61))


def frozen() -> nn.Module:
    return build().requires_grad_(False)


def checkpointing() -> nn.Module:
    model = build()
    model.gradient_checkpointing_enable()
    return model


def on_meta() -> nn.Module:
    model = build()
    model.lm_head.to("meta")
    return model


def all_on_meta() -> nn.Module:
    return build().to("meta")


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return build().requires_grad_(True)


def sharing_memory() -> nn.Module:
    model = build()
    model.lm_head.weight = nn.Parameter(model.model.embeddings.weight.detach())
    return model


def hybrid() -> nn.Module:
    model = build()
    model.config.attn = {"layers": [0], "num_heads": 2, "window_size": 8}
    return model


def gpu_only() -> nn.Module:
    model = build()
    model.config.model_type = "gla"
    return model


def odd_head() -> nn.Module:
    model = build()
    model.lm_head = nn.Sequential(model.lm_head)
    return model


def compiled() -> Any:
    return torch.compile(build(), backend="eager")


def in_parallel() -> nn.Module:
    return nn.DataParallel(build())


def quantised() -> Any:
    model = build()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    return model


def not_a_number() -> Any:
    model = build()
    model.lm_head.weight.data[0, 0] = float("nan")
    return model


def without_window() -> Any:
    model = build("lact_swiglu")
    model.config.window_size = None
    return model


class Wrapped(nn.Module):
    peft_config: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (gpt2, "'gpt2' is not a fast-weight model REFINE knows. Supported model types: .*delta_net"),
        (frozen, r"all parameters are frozen.*requires_grad_\(True\)"),
        (checkpointing, r"gradient_checkpointing_disable\(\), and set activation_checkpointing='layer'"),
        (on_meta, "lm_head.weight is on the meta device"),
        (all_on_meta, "is on the meta device"),
        (in_inference_mode, r"made under torch.inference_mode\(\).*outside of that block"),
        (sharing_memory, "lm_head.weight.* share memory without being one parameter"),
        (hybrid, "have a sliding window"),
        (quantised, r"its weights are quantised .*: bitsandbytes\)"),
        (not_a_number, "lm_head.weight holds NaN or infinity"),
        (without_window, r"sees all tokens before \(window_size=null\)"),
        (gpu_only, r"kernels of gla need a GPU, and it would run on the CPU"),
        (odd_head, "LM head is a Sequential"),
        (compiled, "the model that went into torch.compile"),
        (in_parallel, "the model inside, model.module"),
        (Wrapped, r"model.get_base_model\(\)"),
        (lambda: "some/path", "the model is a str.*load_model"),
        (lambda: nn.Linear(1, 1), "a Linear, not a Hugging Face model.*AutoModelForCausalLM"),
    ],
)
def test_models(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        refine_verl.adapt(make(), prompts(), CONFIG)


def test_weights_on_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    names = dict(model.named_parameters())

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda", 1)

    elsewhere = {**names, "lm_head.weight": names["lm_head.weight"].detach().as_subclass(Elsewhere)}
    monkeypatch.setattr(model, "named_parameters", lambda *args, **kwargs: iter(elsewhere.items()))
    with pytest.raises(ModelError, match=r"several devices: cpu \(.*\), cuda:1 \(lm_head.weight\).*model.to\(device\)"):
        refine_verl.adapt(model, prompts(), CONFIG)


def test_inference_mode() -> None:
    model = build()
    with torch.inference_mode(), pytest.raises(ModelError, match=r"torch.no_grad\(\) instead"):
        refine_verl.adapt(model, prompts(), CONFIG)


def test_a_frozen_model_can_answer() -> None:
    with refine_verl.adapt(frozen(), prompts(), {"method": "none"}) as adapted:
        assert len(adapted.generate(max_new_tokens=2, stop_tokens=())) == 5


# Settings


def test_the_defaults_are_the_papers() -> None:
    settings = AdaptSettings()
    assert (settings.method, settings.loss.rl_coef, settings.loss.sft_coef) == ("refine", 0.4, 1.0)
    assert (settings.nsp.chunks, settings.nsp.rollout_length, settings.nsp.rollouts_per_position) == (8, 5, 1)
    assert (settings.nsp.reward, settings.nsp.temperature, settings.clip_ratio) == ("binary", 1.0, 0.2)
    assert (settings.lr, settings.betas, settings.weight_decay) == (1e-6, (0.9, 0.999), 0.01)
    assert (settings.mini_batch_size, settings.steps, settings.clip_grad) == (4, 1, 1.0)


def test_what_a_section_leaves_out_is_that_of_test_time() -> None:
    settings = read_settings({"nsp": {"chunks": 4}, "loss": {"sft_coef": 0.5}, "betas": [0.8, 0.9]})
    assert settings.nsp == NSPSettings(chunks=4, reward="binary")
    assert settings.loss == LossSettings(rl_coef=0.4, sft_coef=0.5)
    assert settings.betas == (0.8, 0.9)
    assert read_settings({"nsp": None, "loss": None}) == read_settings(None) == read_settings({}) == AdaptSettings()
    assert read_settings({"nsp": NSPSettings(chunks=2)}).nsp.reward == "cosine"
    assert read_settings(settings) is settings


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"stepz": 2}, "adapt.stepz: unknown key. Allowed: .*Did you mean 'steps'?"),
        ({"nsp": {"chunk": 2}}, "refine.nsp.chunk: unknown key.*Did you mean 'chunks'?"),
        ({"method": "rl"}, "adapt.method: unknown value 'rl'. Allowed: refine, sft, none"),
        ({"lr": 0}, "adapt.lr: must be greater than 0"),
        ({"lr": float("nan")}, "adapt.lr: must be a finite number"),
        ({"steps": 0}, "adapt.steps: must be at least 1"),
        ({"steps": 1.5}, "adapt.steps: must be an integer"),
        ({"betas": [0.9]}, "adapt.betas: must be two numbers"),
        ({"betas": [0.9, 1.0]}, "adapt.betas: must be two numbers"),
        ({"betas": 0.9}, "adapt.betas: must be"),
        ({"backup": "disk"}, "adapt.backup: unknown value 'disk'"),
        ({"method": "sft", "loss": {"sft_coef": 0.0}}, "method=sft has no other loss"),
        ({"nsp": {"group": "position"}}, "refine.nsp.group: 'position' compares"),
        ({"nsp": {"chunks": 1}}, "refine.nsp.chunks: one chunk with one rollout"),
        ({"nsp": {"reward": "binry"}}, "refine.nsp.reward: unknown reward.*Did you mean 'binary'?"),
        ({"nsp": {"reward": "no_such_module.reward"}}, "refine.nsp.reward: .*cannot import the module"),
        ([1], "config: must be AdaptSettings, a mapping or None, got a list"),
    ],
)
def test_settings(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        refine_verl.adapt(build(), prompts(), config)


def test_the_page_lists_every_key_with_its_default() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/adapt.md").read_text()
    listed = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", page, re.M))
    shown = {name: str(value) for name, value in vars(AdaptSettings()).items()}
    shown.update(nsp='{"reward": "binary"}', loss='{"rl_coef": 0.4}')
    assert listed == shown


def test_a_selection_that_looks_at_writes_needs_to_know_them() -> None:
    config = {**CONFIG, "nsp": {**CONFIG["nsp"], "selection": "surprise"}}
    with refine_verl.adapt(build(), ROW, config) as adapted:
        assert adapted.history
    actor = make_actor(build(), adapter=InSegments())
    before = fingerprint(actor)
    with pytest.raises(ConfigError, match=r"refine\.nsp\.selection: surprise looks at how strongly each token"):
        refine_verl.adapt(actor, ROW, config)
    assert fingerprint(actor) == before
