"""What a model is worth on held-out text."""

from __future__ import annotations

import torch
from torch import Tensor

from examples.text.corpus import documents
from refine_verl.config import NSPSettings
from refine_verl.models import FastWeightActor
from refine_verl.models.reward_manager import HiddenStateRewardManager
from refine_verl.models.step import Step

BATCH = 16
# Draws of the scores, which no training run uses.
SCORE_SEED = 977_123
# Where rollouts are scored: drawn without the model, so that all models are asked at the same places.
POSITIONS = 16
COPIES = 2


@torch.no_grad()
def next_token_scores(
    actor: FastWeightActor, windows: Tensor, rollout_length: int, temperature: float = 1.0
) -> dict[str, float]:
    """Next-token loss and accuracy, and how well k tokens in a row are predicted.

    Args:
        actor: the model.
        windows: int64 [N, T].
        rollout_length: k.
        temperature: of the predictions.

    Returns:
        ``ntp_loss`` in nats per token and ``ntp_accuracy`` over the N (T-1) predictions; over all N (T-k) places
        ``greedy_match``, the share where greedy generation writes the real next k tokens (their argmaxes are all
        right), and ``sampled_match``, the mean probability that sampling does; ``entropy``.
    """
    actor.eval()
    losses, right, entropies = [], [], []
    for part in windows.split(BATCH):
        log_probs = actor(input_ids=part, use_cache=False).logits[:, :-1].float().div(temperature).log_softmax(dim=-1)
        losses.append(-log_probs.gather(-1, part[:, 1:, None]).squeeze(-1))
        right.append(log_probs.argmax(dim=-1) == part[:, 1:])
        entropies.append(-(log_probs.exp() * log_probs).sum(dim=-1))
    loss, correct = torch.cat(losses), torch.cat(right)
    runs = correct.unfold(1, rollout_length, 1).all(dim=-1)
    return {
        "ntp_loss": loss.mean().item(),
        "ntp_accuracy": correct.float().mean().item(),
        "greedy_match": runs.float().mean().item(),
        "sampled_match": loss.unfold(1, rollout_length, 1).sum(dim=-1).neg().exp().mean().item(),
        "entropy": torch.cat(entropies).mean().item(),
    }


@torch.no_grad()
def rollout_scores(
    actor: FastWeightActor, windows: Tensor, rollout_length: int, temperature: float = 1.0
) -> dict[str, float]:
    """Mean ``reward_cosine`` and ``reward_binary`` of sampled rollouts; places and draws are the same for all."""
    actor.eval()
    nsp = NSPSettings(
        chunks=POSITIONS,
        rollout_length=rollout_length,
        rollouts_per_position=COPIES,
        selection="uniform",
        temperature=temperature,
    )
    step = Step(actor, nsp, SCORE_SEED, read_together=BATCH)
    scores = step.write_and_reward(0, documents(windows), range(len(windows)), HiddenStateRewardManager("cosine"))
    return {name: scores[name].mean().item() for name in ("reward_cosine", "reward_binary")}


def all_scores(
    actor: FastWeightActor, windows: Tensor, rollout_length: int, temperature: float = 1.0
) -> dict[str, float]:
    """Both, in one mapping."""
    return {
        **next_token_scores(actor, windows, rollout_length, temperature),
        **rollout_scores(actor, windows, rollout_length, temperature),
    }
