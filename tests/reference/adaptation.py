"""Test-time training the obvious way: recompute every prefix, one prompt after the other, ``loss.backward()``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from refine_verl.adaptation import AdaptSettings, Prompts
from refine_verl.models import Branches, Documents, RolloutDraws, make_actor
from refine_verl.nsp import RewardInputs, get_reward, position_uniforms, rollout_uniforms


def adapt_slowly(model: nn.Module, rows: list[Tensor], settings: AdaptSettings) -> list[float]:
    """Train ``model`` in place; returns the loss of every optimiser step. Rewards and advantages are written out."""
    actor = make_actor(model)
    optimizer = torch.optim.AdamW(
        [p for p in actor.parameters() if p.requires_grad], lr=settings.lr, weight_decay=settings.weight_decay
    )
    nsp = settings.nsp
    ids = Prompts.read(rows, vocabulary=10**9, shortest=1, needs="").ids
    losses = []
    for index in range(1, settings.steps + 1):
        written = [_rollouts(actor, row, key, index, settings) for row, key in zip(rows, ids, strict=True)]
        for start in range(0, len(rows), settings.mini_batch_size):
            mine = range(start, min(start + settings.mini_batch_size, len(rows)))
            predicted = sum(len(rows[row]) - 1 for row in mine)
            loss = torch.zeros((), dtype=torch.float64)
            for row in mine:
                branches, old, advantages = written[row]
                output = actor(mode="update", documents=_alone(rows[row]), branches=branches, nsp=nsp)
                ratio = (output["log_probs"] - old).exp()
                clipped = ratio.clamp(1 - settings.clip_ratio, 1 + settings.clip_ratio)
                worse = torch.minimum(advantages * ratio, advantages * clipped)
                dual = torch.where(advantages < 0, worse.maximum(3 * advantages), worse)
                policy = -dual.mean(dim=1).sum() / (len(mine) * nsp.chunks * nsp.rollouts_per_position)
                next_token = output["ntp_loss_sum"] / predicted
                loss = loss + settings.loss.rl_coef * policy + settings.loss.sft_coef * next_token
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(actor.parameters(), settings.clip_grad)
            optimizer.step()
            losses.append(loss.item())
    return losses


def _alone(row: Tensor) -> Documents:
    return Documents.from_tensors(row[None], [len(row)])


def _rollouts(
    actor: nn.Module, row: Tensor, key: int, index: int, settings: AdaptSettings
) -> tuple[Branches, Tensor, Tensor]:
    """Branches, old log-probabilities [c * n, k] and advantages [c * n, k] of one prompt."""
    nsp, seed = settings.nsp, settings.seed
    shape = (nsp.chunks, nsp.rollouts_per_position, nsp.rollout_length)
    draws = RolloutDraws(
        torch.from_numpy(position_uniforms(seed, index, key, nsp.chunks))[None],
        torch.from_numpy(rollout_uniforms(seed, index, key, *shape))[None],
    )
    rollouts = actor(mode="rollout", documents=_alone(row), nsp=nsp, draws=draws, snapshots=1)
    copies = nsp.rollouts_per_position
    earned = get_reward(nsp.reward, per_token=True)(
        RewardInputs(
            predicted_hidden=rollouts.predicted_hidden.flatten(0, 2),
            target_hidden=rollouts.target_hidden.repeat_interleave(copies, 1).flatten(0, 1),
            predicted_tokens=rollouts.tokens.flatten(0, 2),
            target_tokens=rollouts.target_tokens.repeat_interleave(copies, 1).flatten(0, 1),
        )
    ).double()
    length = nsp.rollout_length
    advantages = torch.empty_like(earned)
    for j in range(length):
        # what a token is credited with: all that its rollout earned, or what came from it on
        credited = earned[:, 0 if nsp.credit == "rollout" else j :].sum(dim=1) / length
        advantages[:, j] = (credited - credited.mean()) / (credited.std() + 1e-6)
    return Branches(rollouts.positions, rollouts.tokens), rollouts.log_probs.flatten(0, 2), advantages
