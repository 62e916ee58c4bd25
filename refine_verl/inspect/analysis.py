"""One document through the actor: entropies, positions, rollouts, rewards and advantages, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from refine_verl.config import NSPSettings
from refine_verl.models import Documents, FastWeightActor, RolloutBatch
from refine_verl.models.reward_manager import HiddenStateRewardManager
from refine_verl.models.step import Step
from refine_verl.nsp import (
    ANCHORS,
    STRATEGIES,
    align_entropy,
    chunk_bounds,
    group_standardise,
    group_zero_std_share,
    smooth_token_entropy,
)

SHOWN_REWARDS = ("cosine", "binary", "hybrid")
_STEP, _DOCUMENT = 0, 0  # no training step and no data set: draws depend on the seed alone


@dataclass(frozen=True)
class Rollout:
    """What the model wrote at a position.

    Attributes:
        tokens: k ids.
        log_prob: of all k together, nats.
        rewards: by name: `SHOWN_REWARDS` and the one that would train.
        advantage: of the reward that would train, within its group.
    """

    tokens: list[int]
    log_prob: float
    rewards: dict[str, float]
    advantage: float


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
        smoothed: [T], what positions are chosen by.
        surprise: [T], -log p of each token, nats.
        correct: [T], whether the most likely token was the right one.
        chunks: half-open ranges of positions.
        chance: [T], probability of each position within its chunk; 0 behind the last valid one. None for a selection
            strategy of a user's, whose probabilities are not known.
        positions: the chosen ones, in order.
        group_zero_std: share of groups whose rewards are all equal.
    """

    tokens: list[int]
    entropy: list[float]
    smoothed: list[float]
    surprise: list[float]
    correct: list[bool]
    chunks: list[tuple[int, int]]
    chance: list[float] | None
    positions: list[Position]
    group_zero_std: float

    @property
    def rollouts(self) -> list[Rollout]:
        """Of all positions."""
        return [rollout for position in self.positions for rollout in position.rollouts]


def analyse(actor: FastWeightActor, tokens: list[int], nsp: NSPSettings, seed: int) -> Inspection:
    """Run steps 1 to 3 of the paper on one document, and read it once more for its next-token loss.

    Args:
        actor: in evaluation mode, on any device.
        tokens: [T] with T >= c + k.
        nsp: the settings.
        seed: of positions and rollouts.
    """
    device = next(actor.parameters()).device
    documents = Documents.from_tensors(torch.tensor([tokens], device=device), [len(tokens)])
    with _recorded(actor, "entropy") as entropies:
        batch = Step(actor, nsp, seed).write(_STEP, documents, [_DOCUMENT])
    with _recorded(actor, "score") as scores:
        actor(mode="score", documents=documents)
    (entropy,), ((loss, correct),) = entropies, scores
    aligned = align_entropy(entropy.double().cpu())
    smoothed = smooth_token_entropy(aligned, nsp.pooling_window)
    positions, zero_std = _positions(batch, nsp)
    return Inspection(
        tokens=list(tokens),
        entropy=[math.nan, *aligned[1:].tolist()],
        smoothed=[math.nan, *smoothed[1:].tolist()],
        surprise=[math.nan, *loss[:-1].tolist()],
        correct=[False, *correct[:-1].tolist()],
        chunks=chunk_bounds(len(tokens) - nsp.rollout_length, nsp.chunks),
        chance=_chances(smoothed.numpy(), nsp),
        positions=positions,
        group_zero_std=zero_std,
    )


@contextmanager
def _recorded(actor: FastWeightActor, task: str) -> Iterator[list[Any]]:
    """What the LM head returns for `task` meanwhile: the very numbers that the actor uses, not a second estimate."""
    results: list[Any] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if kwargs.get("task") == task:
            results.append(output)

    handle = actor.get_output_embeddings().register_forward_hook(record, with_kwargs=True)  # type: ignore[operator]
    try:
        yield results
    finally:
        handle.remove()


def _chances(smoothed: np.ndarray, nsp: NSPSettings) -> list[float] | None:
    """Probability of each position under the selection that is set (Eq. 6), [T]; None for one not of the paper."""
    if nsp.selection not in STRATEGIES:
        return None
    valid = len(smoothed) - nsp.rollout_length
    offset = ANCHORS[nsp.anchor]
    weights = np.nan_to_num(smoothed[offset : offset + valid], nan=0.0, posinf=0.0, neginf=0.0)
    chances = np.zeros(len(smoothed))
    for start, stop in chunk_bounds(valid, nsp.chunks):
        part = weights[start:stop]
        if nsp.selection == "entropy":
            scaled = np.exp((part - part.max()) / nsp.entropy_temperature)
            chances[start:stop] = scaled / scaled.sum()
        elif nsp.selection == "uniform":
            chances[start:stop] = 1 / (stop - start)
        else:
            best = np.argmax(part) if nsp.selection == "max_entropy" else np.argmin(part)
            chances[start + int(best)] = 1.0
    return chances.tolist()


def _positions(batch: RolloutBatch, nsp: NSPSettings) -> tuple[list[Position], float]:
    scores = HiddenStateRewardManager(nsp.reward, SHOWN_REWARDS)(batch)
    trained = scores["rewards"].double().cpu()
    advantages = group_standardise(trained, nsp.group)[0].tolist()
    values = {name: scores[f"reward_{name}"][0].tolist() for name in SHOWN_REWARDS}
    values[nsp.reward] = trained[0].tolist()
    log_probs = batch.log_probs.double().sum(dim=-1)[0].tolist()
    tokens, targets = batch.tokens[0].tolist(), batch.target_tokens[0].tolist()
    positions = [
        Position(
            index=index,
            target=targets[chunk],
            rollouts=[
                Rollout(
                    tokens=tokens[chunk][n],
                    log_prob=log_probs[chunk][n],
                    rewards={name: value[chunk][n] for name, value in values.items()},
                    advantage=advantages[chunk][n],
                )
                for n in range(nsp.rollouts_per_position)
            ],
        )
        for chunk, index in enumerate(batch.positions[0].tolist())
    ]
    return positions, group_zero_std_share(trained, nsp.group)
