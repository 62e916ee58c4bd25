"""Answers to prompts: written from the state after the prompt, and scored from it when they are trained on.

A prompt is read once, whatever number of answers it gets: its state is forked, as a document's is for rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refine_verl.models.packing import Documents, Packed, pack
from refine_verl.models.state import FastWeightState
from refine_verl.nsp import sample_from_logits

if TYPE_CHECKING:
    from refine_verl.models.actor import FastWeightActor


@dataclass(frozen=True)
class Answers:
    """n answers to each of N prompts, of at most A tokens.

    Attributes:
        tokens: int64 [N, n, A], 0 after the end of an answer.
        lengths: int64 [N, n], at least 1; a stop token counts.
        log_probs: float32 [N, n, A], of the policy that wrote them; 0 after the end.
    """

    tokens: Tensor
    lengths: Tensor
    log_probs: Tensor

    @property
    def mask(self) -> Tensor:
        """bool [N, n, A]: tokens that belong to an answer, told by position and never by id."""
        return torch.arange(self.tokens.shape[-1], device=self.lengths.device) < self.lengths[..., None]


def here(done: Tensor) -> bool:
    """Whether all rows of this process are done."""
    return bool(done.all())


def write(
    actor: FastWeightActor,
    prompts: Documents,
    limits: Sequence[int],
    length: int,
    *,
    copies: int = 1,
    temperature: float = 0.0,
    draws: Tensor | None = None,
    stop_tokens: Sequence[int] = (),
    all_done: Callable[[Tensor], bool] = here,
) -> Answers:
    """Continue prompts of unequal length, each until a stop token or its own limit.

    Args:
        actor: the policy, without gradients.
        prompts: N prompts.
        limits: most tokens of an answer to each prompt, at most ``length``.
        length: A; under FSDP the same on all ranks.
        copies: n answers per prompt.
        temperature: 0 takes the most likely token.
        draws: uniforms [N, n, A], needed unless the temperature is 0.
        stop_tokens: ids that end an answer.
        all_done: asked after each token, with bool [N * n], whether to stop; under FSDP ranks must agree.
    """
    packed = prompts.cut([0] * len(prompts), prompts.lengths)
    hidden, state = actor.run(packed, None, keep_state=True)
    assert state is not None
    last, state = hidden[packed.last].repeat_interleave(copies, dim=0), state.fork(copies)
    device, rows = last.device, len(prompts) * copies
    uniforms = torch.zeros(rows, length) if draws is None else draws.reshape(rows, length)
    limit = torch.tensor(list(limits), device=device).repeat_interleave(copies)
    stops = torch.tensor(list(stop_tokens), dtype=torch.int64, device=device)
    lengths = torch.zeros(rows, dtype=torch.int64, device=device)
    done = torch.zeros(rows, dtype=torch.bool, device=device)
    tokens, log_probs = [], []
    for step in range(length):
        token, log_prob = sample_from_logits(actor._head(last), uniforms[:, step].to(device), temperature)
        tokens.append(token.masked_fill(done, 0))
        log_probs.append(log_prob.masked_fill(done, 0.0))
        lengths = lengths + ~done
        done = done | torch.isin(token, stops) | (lengths >= limit)
        if step + 1 == length or all_done(done):
            break
        last, state = actor.run(Packed(token.unsqueeze(1), (1,) * rows, None), state, keep_state=True)
    missing, shape = length - len(tokens), (len(prompts), copies, length)
    return Answers(
        tokens=torch.nn.functional.pad(torch.stack(tokens, dim=1), (0, missing)).view(shape),
        lengths=lengths.view(shape[:2]),
        log_probs=torch.nn.functional.pad(torch.stack(log_probs, dim=1), (0, missing)).view(shape),
    )


def log_probs(
    actor: FastWeightActor, prompts: Documents, tokens: Tensor, lengths: Tensor, temperature: float, segments: int
) -> Tensor:
    """Log-probabilities of answers under the current policy, with the gradient through the whole prompt.

    Args:
        actor: the policy.
        prompts: N prompts.
        tokens, lengths: see `Answers`.
        temperature: that of the sampler.
        segments: in how many passes to read the prompts; the same on all ranks.

    Returns:
        [N * n, A], 0 after the end of an answer.
    """
    copies, width = tokens.shape[1:]
    last, state = _read(actor, prompts, segments)
    rows, counts = tokens.flatten(0, 1), lengths.flatten().tolist()
    # an answer of one token reads that token for nothing: every rank has to make this pass
    packed = pack([row[: max(count - 1, 1)] for row, count in zip(rows, counts, strict=True)])
    hidden, _ = actor._segment(packed, state.fork(copies), keep_state=False)
    first = last.repeat_interleave(copies, dim=0)
    pieces = [
        torch.cat([first[i : i + 1], piece[: count - 1]])
        for i, (piece, count) in enumerate(zip(hidden.split(packed.lengths), counts, strict=True))
    ]
    mask = torch.arange(width, device=rows.device) < lengths.flatten()[:, None]
    values = actor._head(torch.cat(pieces), "log_probs", targets=rows[mask], temperature=temperature)
    return values.new_zeros(rows.shape).masked_scatter(mask, values)


def _read(actor: FastWeightActor, prompts: Documents, segments: int) -> tuple[Tensor, FastWeightState]:
    """Hidden state [N, d] at the last token of each prompt, and the state [N rows] after it."""
    borders = prompts.even_cuts(segments)
    lasts, states = [], []
    ends = [0] * len(prompts)
    state: FastWeightState | None = None
    for index, (starts, stops) in enumerate(zip(borders, borders[1:], strict=False)):
        packed = prompts.cut(starts, stops)
        part, state = actor._segment(packed, state, keep_state=True)
        assert state is not None
        lasts.append(part[packed.last])
        states.append(state)
        for b, length in enumerate(prompts.lengths):
            # a prompt of fewer tokens than segments is over before the others are
            ends[b] = index if starts[b] < length else ends[b]
    if min(ends) == segments - 1:  # as always but for very short prompts
        return lasts[-1], states[-1]
    picks = [(index, b) for b, index in enumerate(ends)]
    return torch.stack([lasts[index][b] for index, b in picks]), FastWeightState.gather(states, picks)
