"""Answers to prompts: what is written and scored from forked states is what plain forward passes give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference.answers import plain_log_probs
from reference.toy import NSP, VOCABULARY, documents_of, gradients, one_by_one, relative
from torch import Tensor

from refine_verl.models import Documents, FastWeightActor
from refine_verl.models.answers import Answers
from refine_verl.nsp import generation_uniforms

Make = Callable[..., FastWeightActor]
LENGTHS = (1, 9, 23, 2)
LIMITS = (7, 3, 1, 5)
COPIES, WIDTH = 3, 7
RELATIVE = 1e-9


def draws() -> Tensor:
    return torch.stack([torch.from_numpy(generation_uniforms(5, 1, b, COPIES, WIDTH)) for b in range(len(LENGTHS))])


def write(actor: FastWeightActor, prompts: Documents, **kwargs: Any) -> Answers:
    given = {"limits": LIMITS, "length": WIDTH, "copies": COPIES, "temperature": 1.0, "draws": draws(), **kwargs}
    return actor(mode="generate", prompts=prompts, **given)


def test_every_row_stops_at_its_own_limit(make: Make) -> None:
    actor, prompts = make(), documents_of(LENGTHS)
    written = write(actor, prompts)
    assert written.tokens.shape == (len(LENGTHS), COPIES, WIDTH)
    assert 0 <= written.tokens.min() <= written.tokens.max() < VOCABULARY
    assert written.lengths.tolist() == [[limit] * COPIES for limit in LIMITS]
    assert not written.tokens[~written.mask].any() and not written.log_probs[~written.mask].any()
    assert actor.forward_tokens == sum(LENGTHS) + len(LENGTHS) * COPIES * (WIDTH - 1)  # each prompt is read once


def test_a_stop_token_ends_an_answer_and_counts(make: Make) -> None:
    actor, prompts = make(), documents_of(LENGTHS)
    free = write(actor, prompts)
    stop = int(free.tokens[0, 1, 2])
    stopped = write(actor, prompts, stop_tokens=[stop])
    for b in range(len(LENGTHS)):
        for r in range(COPIES):
            wanted = free.tokens[b, r, : LIMITS[b]].tolist()
            if stop in wanted:
                wanted = wanted[: wanted.index(stop) + 1]
            assert stopped.tokens[b, r, : stopped.lengths[b, r]].tolist() == wanted
    assert stopped.lengths[0, 1] <= 3 < free.lengths[0, 1]


def test_generation_ends_with_the_last_row_unless_other_ranks_go_on(make: Make) -> None:
    actor, prompts = make(), documents_of(LENGTHS)
    write(actor, prompts, limits=(2, 1, 2, 2))
    assert actor.forward_tokens == sum(LENGTHS) + len(LENGTHS) * COPIES
    actor.forward_tokens = 0
    longer = write(actor, prompts, limits=(2, 1, 2, 2), all_done=lambda done: False)
    assert actor.forward_tokens == sum(LENGTHS) + len(LENGTHS) * COPIES * (WIDTH - 1)
    assert torch.equal(longer.tokens, write(actor, prompts, limits=(2, 1, 2, 2)).tokens)


def test_answers_depend_on_their_own_prompt_and_draws_alone(make: Make) -> None:
    actor, prompts = make(), documents_of(LENGTHS)
    together = write(actor, prompts)
    for b, prompt in enumerate(one_by_one(prompts)):
        for r in range(COPIES):
            alone = write(actor, prompt, limits=LIMITS[b : b + 1], copies=1, draws=draws()[b : b + 1, r : r + 1])
            assert torch.equal(alone.tokens[0, 0], together.tokens[b, r])
    assert not torch.equal(write(actor, prompts, draws=1 - draws()).tokens, together.tokens)


@pytest.mark.parametrize(("temperature", "segments"), [(1.0, 1), (0.7, 4)])
def test_log_probabilities_and_gradients_are_those_of_plain_passes(
    make: Make, temperature: float, segments: int
) -> None:
    """Also for a prompt of fewer tokens than segments."""
    actor, plain, prompts = (
        make(activation_checkpointing="segment" if segments > 1 else "none"),
        make(),
        documents_of(LENGTHS),
    )
    written = write(actor, prompts, temperature=temperature)
    weights = torch.randn(written.tokens.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    got = actor(
        mode="answer_log_probs",
        prompts=prompts,
        tokens=written.tokens,
        lengths=written.lengths,
        temperature=temperature,
        segments=segments,
    )["log_probs"].view(written.tokens.shape)
    assert not got[~written.mask].any()
    assert relative(got[written.mask], written.log_probs[written.mask]) < RELATIVE  # the sampler's own
    (got * weights).sum().backward()
    total = torch.zeros((), dtype=torch.float64)
    for b, prompt in enumerate(one_by_one(prompts)):
        for r in range(COPIES):
            answer = written.tokens[b, r, : written.lengths[b, r]]
            wanted = plain_log_probs(plain, prompt.tokens[0], answer, temperature)
            assert relative(got[b, r, : len(answer)], wanted) < RELATIVE
            total = total + (wanted * weights[b, r, : len(answer)]).sum()
    total.backward()
    wanted_gradients = gradients(plain)
    for name, gradient in gradients(actor).items():
        assert relative(gradient, wanted_gradients[name]) < RELATIVE, name


def answer_loss(actor: FastWeightActor, joined: Documents) -> Tensor:
    return actor(mode="update", documents=joined, branches=None, nsp=NSP)["ntp_loss_sum"]


@pytest.mark.parametrize("checkpointing", ["none", "layer", "segment"])
def test_fine_tuning_learns_the_answer_and_nothing_else(make: Make, checkpointing: str) -> None:
    """The loss starts at a position: a token of the answer that occurs in the prompt, or is the padding, counts."""
    prompts, answers = (6, 11, 3), (4, 1, 5)
    total = [p + a for p, a in zip(prompts, answers, strict=True)]
    joined = documents_of(total)
    joined.tokens[0, :] = 0  # one id everywhere, as where padding equals end of sequence
    joined = Documents.from_tensors(joined.tokens, total, prompts)
    actor, plain = make(activation_checkpointing=checkpointing), make()
    loss = answer_loss(actor, joined)
    loss.backward()
    wanted = torch.zeros((), dtype=torch.float64)
    for document, start in zip(one_by_one(joined), prompts, strict=True):
        logits = plain(input_ids=document.tokens, use_cache=False).logits[0]
        wanted = wanted + F.cross_entropy(logits[start - 1 : -1], document.tokens[0, start:], reduction="sum")
    wanted.backward()
    assert relative(loss, wanted) < RELATIVE
    wanted_gradients = gradients(plain)
    for name, gradient in gradients(actor).items():
        assert relative(gradient, wanted_gradients[name]) < RELATIVE, name
    # the control: the whole text has another loss
    assert relative(answer_loss(make(), Documents.from_tensors(joined.tokens, total)), wanted) > 0.1


def test_a_document_that_only_keeps_ranks_in_step_teaches_nothing(make: Make) -> None:
    documents = documents_of((9, 14))
    actor, alone = make(), make()
    loss = answer_loss(actor, Documents.from_tensors(documents.tokens, (9, 14), (1, 14)))
    loss.backward()
    answer_loss(alone, one_by_one(documents)[0]).backward()
    wanted = gradients(alone)
    assert all(relative(gradient, wanted[name]) < RELATIVE for name, gradient in gradients(actor).items())
    nothing = make()
    answer_loss(nothing, Documents.from_tensors(documents.tokens, (9, 14), (9, 14))).backward()
    # zeros and not None: FSDP waits for every parameter's backward pass
    assert all(not gradient.any() for gradient in gradients(nothing).values())
