"""One document through the actor: entropies, positions, rollouts, rewards and advantages, as plain numbers."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from refine_verl.config import NSPSettings
from refine_verl.models import Documents, FastWeightActor, RolloutBatch
from refine_verl.models.reward_manager import HiddenStateRewardManager
from refine_verl.models.step import Step
from refine_verl.nsp import (
    SCORES,
    STRATEGIES,
    SelectionInputs,
    align_entropy,
    counted_tokens,
    drawn_by,
    group_standardise,
    selection_inputs,
    weights_of,
)
from refine_verl.nsp.advantage import token_advantages
from refine_verl.nsp.metrics import equal_outcomes_share

SHOWN_REWARDS = ("cosine", "binary", "hybrid")
_STEP, _DOCUMENT = 0, 0  # no training step and no data set: draws depend on the seed alone


@dataclass(frozen=True)
class Rollout:
    """What the model wrote at a position.

    Attributes:
        tokens: k ids.
        log_prob: of all k together, nats.
        rewards: by name: `SHOWN_REWARDS` and the one that would train.
        advantages: of each token, by the reward that would train, within its group.
    """

    tokens: list[int]
    log_prob: float
    rewards: dict[str, float]
    advantages: list[float]

    @property
    def advantage(self) -> float:
        """The mean of the tokens': with `credit=rollout` they are equal."""
        return statistics.fmean(self.advantages)


@dataclass(frozen=True)
class Position:
    """A chosen place: the prefix ends with token `index`, the text goes on with `target`."""

    index: int
    target: list[int]
    rollouts: list[Rollout]

    def right(self, rollout: Rollout) -> list[bool]:
        """Which of the rollout's tokens are the text's own."""
        return [token == target for token, target in zip(rollout.tokens, self.target, strict=True)]


@dataclass(frozen=True)
class Inspection:
    """All numbers of the page. Lists of T entries are by token, and entry 0, which nothing predicts, is NaN.

    Attributes:
        tokens: [T].
        entropy: [T], H of the distribution that predicted each token (Eq. 5), nats.
        smoothed: [T], its average over neighbours.
        score: [T], what positions are drawn by instead, in standard deviations from the text's mean, averaged over
            neighbours; None where it is the entropy, and for a selection strategy of a user's.
        surprise: [T], -log p of each token, nats.
        correct: [T], whether the most likely token was the right one.
        chunks: half-open ranges of positions.
        chance: [T], probability of each position within its chunk; 0 behind the last valid one. None for a selection
            strategy of a user's, whose probabilities are not known.
        positions: the chosen ones, in order.
        group_zero_std: share of groups whose rewards (with `credit=token` returns, place by place) are all equal.
    """

    tokens: list[int]
    entropy: list[float]
    smoothed: list[float]
    score: list[float] | None
    surprise: list[float]
    correct: list[bool]
    chunks: list[tuple[int, int]]
    chance: list[float] | None
    positions: list[Position]
    group_zero_std: float

    @property
    def looked_by(self) -> list[float]:
        """What positions are drawn by: `score`, or the smoothed entropy."""
        return self.smoothed if self.score is None else self.score

    @property
    def rollouts(self) -> list[Rollout]:
        """Of all positions."""
        return [rollout for position in self.positions for rollout in position.rollouts]


def analyse(
    actor: FastWeightActor, tokens: list[int], nsp: NSPSettings, seed: int, divide_by_std: bool = True
) -> Inspection:
    """Run steps 1 to 3 of the paper on one document, and read it once more for its next-token loss.

    Args:
        actor: in evaluation mode, on any device.
        tokens: [T] with T >= c + k.
        nsp: the settings.
        seed: of positions and rollouts.
        divide_by_std: divide advantages by their group's standard deviation.
    """
    device = next(actor.parameters()).device
    documents = Documents.from_tensors(torch.tensor([tokens], device=device), [len(tokens)])
    with _selecting(actor) as selected:
        batch = Step(actor, nsp, seed).write(_STEP, documents, [_DOCUMENT])
    with _recorded(actor, "score") as scores:
        actor(mode="score", documents=documents)
    (seen,), ((loss, correct),) = selected, scores
    looked_by = drawn_by(nsp.selection, seen)
    positions, zero_std = _positions(batch, nsp, divide_by_std)
    return Inspection(
        tokens=list(tokens),
        entropy=[math.nan, *seen.entropy[1:].tolist()],
        smoothed=[math.nan, *seen.smoothed[1:].tolist()],
        score=[math.nan, *looked_by[1:].tolist()] if nsp.selection in SCORES else None,
        surprise=[math.nan, *loss[:-1].tolist()],
        correct=[False, *correct[:-1].tolist()],
        chunks=seen.chunks,
        chance=_chances(weights_of(looked_by, seen).numpy(), seen.chunks, len(tokens), nsp),
        positions=positions,
        group_zero_std=zero_std,
    )


