"""What is measured of a model: values recalled, next tokens, and the rewards of its rollouts, on held-out sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from examples.recall.task import Task
from refine_verl.config import NSPSettings
from refine_verl.models import FastWeightActor, RolloutBatch, RolloutDraws, snapshot_count
from refine_verl.nsp import get_reward

REWARDS = ("cosine", "binary", "hybrid")
# Uniform: the places do not move with a model's entropies, so that all models are judged at the same ones.
JUDGED = NSPSettings(chunks=8, rollout_length=5, rollouts_per_position=2, selection="uniform")
HELD_OUT_SEED = 1_000_003


def held_out(task: Task, seed: int, count: int) -> Tensor:
    """Sequences that no training of this seed sees, int64 [count, T]."""
    return task.sample(torch.Generator().manual_seed(HELD_OUT_SEED + seed), count)


def score(actor: FastWeightActor, task: Task, tokens: Tensor, batch: int = 64) -> dict[str, float]:
    """Scores of a model; weights are left alone, and what it computes does not count as training.

    Returns:
        ``exact``: share of values asked for that are right as a whole (what greedy generation would write after the
        key); ``tokens``: share of their tokens; ``accuracy`` and ``ntp_loss``: of all next tokens, most of which nobody
        can know; ``reward_cosine``, ``reward_binary``, ``reward_hybrid``: means over the rollouts of `JUDGED`.
    """
    counted = actor.forward_tokens
    actor.eval()
    parts = [_score_part(actor, task, tokens[start : start + batch], start) for start in range(0, len(tokens), batch)]
    actor.forward_tokens = counted
    weights = [min(batch, len(tokens) - start) for start in range(0, len(tokens), batch)]
    return {
        name: sum(part[name] * weight for part, weight in zip(parts, weights, strict=True)) / len(tokens)
        for name in parts[0]
    }


def _score_part(actor: FastWeightActor, task: Task, tokens: Tensor, first: int) -> dict[str, float]:
    documents = task.documents(tokens)
    with torch.no_grad():
        predictions = actor(input_ids=tokens, use_cache=False).logits[:, :-1].argmax(dim=-1)
    right = task.values_right(predictions, tokens)
    loss, _ = actor(mode="score", documents=documents)
    rollouts: RolloutBatch = actor(
        mode="rollout",
        documents=documents,
        nsp=JUDGED,
        draws=RolloutDraws.of(HELD_OUT_SEED, 0, range(first, first + len(tokens)), JUDGED),
        snapshots=snapshot_count(JUDGED.chunks, max(documents.lengths)),
    )
    inputs = rollouts.reward_inputs()
    return {
        "exact": right.all(dim=-1).float().mean().item(),
        "tokens": right.float().mean().item(),
        "accuracy": (predictions == tokens[:, 1:]).float().mean().item(),
        "ntp_loss": loss.sum().item() / (tokens.numel() - len(tokens)),
        **{f"reward_{name}": get_reward(name)(inputs).mean().item() for name in REWARDS},
    }


def batches(task: Task, seed: int, size: int, steps: int) -> Sequence[Tensor]:
    """Training batches of a seed, int64 [size, T] each: the same for every method, and longer runs see more of them."""
    generator = torch.Generator().manual_seed(2_000_003 + seed)
    return [task.sample(generator, size) for _ in range(steps)]
