"""After the block, however it ended, the model is what it was: weights bit by bit, gradients, flags, class."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refine_verl
from refine_verl.adaptation.guard import SavedModel
from refine_verl.models import FastWeightActor, make_actor
from refine_verl.nsp import RewardInputs
from refine_verl.nsp.rewards import REWARDS

from .conftest import CONFIG, build, fingerprint, prompts

Make = Callable[..., Any]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backup", ["cpu", "device"])
def test_everything_comes_back(family: str, dtype: torch.dtype, backup: str) -> None:
    model = build(family, dtype)
    before = fingerprint(model)
    with refine_verl.adapt(model, prompts(), {**CONFIG, "backup": backup}) as adapted:
        inside = fingerprint(model)
        adapted.generate(max_new_tokens=3, temperature=1.0)
        assert changed(inside, fingerprint(model)) == []
    assert changed(before, fingerprint(model)) == []
    weights = {name for name in before if name.endswith(":bits")}
    assert {name for name in weights if inside[name] != before[name]} == weights  # negative control


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_flags_gradients_and_buffers_of_the_caller_stay(mode: str) -> None:
    model = build()
    model.train(mode == "train")
    if mode == "mixed":
        model.model.layers[0].train()
    model.model.register_buffer("counted", torch.tensor([1.5, float("nan")]))
    model.lm_head.register_buffer("again", model.model.counted)
    for index, parameter in enumerate(model.parameters()):
        if index % 3 == 0:
            parameter.grad = torch.full_like(parameter, 0.5)
        if index % 4 == 0:
            parameter.requires_grad_(False)
    model.model.layers[0].register_forward_hook(lambda module, arguments, output: None)
    before = fingerprint(model)
    with refine_verl.adapt(model, prompts(), CONFIG):
        model.model.counted.zero_()
        assert changed(before, fingerprint(model))
    assert changed(before, fingerprint(model)) == []


def test_what_the_block_does_to_the_model_is_undone() -> None:
    model = build()
    before = fingerprint(model)
    with refine_verl.adapt(model, prompts(), CONFIG) as adapted:
        adapted.model.train()
        adapted.model.requires_grad_(False)
        adapted.model.bfloat16()
    assert changed(before, fingerprint(model)) == []


class Stop(Exception):
    """Raised by a test."""


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_exception_in_the_block(error: type[BaseException], dtype: torch.dtype) -> None:
    model = build(dtype=dtype)
    before = fingerprint(model)
    with pytest.raises(error), refine_verl.adapt(model, prompts(), CONFIG):
        raise error
    assert changed(before, fingerprint(model)) == []


def failing_reward(inputs: RewardInputs) -> Tensor:
    raise Stop


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_exception_while_writing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARDS.functions, "binary", failing_reward)
    model = build(dtype=dtype)
    before = fingerprint(model)
    with pytest.raises(Stop), refine_verl.adapt(model, prompts(), {**CONFIG, "nsp": {"chunks": 2}}):
        pass
    assert changed(before, fingerprint(model)) == []


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_interrupt_between_optimiser_steps(
    at: int, error: type[BaseException], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW) -> None:
        original(self)
        steps.append(1)
        if len(steps) == at:
            raise error

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    model = build(dtype=dtype)
    before = fingerprint(model)
    with pytest.raises(error), refine_verl.adapt(model, prompts(), CONFIG):
        pass
    assert len(steps) == at
    assert changed(before, fingerprint(model)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_that_runs_out_while_saving(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: SavedModel, fixed: bool) -> None:
        raise torch.OutOfMemoryError

    model = build(dtype=dtype)
    before = fingerprint(model)
    monkeypatch.setattr(SavedModel, "_save_buffers", full)
    with pytest.raises(torch.OutOfMemoryError), refine_verl.adapt(model, prompts(), CONFIG):
        pass
    assert changed(before, fingerprint(model)) == []


def test_an_interrupt_while_restoring_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    before = fingerprint(model)
    calls: list[int] = []
    original = SavedModel._restore

    def restore(self: SavedModel) -> None:
        calls.append(1)
        if len(calls) == 1:
            self._parameters[0].restore()
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(SavedModel, "_restore", restore)
    with pytest.raises(KeyboardInterrupt), refine_verl.adapt(model, prompts(), CONFIG):
        pass
    assert len(calls) == 2 and changed(before, fingerprint(model)) == []


def test_an_actor_stays_the_actor_it_was(family: str) -> None:
    actor = make_actor(build(family), activation_checkpointing="segment")
    actor.forward_tokens = 17
    before = fingerprint(actor)
    attributes = {name: actor.__dict__[name] for name in ("adapter", "autocast_dtype", "activation_checkpointing")}
    with refine_verl.adapt(actor, prompts(), CONFIG) as adapted:
        assert isinstance(adapted.model, FastWeightActor)
        by_actor = fingerprint(actor)
    assert changed(before, fingerprint(actor)) == []
    assert actor.forward_tokens == 17 and all(actor.__dict__[name] is value for name, value in attributes.items())
    plain = build(family)
    config = {**CONFIG, "activation_checkpointing": "segment"}
    with refine_verl.adapt(plain, prompts(), config):
        by_plain = fingerprint(plain)
    assert [by_actor[name] for name in by_actor if name.endswith(":bits")] == [
        by_plain[name] for name in by_plain if name.endswith(":bits")
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tied_embeddings_stay_tied(dtype: torch.dtype) -> None:
    model = build(dtype=dtype, tie_word_embeddings=True)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embeddings.weight
    before = fingerprint(model)
    with refine_verl.adapt(model, prompts(), CONFIG) as adapted:
        assert adapted.model.lm_head.weight is adapted.model.model.embeddings.weight
        assert changed(before, fingerprint(model))
    assert changed(before, fingerprint(model)) == []


def test_a_shared_layer_learns_once_and_comes_back() -> None:
    model = build()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    before = fingerprint(model)
    with refine_verl.adapt(model, prompts(), CONFIG) as adapted:
        assert adapted.model.model.layers[1].mlp is adapted.model.model.layers[0].mlp
    assert changed(before, fingerprint(model)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_nest(dtype: torch.dtype) -> None:
    model = build(dtype=dtype)
    before = fingerprint(model)
    with refine_verl.adapt(model, prompts(), CONFIG) as outer:
        middle, answer = fingerprint(model), outer.generate(max_new_tokens=4)
        with refine_verl.adapt(outer.model, prompts(seed=9), CONFIG):
            assert changed(middle, fingerprint(model))
        assert changed(middle, fingerprint(model)) == []
        assert all(torch.equal(a, b) for a, b in zip(answer, outer.generate(max_new_tokens=4), strict=True))
    assert changed(before, fingerprint(model)) == []


def test_frozen_parameters_do_not_move_and_are_not_copied() -> None:
    model = build()
    model.model.requires_grad_(False)
    model.model.layers[0].attn.q_proj.weight.requires_grad_(True)
    before = fingerprint(model)
    with refine_verl.adapt(model, prompts(), CONFIG):
        inside = fingerprint(model)
    moved = {name for name in before if name.endswith(":bits") and before[name] != inside[name]}
    assert moved == {"model.layers.0.attn.q_proj.weight:bits", "lm_head.weight:bits"}
    saved = SavedModel(model)
    saved.save("cpu")
    assert sum(one.copy is not None for one in saved._parameters) == 2
    saved.restore()


def test_nothing_of_the_optimiser_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[torch.optim.Optimizer]] = []
    original = torch.optim.AdamW.__init__

    def remember(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        kept.append(weakref.ref(self))

    monkeypatch.setattr(torch.optim.AdamW, "__init__", remember)
    model = build()
    with refine_verl.adapt(model, prompts(), CONFIG) as adapted:
        gc.collect()
        assert kept and all(reference() is None for reference in kept)
        assert all(parameter.grad is None for parameter in adapted.model.parameters())


def test_the_callers_hooks_on_gradients_stay_silent() -> None:
    """An optimiser that steps in the backward pass would change the weights behind our back."""
    model, calls = build(), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: calls.append(parameter))
    with refine_verl.adapt(model, prompts(), CONFIG):
        pass
    assert calls == []
    model(input_ids=prompts()[0][None]).logits.sum().backward()
    assert calls  # negative control


def test_dropout_draws_nothing_and_does_nothing() -> None:
    def adapted(p: float) -> dict[str, Any]:
        model = build()
        model.model.embeddings = nn.Sequential(model.model.embeddings, nn.Dropout(p))
        model.get_input_embeddings = lambda: model.model.embeddings[0]
        before = fingerprint(model)
        with refine_verl.adapt(model, prompts(), CONFIG):
            inside = fingerprint(model)
        assert changed(before, fingerprint(model)) == []
        return {name: value for name, value in inside.items() if name.endswith(":bits")}

    assert adapted(0.5) == adapted(0.0)
