"""vLLM's log-probabilities are this package's within bfloat16, and slightly wrong models are told apart."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.on_vllm import COMMON, MODELS, Serve, gap, prompts, teacher_forced
from torch import Tensor, nn

from refine_verl.models.loading import load_model

# vLLM computes in bfloat16 and rounds at other places than this package does, so its distance from float32 is of the
# size of this package's own bfloat16; measured 1.03 to 1.16 times.
TIMES_OWN_ROUNDING = 1.5


FAST = ("gated", "delta")
"""Models of `make test-vllm-fast`."""


@pytest.fixture(scope="module")
def bounds(directories: dict[str, Path], serve: Serve) -> Callable[[str], float]:
    """Of a model, the mean distance from float32 that its bfloat16 explains."""

    @functools.cache
    def bound(name: str) -> float:
        exact, rounded = load_model(directories[name]), load_model(directories[name], dtype=torch.bfloat16)
        apart = [(teacher_forced(exact, a.tokens) - teacher_forced(rounded, a.tokens)).abs() for a in serve(name)[0]]
        return TIMES_OWN_ROUNDING * float(torch.cat(apart).mean())

    return bound


def params(of: dict[str, str]) -> list[Any]:
    """Keys, with the mark of those whose model is a fast one."""
    return [pytest.param(key, marks=[pytest.mark.fast] * (name in FAST)) for key, name in of.items()]


@pytest.mark.parametrize("name", params({name: name for name in MODELS}))
def test_equal_to_float32_within_bfloat16(
    name: str, directories: dict[str, Path], serve: Serve, bounds: Callable[[str], float]
) -> None:
    answers, exact, bound = serve(name)[0], load_model(directories[name]), bounds(name)
    assert [answer.prompt_length for answer in answers] == [len(prompt) for prompt in prompts()]
    assert gap(answers, exact) < bound  # prompts in chunks, answers token by token
    assert gap(answers, exact, "written") < bound
    assert torch.cat([teacher_forced(exact, answer.tokens) for answer in answers]).std() > 10 * bound


def _layers(model: nn.Module) -> list[nn.Module]:
    return [block.attn for block in model.model.layers]


def _decay(model: nn.Module) -> None:
    for layer in _layers(model):
        layer.A_log.data += 0.5


def _no_decay(model: nn.Module) -> None:
    for layer in _layers(model):
        layer.A_log.data.fill_(-100)


def _swap(first: str, second: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for layer in _layers(model):
            one, other = (getattr(layer, name).weight for name in (first, second))
            one.data, other.data = other.data.clone(), one.data.clone()

    return change


def _norm(model: nn.Module) -> None:
    for layer in _layers(model):
        layer.o_norm.weight.data *= 1.1


def _newest_tap(model: nn.Module) -> None:
    for layer in _layers(model):
        for name in ("q_conv1d", "k_conv1d", "v_conv1d"):
            weight: Tensor = getattr(layer, name).weight
            weight.data = weight.data.roll(1, -1)


CONTROLS = {
    "decay": ("gated", _decay),
    "no decay": ("gated", _no_decay),
    "q and k": ("gated", _swap("q_proj", "k_proj")),
    "convolutions": ("delta", _swap("q_conv1d", "k_conv1d")),
    "b and a": ("gated", _swap("b_proj", "a_proj")),
    "norm": ("gated_grouped", _norm),
    "norm of DeltaNet": ("delta", _norm),
    "taps": ("delta", _newest_tap),
}


@pytest.mark.parametrize("control", params({key: name for key, (name, _) in CONTROLS.items()}))
def test_a_slightly_wrong_model_is_told_apart(
    control: str, directories: dict[str, Path], serve: Serve, bounds: Callable[[str], float]
) -> None:
    name, change = CONTROLS[control]
    wrong = load_model(directories[name])
    change(wrong)
    assert gap(serve(name)[0], wrong) > bounds(name)


def test_controls_change_models_that_are_served() -> None:
    assert {name for name, _ in CONTROLS.values()} <= MODELS.keys() and COMMON["num_hidden_layers"] > 1


def test_compiled(directories: dict[str, Path], serve: Serve, bounds: Callable[[str], float]) -> None:
    """As vLLM runs by default, through torch.compile."""
    assert gap(serve("gated", enforce_eager=False)[0], load_model(directories["gated"])) < bounds("gated")
