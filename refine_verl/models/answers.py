"""Answers to prompts: written from the state after the prompt, and scored from it when they are trained on.

A prompt is read once, whatever number of answers it gets: its state is forked, as a document's is for rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from refine_verl.models.packing import Documents, pack
from refine_verl.models.passes import Passes
from refine_verl.models.state import FastWeightState
from refine_verl.models.trace import read_segments
from refine_verl.nsp import end_tokens, generation_uniforms


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


def answer_draws(seed: int, step: int, prompts: Sequence[int], copies: int, length: int) -> Tensor:
    """Uniforms [N, n, A] for answers to the prompts of these ids; see `refine_verl.nsp.generation_uniforms`."""
    rows = [torch.from_numpy(generation_uniforms(seed, step, prompt, copies, length)) for prompt in prompts]
    return torch.stack(rows)


def end_tokens_of(model: object, *more: int | None) -> tuple[int, ...]:
    """Ids that end an answer of a model; see `refine_verl.nsp.end_tokens`."""
    return end_tokens(getattr(model, "generation_config", None), *more)


def write(
    actor: Passes,
    prompts: Documents,
    limits: Sequence[int],
    length: int,
    *,
    copies: int = 1,
    temperature: float = 0.0,
    draws: Tensor | None = None,
    stop_tokens: Sequence[int] = (),
    ends: Callable[[Tensor], Tensor] | None = None,
    all_done: Callable[[Tensor], bool] = lambda done: bool(done.all()),
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
        ends: asked instead, after each token with int64 [N * n], which rows it ends: bool [N * n].
        all_done: asked after each token, with bool [N * n], whether to stop; under FSDP ranks must agree.
    """
    packed = prompts.whole
    hidden, state = actor.run(packed, prompts.before, keep_state=True)
    assert state is not None
    device, shape = hidden.device, (len(prompts), copies, length)
    uniforms = torch.zeros(shape) if draws is None else draws
    stops = torch.tensor(list(stop_tokens), dtype=torch.int64).to(device, non_blocking=True)
    most = torch.tensor(list(limits)).repeat_interleave(copies).to(device, non_blocking=True)
    lengths, done = torch.zeros_like(most), torch.zeros_like(most, dtype=torch.bool)

    def stop(token: Tensor) -> bool:
        """Count one more token [N * n] of each answer that is not done; whether to stop."""
        nonlocal lengths, done
        lengths = lengths + ~done
        done = done | (ends(token) if ends else torch.isin(token, stops)) | (lengths >= most)
        return all_done(done)

    last = hidden[packed.last].repeat_interleave(copies, dim=0)
    written = actor.write(
        last, state.fork(copies), uniforms.reshape(len(prompts) * copies, length), temperature, stop=stop
    )
    behind = torch.arange(length, device=device) >= lengths[:, None]
    missing = (0, length - written.tokens.shape[1])
    return Answers(
        tokens=F.pad(written.tokens, missing).masked_fill(behind, 0).view(shape),
        lengths=lengths.view(shape[:2]),
        log_probs=F.pad(written.log_probs, missing).masked_fill(behind, 0.0).view(shape),
    )


def log_probs(
    actor: Passes, prompts: Documents, tokens: Tensor, lengths: Tensor, temperature: float, segments: int
) -> dict[str, Tensor]:
    """Log-probabilities of answers under the current policy, with the gradient through the whole prompt.

    Args:
        actor: the policy.
        prompts: N prompts.
        tokens, lengths: see `Answers`.
        temperature: that of the sampler.
        segments: in how many passes to read the prompts; the same on all ranks.

    Returns:
        ``log_probs``: [N * n, A], 0 after the end of an answer.
    """
    copies, width = tokens.shape[1:]
    last, state = _read(actor, prompts, segments)
    rows, counts = tokens.flatten(0, 1), lengths.flatten().tolist()
    # an answer of one token reads that token for nothing: every rank has to make this pass
    packed = pack([row[: max(count - 1, 1)] for row, count in zip(rows, counts, strict=True)])
    hidden, _ = actor.segment(packed, state.fork(copies), keep_state=False)
    first = last.repeat_interleave(copies, dim=0)
    pieces = [
        torch.cat([first[i : i + 1], piece[: count - 1]])
        for i, (piece, count) in enumerate(zip(hidden.split(packed.lengths), counts, strict=True))
    ]
    # by index and not by mask: the host knows the counts, and need not wait for them again
    written = torch.cat([torch.arange(count) + row * width for row, count in enumerate(counts)])
    index = written.to(rows.device, non_blocking=True)
    targets = rows.flatten().index_select(0, index)
    values = actor.apply_head(torch.cat(pieces), "log_probs", targets=targets, temperature=temperature, chunked=True)
    return {"log_probs": values.new_zeros(rows.numel()).index_copy(0, index, values).view(rows.shape)}


def _read(actor: Passes, prompts: Documents, segments: int) -> tuple[Tensor, FastWeightState]:
    """Hidden state [N, d] at the last token of each prompt, and the state [N rows] after it."""
    lasts, states = [], []
    for part in read_segments(actor.segment, prompts, prompts.even_cuts(segments), keep_last=True):
        assert part.state is not None
        lasts.append(part.last)
        states.append(part.state)
    if min(prompts.lengths) >= segments:  # as always but for very short prompts
        return lasts[-1], states[-1]
    # a prompt of fewer tokens than segments is over before the others are
    picks = [(min(length, segments) - 1, b) for b, length in enumerate(prompts.lengths)]
    return torch.stack([lasts[index][b] for index, b in picks]), FastWeightState.gather(states, picks)
