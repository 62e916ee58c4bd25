"""The step of the paper (Sec. 3.2), put together once from the actor's passes.

`write` reads documents, selects positions and continues from them; `write_and_reward` does so micro-batch by
micro-batch and rewards what was written; `group_standardise` compares the rewards; `micro_batch_loss` branches off the
rollouts again, with gradients, and ends in the objective. Training's workers, `refine_verl.adapt`, `inspect`, the
benchmark and the examples all call these.

``run`` is the actor's forward pass in all of them: the actor itself, or what a caller needs in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from refine_verl.config import LossSettings, NSPSettings
from refine_verl.models.actor import snapshot_count
from refine_verl.models.packing import Documents
from refine_verl.models.rollouts import Branches, RolloutBatch, RolloutDraws, documents_together
from refine_verl.nsp import PolicyLoss, refine_objective

Rollouts = Mapping[str, Tensor]
"""Rollouts without hidden states, under the names `write_and_reward` lists; ``advantages`` [N, c, n] come later."""


def write(
    run: Callable[..., Any],
    documents: Documents,
    ids: Sequence[int],
    nsp: NSPSettings,
    *,
    seed: int,
    step: int,
    read_together: int | None = None,
    longest: int | None = None,
) -> RolloutBatch:
    """Read documents, choose positions by entropy, continue from each (Eq. 5-8): steps 1 and 2 for one micro-batch.

    Args:
        run: see above.
        documents: as many as are to be continued together.
        ids: a number for each; with ``seed`` and ``step`` the key of all random draws.
        nsp: c, k, n and how to select and sample.
        seed, step: see there.
        read_together: documents per pass over S; None: all of them.
        longest: no document that any rank reads is longer; None: the longest of these.
    """
    rollouts: RolloutBatch = run(
        mode="rollout",
        documents=documents,
        nsp=nsp,
        draws=RolloutDraws.of(seed, step, ids, nsp),
        snapshots=snapshot_count(nsp.chunks, longest or max(documents.lengths)),
        read_together=read_together,
    )
    return rollouts


def write_and_reward(
    run: Callable[..., Any],
    reward: Callable[[RolloutBatch], Mapping[str, Tensor]],
    documents: Documents,
    ids: Sequence[int],
    nsp: NSPSettings,
    *,
    read_together: int,
    **key: Any,
) -> dict[str, Tensor]:
    """Steps 1 to 3 for any number of documents; hidden states are dropped as soon as they are rewarded.

    Args:
        run, documents, ids, nsp, read_together: as in `write`.
        reward: a `HiddenStateRewardManager`.
        key: ``seed``, ``step`` and ``longest`` of `write`.

    Returns:
        ``positions`` int64 [N, c], ``rollout_tokens`` int64 and ``old_log_probs`` [N, c, n, k], ``entropy_mean`` [N],
        ``entropy_selected`` [N, c], and what ``reward`` returns.
    """
    size = documents_together(nsp, read_together)
    parts: list[dict[str, Tensor]] = []
    for index, part in enumerate(documents.split(size)):
        mine = ids[index * size : index * size + len(part)]
        written = write(run, part, mine, nsp, read_together=read_together, **key)
        numbers = {
            "positions": written.positions,
            "rollout_tokens": written.tokens,
            "old_log_probs": written.log_probs,
            "entropy_mean": written.entropy_mean,
            "entropy_selected": written.entropy_selected,
        }
        parts.append({**numbers, **reward(written)})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def in_parts(documents: Documents, rollouts: Rollouts | None, size: int) -> Iterator[tuple[Documents, Rollouts | None]]:
    """Parts of ``size`` documents, each with its rollouts, the last of what is left."""
    for index, part in enumerate(documents.split(size)):
        rows = slice(index * size, index * size + len(part))
        yield part, None if rollouts is None else {name: values[rows] for name, values in rollouts.items()}


def micro_batch_loss(
    run: Callable[..., Any],
    documents: Documents,
    rollouts: Rollouts | None,
    nsp: NSPSettings,
    loss: LossSettings,
    *,
    policy_loss: PolicyLoss,
    global_tokens: int,
    global_rollouts: int,
) -> tuple[Tensor, dict[str, Any]]:
    """Step 4 for one micro-batch: its share of the mini-batch's loss, to call ``backward`` on, and of its metrics.

    Args:
        run: see above.
        documents: the micro-batch.
        rollouts: theirs, with ``advantages``; None for the next-token loss alone.
        nsp: the settings the rollouts were written with.
        loss: the two coefficients.
        policy_loss, global_tokens, global_rollouts: see `refine_objective`.
    """
    branches = None if rollouts is None else Branches(rollouts["positions"], rollouts["rollout_tokens"])
    output = run(mode="update", documents=documents, branches=branches, nsp=nsp)
    return refine_objective(
        output["ntp_loss_sum"],
        documents.predicted,
        output.get("log_probs"),
        None if rollouts is None else rollouts["old_log_probs"].flatten(0, 2),
        None if rollouts is None else rollouts["advantages"].flatten(),
        policy_loss=policy_loss,
        rl_coef=0.0 if rollouts is None else loss.rl_coef,
        sft_coef=loss.sft_coef,
        global_tokens=global_tokens,
        global_rollouts=global_rollouts,
    )
