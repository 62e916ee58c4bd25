"""Answers from forked states that hold an open chunk, against plain passes over prompt and answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from reference.answers import plain_log_probs
from reference.toy import documents_of, gradients, one_by_one, relative

from refine_verl.models import FastWeightActor

Make = Callable[..., FastWeightActor]
LENGTHS = (3, 17, 24)  # an open chunk, one just begun, and one that is just full
LIMITS = (11, 2, 9)  # beyond the end of a chunk, and not
COPIES, WIDTH = 2, 11
RELATIVE = 1e-9


@pytest.mark.parametrize("segments", [1, 5])
def test_log_probabilities_and_gradients_are_those_of_plain_passes(make: Make, segments: int) -> None:
    actor, plain, prompts = (
        make(activation_checkpointing="segment" if segments > 1 else "none"),
        make(),
        documents_of(LENGTHS),
    )
    draws = torch.rand(len(LENGTHS), COPIES, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    written = actor(
        mode="generate", prompts=prompts, limits=LIMITS, length=WIDTH, copies=COPIES, temperature=1.0, draws=draws
    )
    assert written.lengths.tolist() == [[limit] * COPIES for limit in LIMITS]
    got = actor(
        mode="answer_log_probs",
        prompts=prompts,
        tokens=written.tokens,
        lengths=written.lengths,
        temperature=1.0,
        segments=segments,
    )["log_probs"]
    assert relative(got, written.log_probs.flatten(0, 1)) < RELATIVE
    got.sum().backward()
    for b, prompt in enumerate(one_by_one(prompts)):
        for r in range(COPIES):
            answer = written.tokens[b, r, : LIMITS[b]]
            wanted = plain_log_probs(plain, prompt.tokens[0], answer, 1.0)
            assert relative(got.view(len(LENGTHS), COPIES, WIDTH)[b, r, : LIMITS[b]], wanted) < RELATIVE
            wanted.sum().backward()
    wanted_gradients = gradients(plain)
    for name, gradient in gradients(actor).items():
        assert relative(gradient, wanted_gradients[name]) < RELATIVE, name
