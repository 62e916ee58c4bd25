"""What goes into a rollout and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from refine_verl.config import NSPSettings
from refine_verl.nsp import RewardInputs, position_uniforms, rollout_uniforms


def documents_together(nsp: NSPSettings, read_together: int) -> int:
    """Of how many documents rollouts are written at once: a multiple of the ``read_together`` read in one pass.

    Only as many more as bring about ``refine.nsp.rollouts_together``: one token for 64 rollouts takes hardly longer
    than for one. A function of settings alone: under FSDP every rank has to make the same number of passes.
    """
    if nsp.rollout == "prefix":
        return read_together
    return read_together * max(1, nsp.rollouts_together // (read_together * nsp.chunks * nsp.rollouts_per_position))


@dataclass(frozen=True)
class RolloutDraws:
    """Uniform random numbers in [0, 1) for one micro-batch, float64 on the CPU (see ``nsp.sampling``).

    Attributes:
        positions: [N, c], one for each chunk.
        tokens: [N, c, n, k], one for each token to generate.
    """

    positions: Tensor
    tokens: Tensor

    @staticmethod
    def of(seed: int, step: int, documents: Sequence[int], nsp: NSPSettings) -> RolloutDraws:
        """Those of documents with these ids, at one step: a function of its arguments alone."""
        shape = (nsp.chunks, nsp.rollouts_per_position, nsp.longest_rollout)
        positions = [torch.from_numpy(position_uniforms(seed, step, id_, nsp.chunks)) for id_ in documents]
        tokens = [torch.from_numpy(rollout_uniforms(seed, step, id_, *shape)) for id_ in documents]
        return RolloutDraws(torch.stack(positions), torch.stack(tokens))


@dataclass(frozen=True)
class RolloutBatch:
    """Rollouts of N documents: c positions each, n rollouts per position, k tokens per rollout.

    Attributes:
        positions: int64 [N, c]; the rollout continues x_0..x_t.
        tokens: int64 [N, c, n, k].
        log_probs: float32 [N, c, n, k], of the policy that wrote them.
        predicted_hidden: [N, c, n, k, d], h_pred (Eq. 7).
        target_hidden: [N, c, k, d], h_gt (Eq. 8).
        target_tokens: int64 [N, c, k], the real continuation.
        entropy_mean: [N], mean of H over the document.
        entropy_selected: [N, c], H of the first token to be predicted after each position.
        lengths: int64 [N, c], tokens that belong to the rollouts of each position; None: all k.
        routes: int64 [N, c, n, k - 1], which experts the tokens went to; None of a model without experts.
    """

    positions: Tensor
    tokens: Tensor
    log_probs: Tensor
    predicted_hidden: Tensor
    target_hidden: Tensor
    target_tokens: Tensor
    entropy_mean: Tensor
    entropy_selected: Tensor
    lengths: Tensor | None = None
    routes: Tensor | None = None

    def reward_inputs(self) -> RewardInputs:
        """What rewards are computed from, one row for each of the N * c * n rollouts."""
        copies = self.tokens.shape[2]
        return RewardInputs(
            predicted_hidden=self.predicted_hidden.flatten(0, 2),
            target_hidden=self.target_hidden.flatten(0, 1).repeat_interleave(copies, dim=0),
            predicted_tokens=self.tokens.flatten(0, 2),
            target_tokens=self.target_tokens.flatten(0, 1).repeat_interleave(copies, dim=0),
            lengths=None if self.lengths is None else self.lengths.flatten().repeat_interleave(copies),
        )


@dataclass(frozen=True)
class Branches:
    """What the update pass needs of the rollouts: positions [N, c] and tokens [N, c, n, k], int64."""

    positions: Tensor
    tokens: Tensor
