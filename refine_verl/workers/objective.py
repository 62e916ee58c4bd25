"""What an update learns from its batch: one tag that travels with the message."""

from __future__ import annotations

import enum

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu


class Objective(enum.Enum):
    """Driver and workers decide by this, and never by which tensors a batch has.

    Every batch has ``tokens`` [b, Tmax], ``lengths`` [b] and ``weight`` [b], 0 for rows that only keep ranks in step.
    """

    DOCUMENTS = "documents"
    """Next-token loss of documents or prompts."""
    ROLLOUTS = "rollouts"
    """The same and the policy loss of rollouts written within them: ``positions`` [b, c], ``rollout_tokens``,
    ``old_log_probs`` and ``advantages`` [b, c, n, k]; ``written_log_probs`` where the old ones are recomputed,
    ``rollout_lengths`` [b, c] where not all rollouts have k tokens."""
    ON_POLICY = "on_policy"
    """The same, but the rollouts are written in the pass that is trained: ``document_id`` and ``row`` [b], the row in
    the batch; non-tensor ``global_step``, ``rollouts_per_row``, c * n, and ``rollout_length``, k."""
    REFERENCES = "references"
    """Next-token loss of reference answers behind their prompts, which end where ``learn_from`` [b] says."""
    ANSWERS = "answers"
    """Policy loss of answers to prompts: ``answer_tokens``, ``old_log_probs``, ``advantages`` [b, n, A] and
    ``answer_lengths`` [b, n]; non-tensor ``temperature`` of the sampler."""

    @classmethod
    def of(cls, data: TensorDict) -> Objective:
        """That of a batch, a mini-batch or a micro-batch.

        Raises:
            ValueError: it has none.
        """
        return cls(tu.get_non_tensor_data(data, "objective", None))

    @property
    def predicts_tokens(self) -> bool:
        """Whether there is a next-token loss."""
        return self is not Objective.ANSWERS

    @property
    def reinforces(self) -> bool:
        """Whether there is a policy loss."""
        return self in (Objective.ROLLOUTS, Objective.ON_POLICY, Objective.ANSWERS)

    @property
    def weighs_losses(self) -> bool:
        """Whether ``refine.loss`` has a say: what is done with answers is one thing or the other."""
        return self in (Objective.DOCUMENTS, Objective.ROLLOUTS, Objective.ON_POLICY)


ON_HOST = (
    "lengths", "learn_from", "weight", "loss_mask", "document_id", "row", "positions", "rollout_lengths",
    "answer_lengths",
)  # fmt: skip
"""What the host looks at, in a batch that comes from the driver; what a fused step writes is on the device, its
``rollout_lengths`` too."""


def on_device(data: TensorDict, device: str | int | torch.device) -> TensorDict:
    """A batch from the driver with what is computed with on ``device``.

    What the host looks at stays where it is: to read it back, the host would wait for all that the device has to do.
    """
    moved = data.copy().clear_device_()
    for name, value in data.items():
        if isinstance(value, Tensor) and name not in ON_HOST:
            moved[name] = value.to(device, non_blocking=True)
    return moved


def tokens_to_learn(data: TensorDict) -> Tensor:
    """Number of tokens in the loss of each row, int64 [b]; sets ``learn_from`` where rows teach nothing."""
    lengths, real = data["lengths"], data["weight"] > 0
    if Objective.of(data) is Objective.ANSWERS:
        return data["answer_lengths"].sum(dim=1) * real
    first: Tensor = data.get("learn_from", torch.ones_like(lengths))
    if not bool(real.all()):
        data["learn_from"] = first = torch.where(real, first, lengths)
    return lengths - first


def rollouts_to_learn(data: TensorDict) -> tuple[int, int]:
    """Number of rollouts or answers in the policy loss of a batch, and of their tokens.

    Rollouts that are yet to be written (`ON_POLICY`) are taken to have k tokens.
    """
    objective = Objective.of(data)
    if not objective.reinforces:
        return 0, 0
    real = data["weight"] > 0
    if objective is Objective.ON_POLICY:
        rollouts = int(real.sum()) * int(tu.get(data, "rollouts_per_row"))
        return rollouts, rollouts * int(tu.get(data, "rollout_length"))
    if objective is Objective.ANSWERS:
        return int(real.sum()) * data["advantages"].shape[1], int(data["answer_lengths"][real].sum())
    chunks, copies, length = data["advantages"].shape[1:]
    rollouts, lengths = int(real.sum()) * chunks * copies, data.get("rollout_lengths", None)
    return rollouts, rollouts * length if lengths is None else int(lengths[real].sum()) * copies
