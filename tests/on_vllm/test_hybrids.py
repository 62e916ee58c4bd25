"""Hybrids of transformers by vLLM's own classes, as `engine=vllm` asks them: prefix caching, float32 states."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.on_vllm import COMMON, prompts, teacher_forced
from torch import Tensor, nn

from refine_verl.config import ModelError
from refine_verl.models.loading import load_model
from refine_verl.serving.engine import Engine, EngineSettings, served_dtype

TIMES_OWN_ROUNDING = 1.5  # as in test_log_probs
MODEL: dict[str, Any] = {
    **COMMON,
    "num_hidden_layers": 4,  # the last one is of attention
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64},
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
LONG = 1300
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": {**EXPERTS, "shared_expert_intermediate_size": 128, "norm_topk_prob": True},
    "qwen3_5_text": {},
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    if request.param == "qwen3_5_text" and importlib.util.find_spec("torchvision") is None:
        pytest.skip("vLLM's class for it imports torchvision")
    return request.param


def write(directory: Path, family: str, **more: Any) -> Path:
    from transformers import AutoConfig

    model = load_model(None, config=AutoConfig.for_model(family, **MODEL | FAMILIES[family] | more), seed=3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # around what they are at first
                parameter.add_(torch.rand(parameter.shape, generator=generator) - 0.5)
    model.save_pretrained(directory)
    return directory


def asked_for() -> list[list[int]]:
    """Four short prompts, and one of several of the blocks at whose ends states of hybrids are kept."""
    long = torch.randint(2, COMMON["vocab_size"], (LONG,), generator=torch.Generator().manual_seed(2)).tolist()
    return [*prompts(), long]


@contextmanager
def asked(directory: Path, family: str) -> Iterator[Engine]:
    settings = EngineSettings(model=str(directory), tokens=2048, memory=0.1, sequences=8)
    found = Engine(settings, family)
    try:
        yield found
    finally:
        found.close()


def far(rows: list[tuple[list[int], Tensor]], model: nn.Module) -> float:
    return float(torch.cat([(values - teacher_forced(model, row)).abs() for row, values in rows]).mean())


def _norms(model: nn.Module) -> None:
    for layer in model.model.layers[:3]:
        layer.linear_attn.norm.weight.data *= 1.5


def _decay(model: nn.Module) -> None:
    for layer in model.model.layers[:3]:
        layer.linear_attn.A_log.data += 0.5


def _attention(model: nn.Module) -> None:
    model.model.layers[3].self_attn.o_proj.weight.data *= -1


@pytest.fixture
def rows(family: str, tmp_path: Path) -> list[tuple[list[int], Tensor]]:
    """Greedy answers after prompts, read twice, and vLLM's log-probabilities of both."""
    directory = write(tmp_path / "m", family)
    assert served_dtype(str(directory), family, "auto", key="model") == "bfloat16"
    with asked(directory, family) as engine:
        first = {one.row: one for one in engine.write(asked_for(), [24] * 5)}
        again = {one.row: one for one in engine.write(asked_for(), [24] * 5)}
        block = engine._engine.vllm_config.cache_config.block_size
        assert again[4].read == LONG - LONG // block * block < first[4].read == LONG
        answered = [prompt + again[row].tokens for row, prompt in enumerate(asked_for())]
        return [
            (row, torch.tensor(scored.log_probs)) for row, scored in zip(answered, engine.score(answered), strict=True)
        ]


def test_log_probabilities(rows: list[tuple[list[int], Tensor]], tmp_path: Path) -> None:
    exact, rounded = load_model(tmp_path / "m"), load_model(tmp_path / "m", dtype=torch.bfloat16)
    own = [(row, teacher_forced(rounded, row)) for row, _ in rows]
    bound = TIMES_OWN_ROUNDING * far(own, exact)
    assert far(rows, exact) < bound
    # answers were written from states that were kept: greedy ones, but for near ties
    behind = []
    for (row, _), prompt in zip(rows, asked_for(), strict=True):
        with torch.no_grad():
            choices = exact(torch.tensor([row])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        chosen = choices.gather(1, torch.tensor(row[len(prompt) :])[:, None])[:, 0]
        behind.append(choices.max(-1).values - chosen)
    assert torch.cat(behind).mean() < bound
    changes: list[Callable[[nn.Module], None]] = [_norms, _decay, _attention]
    for change in changes:
        wrong = load_model(tmp_path / "m")
        change(wrong)
        assert far(rows, wrong) > bound, change.__name__


@pytest.mark.parametrize(
    ("more", "dtype", "reason"),
    [
        ({"num_experts": 0}, "auto", "wants experts"),
        ({"linear_value_head_dim": 32}, "auto", "keys of 64 and values of 32 numbers"),
        ({}, "float32", "compute in bfloat16, not in float32"),
    ],
)
def test_refused(more: dict[str, Any], dtype: str, reason: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model("qwen3_next", **MODEL | FAMILIES["qwen3_next"] | more).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"^model={tmp_path}: vLLM cannot serve this qwen3_next: .*{reason}"):
        served_dtype(str(tmp_path), "qwen3_next", dtype, key="model")
