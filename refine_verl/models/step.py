"""The step of the paper (Sec. 3.2), put together once from the actor's passes.

`Step.write` reads documents, selects positions and continues from them; `Step.write_and_reward` does so micro-batch by
micro-batch and rewards what was written; `nsp.group_standardise` compares the rewards; `Step.loss` branches off the
rollouts again, with gradients, and ends in the objective. `Step.on_policy` does all but the last in the pass that is
trained. Training's workers, `refine_verl.adapt`, `inspect`, the
benchmark and the examples all call these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refine_verl.config import LossSettings, NSPSettings
from refine_verl.models.actor import snapshot_count
from refine_verl.models.packing import Documents
from refine_verl.models.rollouts import Branches, RolloutBatch, RolloutDraws, documents_together
from refine_verl.nsp import counted_tokens, refine_objective
from refine_verl.nsp.objective import PolicyLoss

Rollouts = Mapping[str, Tensor]
"""Rollouts without hidden states, under the names `Step.write_and_reward` lists, and ``advantages`` [N, c, n, k]."""


@dataclass(frozen=True)
class Step:
    """How one model makes a step.

    Attributes:
        run: the actor's forward pass: the actor itself, or what a caller needs in its place.
        nsp: the settings.
        seed: with the number of the step and the id of a document the key of all random draws.
        read_together: documents per pass over S.
        longest: no document that any rank reads is longer; None: the longest of a micro-batch.
    """

    run: Callable[..., Any]
    nsp: NSPSettings
    seed: int
    read_together: int = 1
    longest: int | None = None

    def write(self, step: int, documents: Documents, ids: Sequence[int]) -> RolloutBatch:
        """Read, select, continue: the rollouts of documents that are continued together (Eq. 5-8)."""
        rollouts: RolloutBatch = self.run(
            mode="rollout",
            documents=documents,
            nsp=self.nsp,
            draws=RolloutDraws.of(self.seed, step, ids, self.nsp),
            snapshots=snapshot_count(self.nsp.chunks, self.longest or max(documents.lengths)),
            read_together=self.read_together,
        )
        return rollouts

    def write_and_reward(
        self,
        step: int,
        documents: Documents,
        ids: Sequence[int],
        reward: Callable[[RolloutBatch], Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        """The same for any number of documents; hidden states are dropped as soon as they are rewarded.

        Args:
            step, documents, ids: as in `write`.
            reward: a `HiddenStateRewardManager`.

        Returns:
            ``positions`` int64 [N, c], ``rollout_tokens`` int64 and ``old_log_probs`` [N, c, n, k], ``entropy_mean``
            [N], ``entropy_selected`` [N, c], where they differ ``rollout_lengths`` int64 [N, c], of a model with
            experts ``routes`` int64 [N, c, n, k - 1], and what ``reward`` returns.
        """
        size = documents_together(self.nsp, self.read_together)
        parts: list[dict[str, Tensor]] = []
        for index, part in enumerate(documents.split(size)):
            written = self.write(step, part, ids[index * size : index * size + len(part)])
            parts.append({**_numbers(written), **reward(written)})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def loss(
        self,
        documents: Documents,
        rollouts: Rollouts | None,
        coefficients: LossSettings,
        *,
        policy_loss: PolicyLoss,
        global_tokens: int,
        global_rollouts: int,
        output: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """A micro-batch's share of the mini-batch's loss, to call ``backward`` on, and of its metrics.

        Args:
            documents: the micro-batch.
            rollouts: theirs; None for the next-token loss alone.
            output: of `on_policy`, if the trained pass has been made already.
            coefficients: lambda_RL and lambda_SFT.
            policy_loss, global_tokens, global_rollouts: see `refine_objective`.
        """
        if output is None:
            branches = None if rollouts is None else Branches(rollouts["positions"], rollouts["rollout_tokens"])
            output = self.run(mode="update", documents=documents, branches=branches, nsp=self.nsp)
        return refine_objective(
            output["ntp_loss_sum"],
            documents.predicted,
            output.get("log_probs"),
            None if rollouts is None else rollouts["old_log_probs"].flatten(0, 2),
            None if rollouts is None else rollouts["advantages"].flatten(0, 2),
            None if rollouts is None else counted_rollout_tokens(rollouts),
            policy_loss=policy_loss,
            rl_coef=0.0 if rollouts is None else coefficients.rl_coef,
            sft_coef=coefficients.sft_coef,
            global_tokens=global_tokens,
            global_rollouts=global_rollouts,
            counted=None if rollouts is None else rollouts["old_log_probs"].flatten(0, 2).shape[0],
        )

    def on_policy(
        self,
        step: int,
        documents: Documents,
        ids: Sequence[int],
        reward: Callable[[RolloutBatch], Mapping[str, Tensor]],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Read, select, continue and reward inside the pass that is trained.

        Args:
            step, documents, ids, reward: as in `write_and_reward`, for one micro-batch.

        Returns:
            What `write_and_reward` returns, with the log-probabilities of the trained pass as the old ones, so that
            the ratio is exactly 1, and those of the writing passes as ``written_log_probs``; and what
            `FastWeightActor.update` returns.
        """
        written, output = self.run(
            mode="on_policy",
            documents=documents,
            nsp=self.nsp,
            draws=RolloutDraws.of(self.seed, step, ids, self.nsp),
            snapshots=snapshot_count(self.nsp.chunks, self.longest or max(documents.lengths)),
        )
        numbers = {**_numbers(written), **reward(written)}
        numbers["written_log_probs"] = written.log_probs
        numbers["old_log_probs"] = output["log_probs"].detach().view(written.tokens.shape)
        return numbers, output


def _numbers(written: RolloutBatch) -> dict[str, Tensor]:
    """Rollouts without hidden states."""
    lengths = {} if written.lengths is None else {"rollout_lengths": written.lengths}
    return {
        **lengths,
        "positions": written.positions,
        "rollout_tokens": written.tokens,
        "old_log_probs": written.log_probs,
        "entropy_mean": written.entropy_mean,
        "entropy_selected": written.entropy_selected,
        **({} if written.routes is None else {"routes": written.routes}),
    }


def counted_rollout_tokens(rollouts: Rollouts) -> Tensor | None:
    """Which tokens [N * c * n, k] belong to their rollouts; None: all."""
    lengths = rollouts.get("rollout_lengths", None)
    if lengths is None:
        return None
    copies, width = rollouts["rollout_tokens"].shape[2:]
    return counted_tokens(lengths.flatten().repeat_interleave(copies), width)


def in_parts(documents: Documents, rollouts: Rollouts | None, size: int) -> Iterator[tuple[Documents, Rollouts | None]]:
    """Parts of ``size`` documents, each with its rollouts, the last of what is left."""
    for index, part in enumerate(documents.split(size)):
        rows = slice(index * size, index * size + len(part))
        yield part, None if rollouts is None else {name: values[rows] for name, values in rollouts.items()}
