"""What is measured of a model: values recalled, next tokens, and the rewards of its rollouts, on held-out sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from examples.paths.task import PathTask
from examples.recall.task import Task
from refine_verl.config import NSPSettings
from refine_verl.models import FastWeightActor
from refine_verl.models.reward_manager import HiddenStateRewardManager
from refine_verl.models.step import Step

REWARDS = ("cosine", "binary", "hybrid")
# Uniform: the places do not move with a model's entropies, so that all models are judged at the same ones.
JUDGED = NSPSettings(chunks=8, rollout_length=5, rollouts_per_position=1, selection="uniform")
HELD_OUT_SEED = 1_000_003


def held_out(task: Task | PathTask, seed: int, count: int) -> Tensor:
    """Sequences that no training of this seed sees, int64 [count, T]."""
    return task.sample(torch.Generator().manual_seed(HELD_OUT_SEED + seed), count)


def score(actor: FastWeightActor, task: Task | PathTask, tokens: Tensor, judged: int = 128) -> dict[str, float]:
    """Scores of a model; weights are left alone, and what it computes does not count as training.

    Args:
        actor: the model.
        task: that the sequences are of.
        tokens: int64 [N, T].
        judged: rollouts are written in so many of them.

    Returns:
        ``exact``: share of values asked for that are right as a whole (what greedy generation would write after the
        key); ``first`` and ``tokens``: share of their first and of all tokens; ``accuracy`` and ``ntp_loss``: of all
        next tokens, most of which nobody can know; ``reward_cosine``, ``reward_binary``, ``reward_hybrid``: means over
        the rollouts of `JUDGED`.
    """
    counted = actor.forward_tokens
    actor.eval()
    parts = [_predictions(actor, part) for part in tokens.split(128)]
    predictions = torch.cat([part for part, _ in parts])
    right = task.values_right(predictions, tokens)
    rewards = _rewards(actor, task, tokens[:judged])
    actor.forward_tokens = counted
    return {
        "exact": right.all(dim=-1).float().mean().item(),
        "first": right[..., 0].float().mean().item(),
        "tokens": right.float().mean().item(),
        "accuracy": (predictions == tokens[:, 1:]).float().mean().item(),
        "ntp_loss": sum(loss for _, loss in parts) / (tokens.numel() - len(tokens)),
        **rewards,
    }


@torch.no_grad()
def _predictions(actor: FastWeightActor, tokens: Tensor) -> tuple[Tensor, float]:
    """Argmax of the logits of tokens 1 ... T-1, int64 [N, T-1], and the sum of their cross-entropies."""
    logits: Tensor = actor(input_ids=tokens, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    return logits.argmax(dim=-1), loss.item()


def _rewards(actor: FastWeightActor, task: Task | PathTask, tokens: Tensor) -> dict[str, float]:
    step = Step(actor, JUDGED, HELD_OUT_SEED, read_together=len(tokens))
    rollouts = step.write(0, task.documents(tokens), range(len(tokens)))
    rewards = HiddenStateRewardManager("hybrid", REWARDS)(rollouts)
    return {f"reward_{name}": rewards[f"reward_{name}"].mean().item() for name in REWARDS}


def batches(task: Task | PathTask, seed: int, size: int, steps: int) -> Sequence[Tensor]:
    """Training batches of a seed, int64 [size, T] each: the same for every method, and longer runs see more of them."""
    generator = torch.Generator().manual_seed(2_000_003 + seed)
    return [task.sample(generator, size) for _ in range(steps)]