@contextmanager
def _selecting(actor: FastWeightActor) -> Iterator[list[SelectionInputs]]:
    """What positions are chosen by meanwhile: the very numbers that the actor uses, not a second estimate."""
    seen: list[SelectionInputs] = []
    select = actor.select

    def watched(
        entropy: Tensor, hidden: Tensor, tokens: Tensor, norms: Tensor | None, nsp: NSPSettings, uniforms: Tensor
    ) -> Tensor:
        about = {"hidden": hidden, "tokens": tokens, "write_norms": norms}
        seen.append(selection_inputs(align_entropy(entropy), nsp, uniforms, **about))
        return select(entropy, hidden, tokens, norms, nsp, uniforms)

    actor.__dict__["select"] = watched
    try:
        yield seen
    finally:
        del actor.__dict__["select"]


@contextmanager
def _recorded(actor: FastWeightActor, task: str) -> Iterator[list[Any]]:
    """What the LM head returns for `task` meanwhile."""
    results: list[Any] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if kwargs.get("task") == task:
            results.append(output)

    handle = actor.get_output_embeddings().register_forward_hook(record, with_kwargs=True)  # type: ignore[operator]
    try:
        yield results
    finally:
        handle.remove()


def _chances(weights: np.ndarray, chunks: list[tuple[int, int]], length: int, nsp: NSPSettings) -> list[float] | None:
    """Probability of each position under the selection that is set (Eq. 6), [T]; None for one of a user's."""
    if nsp.selection not in (*STRATEGIES, *SCORES):
        return None
    chances = np.zeros(length)
    for start, stop in chunks:
        part = weights[start:stop]
        if nsp.selection in ("entropy", *SCORES):
            scaled = np.exp((part - part.max()) / nsp.entropy_temperature)
            chances[start:stop] = scaled / scaled.sum()
        elif nsp.selection == "uniform":
            chances[start:stop] = 1 / (stop - start)
        else:
            best = np.argmax(part) if nsp.selection == "max_entropy" else np.argmin(part)
            chances[start + int(best)] = 1.0
    return chances.tolist()


def _positions(batch: RolloutBatch, nsp: NSPSettings, divide_by_std: bool) -> tuple[list[Position], float]:
    manager = HiddenStateRewardManager(nsp.reward, SHOWN_REWARDS, nsp.credit)
    scores = {name: values.double().cpu() for name, values in manager(batch).items()}
    length, trained = batch.tokens.shape[-1], scores["rewards"]
    lengths = torch.full(trained.shape[:2], length) if batch.lengths is None else batch.lengths.cpu()
    if batch.lengths is not None:
        scores["rollout_lengths"] = lengths
    compare = functools.partial(group_standardise, group=nsp.group, divide_by_std=divide_by_std)
    advantages = token_advantages(scores, nsp, compare)[0].tolist()
    values = {name: scores[f"reward_{name}"][0].tolist() for name in SHOWN_REWARDS}
    values[nsp.reward] = trained[0].tolist()
    counted = counted_tokens(lengths[:, :, None], length)
    log_probs = batch.log_probs.double().cpu().masked_fill(~counted, 0).sum(dim=-1)[0].tolist()
    tokens, targets, own = batch.tokens[0].tolist(), batch.target_tokens[0].tolist(), lengths[0].tolist()
    positions = [
        Position(
            index=index,
            target=targets[chunk][: own[chunk]],
            rollouts=[
                Rollout(
                    tokens=tokens[chunk][n][: own[chunk]],
                    log_prob=log_probs[chunk][n],
                    rewards={name: value[chunk][n] for name, value in values.items()},
                    advantages=advantages[chunk][n][: own[chunk]],
                )
                for n in range(nsp.rollouts_per_position)
            ],
        )
        for chunk, index in enumerate(batch.positions[0].tolist())
    ]
    return positions, equal_outcomes_share(scores, nsp.group)
