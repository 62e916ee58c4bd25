"""Generation from states equals generation one by one and the slow way, recomputing everything for each token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference.toy import documents_of, one_by_one
from torch import Tensor

from refine_verl.models import Documents, FastWeightActor
from refine_verl.models.packing import IGNORED
from refine_verl.nsp import sample_from_logits

Make = Callable[..., FastWeightActor]
LENGTHS = (1, 9, 23, 9)
STEPS = 7


def uniform_draws() -> Tensor:
    return torch.rand(len(LENGTHS), STEPS, generator=torch.Generator().manual_seed(11), dtype=torch.float64)


def generate(actor: FastWeightActor, prompts: Documents, **kwargs: object) -> Tensor:
    """[N, STEPS], IGNORED behind the end of a row."""
    answers = actor(mode="generate", prompts=prompts, limits=[STEPS] * len(prompts), length=STEPS, **kwargs)
    return answers.tokens.masked_fill(~answers.mask, IGNORED).squeeze(1)


def recompute(actor: FastWeightActor, prompt: Tensor, temperature: float, draws: Tensor) -> list[int]:
    """Every token from a plain forward pass over all before it, without any cache."""
    text = prompt.clone()
    for step in range(STEPS):
        with torch.no_grad():
            logits = actor(input_ids=text[None], use_cache=False).logits[:, -1]
        text = torch.cat([text, sample_from_logits(logits, draws[step : step + 1], temperature)[0]])
    return text[len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_prompts_of_unequal_length(make: Make, temperature: float) -> None:
    actor, prompts, draws = make(), documents_of(LENGTHS), uniform_draws()
    together = generate(actor, prompts, temperature=temperature, draws=draws)
    assert together.shape == (len(LENGTHS), STEPS) and together.dtype == torch.int64
    for b, prompt in enumerate(one_by_one(prompts)):
        alone = generate(actor, prompt, temperature=temperature, draws=draws[b : b + 1])
        assert together[b].tolist() == alone[0].tolist()
        assert together[b].tolist() == recompute(actor, prompt.tokens[0], temperature, draws[b])


def test_greedy_needs_no_draws_and_sampling_uses_them(make: Make) -> None:
    actor, prompts, draws = make(), documents_of(LENGTHS), uniform_draws()
    greedy = generate(actor, prompts)
    assert torch.equal(greedy, generate(actor, prompts, draws=draws))
    sampled = generate(actor, prompts, temperature=1.0, draws=draws)
    assert not torch.equal(sampled, greedy)
    assert not torch.equal(sampled, generate(actor, prompts, temperature=1.0, draws=1 - draws))


def test_a_stop_token_ends_its_row_and_no_other(make: Make) -> None:
    actor, prompts, draws = make(), documents_of(LENGTHS), uniform_draws()
    free = generate(actor, prompts, temperature=1.0, draws=draws)
    stop = free[2, 3].item()
    stopped = generate(actor, prompts, temperature=1.0, draws=draws, stop_tokens=[stop])
    for row, wanted in zip(stopped.tolist(), free.tolist(), strict=True):
        end = wanted.index(stop) + 1 if stop in wanted else STEPS
        assert row == wanted[:end] + [IGNORED] * (STEPS - end)
    assert stopped[2, -1] == IGNORED and (stopped != IGNORED).all(dim=1).any()  # one row stopped, another went on


def test_one_token_is_not_fed_back(make: Make) -> None:
    """The last token needs no pass after it: prompts once, then one pass for each token but the last."""
    actor, prompts = make(), documents_of(LENGTHS)
    actor.forward_tokens = 0
    generate(actor, prompts)
    assert actor.forward_tokens == sum(LENGTHS) + len(LENGTHS) * (STEPS - 1)


def test_kernels_that_write_in_place_cannot_reach_a_state(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, fla's single-token decoding overwrites the convolution states it is given; so does this model."""
    actor, prompts = make(), documents_of((9, 9))
    forward, spoiled = actor.base_model.forward, []

    def overwriting(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        given = [part for layer in past_key_values for part in layer["conv_state"] if part is not None]
        output = forward(*args, past_key_values=past_key_values, **kwargs)
        for part in given:
            part.zero_()
            spoiled.append(part)
        return output

    with torch.no_grad():
        _, state = actor.run(prompts.cut([0, 0], [8, 8]), None, keep_state=True)
        before = [tensor.clone() for tensor in state.tensors]
        monkeypatch.setattr(actor.base_model, "forward", overwriting)
        actor.run(prompts.cut([8, 8], [9, 9]), state, keep_state=True)
    assert len(spoiled) == 2 * 3  # layers, and the convolutions of queries, keys and values
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(state.tensors, before, strict=True))
