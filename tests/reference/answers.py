"""Log-probabilities of an answer, the slow way, and the actor's own held to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from reference.toy import gradients, one_by_one, relative
from torch import Tensor

from refine_verl.models import Documents, FastWeightActor
from refine_verl.models.answers import Answers


def plain_log_probs(actor: FastWeightActor, prompt: Tensor, answer: Tensor, temperature: float) -> Tensor:
    """Of every token of the answer, from one forward pass over prompt and answer without any state."""
    logits = actor(input_ids=torch.cat([prompt, answer])[None], use_cache=False).logits[0]
    scaled = torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, dim=-1)
    return scaled.gather(1, answer[:, None])[:, 0]


def compare_answers(
    actor: FastWeightActor,
    plain: FastWeightActor,
    prompts: Documents,
    limits: Sequence[int],
    *,
    copies: int,
    width: int,
    segments: int,
    tolerance: float,
) -> Answers:
    """Write answers, and hold their log-probabilities and all gradients to plain passes over prompt and answer.

    Args:
        actor, plain: the same model; the second reads without any state.
        limits: most tokens of an answer to each prompt.
        copies, width: answers to each, and tokens of the longest.
        segments: in so many pieces answers are read.
        tolerance: relative.
    """
    rows = len(prompts)
    draws = torch.rand(rows, copies, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    written: Answers = actor(
        mode="generate", prompts=prompts, limits=limits, length=width, copies=copies, temperature=1.0, draws=draws
    )
    # each prompt once, then a token at a time
    assert actor.forward_tokens == prompts.total + (width - 1) * rows * copies
    got = actor(
        mode="answer_log_probs",
        prompts=prompts,
        tokens=written.tokens,
        lengths=written.lengths,
        temperature=1.0,
        segments=segments,
    )["log_probs"]
    assert relative(got, written.log_probs.flatten(0, 1)) < tolerance
    got.sum().backward()
    for b, prompt in enumerate(one_by_one(prompts)):
        for r in range(copies):
            answer = written.tokens[b, r, : limits[b]]
            wanted = plain_log_probs(plain, prompt.tokens[0], answer, 1.0)
            assert relative(got.view(rows, copies, width)[b, r, : limits[b]], wanted) < tolerance
            wanted.sum().backward()
    wanted_gradients = gradients(plain)
    for name, gradient in gradients(actor).items():
        assert relative(gradient, wanted_gradients[name]) < tolerance, name
    return written
