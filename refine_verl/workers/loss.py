"""The REFINE loss as verl's workers call it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils import tensordict_utils as tu
from verl.utils.metric import Metric
from verl.workers.config import ActorConfig

from refine_verl.config import LossSettings
from refine_verl.nsp import counted_tokens, refine_objective
from refine_verl.workers.objective import Objective


@dataclasses.dataclass
class RefineLoss:
    """lambda_RL * policy loss of verl's registry + lambda_SFT * next-token loss (paper, Sec. 3.2).

    Picklable: the driver makes one and sends it to the workers once.

    Attributes:
        settings: the two coefficients.
        actor: verl's actor section; its ``policy_loss.loss_mode``, ``loss_agg_mode`` and clip ratios apply.
    """

    settings: LossSettings
    actor: ActorConfig

    def __call__(
        self, model_output: dict[str, Tensor], data: TensorDict, dp_group: Any = None
    ) -> tuple[Tensor, dict[str, Metric]]:
        """Args:
            model_output: of :meth:`FastWeightActor.update` or :meth:`FastWeightActor.answer_log_probs`.
            data: the micro-batch, with the tensors and the tag of its :class:`Objective`, and the counts of the whole
                mini-batch as non-tensor entries.
            dp_group: not needed, the counts are global already.

        Returns:
            The micro-batch's share of the mini-batch's loss, and metrics that add up to the mini-batch's values.
        """
        objective = Objective.of(data)
        predicts, weighs = objective.predicts_tokens, objective.weighs_losses
        dp_size = tu.get_non_tensor_data(data, "dp_size", 1)
        rollouts = self._rollouts(objective, model_output, data)
        loss, metrics = refine_objective(
            model_output["ntp_loss_sum"] if predicts else model_output["log_probs"].new_zeros(()),
            int(data["loss_mask"].sum()) if predicts else 0,
            **rollouts,
            policy_loss=functools.partial(self._policy_loss, data=data),
            rl_coef=self.settings.rl_coef if weighs else 1.0,
            sft_coef=self.settings.sft_coef if weighs else 1.0,
            global_tokens=int(tu.get_non_tensor_data(data, "batch_num_tokens", 0)),
            global_rollouts=int(tu.get_non_tensor_data(data, "global_rollouts", 0)),
            dp_size=dp_size,
            balance_loss_sum=model_output.get("balance_loss_sum"),
        )
        if not predicts:
            metrics.pop("actor/ntp_loss")
        if rollouts:
            log_probs = rollouts["log_probs"].detach()
            written = data.get("written_log_probs", data["old_log_probs"]).reshape(log_probs.shape)
            gaps, mask = (log_probs - written).abs(), rollouts["mask"]
            metrics["actor/log_prob_gap"] = self._mean(data, gaps, mask)
            if "routes" in model_output:
                trained, written = model_output["routes"], data["routes"].flatten(0, 2)
                same = (trained == written).float()
                metrics["nsp/expert_agreement"] = self._mean(data, same, mask[:, : same.shape[1]])
        # verl averages over ranks and then sums over micro-batches; shares have to be summed over both
        return loss, {name: Metric("sum", value * dp_size) for name, value in _numbers(metrics).items()}

    @staticmethod
    def _rollouts(objective: Objective, model_output: dict[str, Tensor], data: TensorDict) -> dict[str, Any]:
        """Log-probabilities, advantages and mask of rollouts [R, k] or answers [R, A]; {} without a policy loss.

        ``counted`` is how many of them the mask counts a token of.
        """
        if not objective.reinforces:
            return {}
        log_probs, advantages = model_output["log_probs"], data["advantages"]
        count, width = log_probs.shape
        # rows that only keep ranks in step stay in the graph, because FSDP waits for their backward pass
        real = data["weight"] > 0
        mask = real.repeat_interleave(count // len(real))[:, None].expand(count, width)
        # every rollout has a token; an answer may have none
        counted = int(real.sum()) * (count // len(real))
        if objective is Objective.ANSWERS:
            mask = mask & counted_tokens(data["answer_lengths"].flatten(), width)
            counted = int(mask.any(dim=-1).sum())
        mask = mask.to(log_probs.device, non_blocking=True)
        if objective is not Objective.ANSWERS and "rollout_lengths" in data:
            lengths = data["rollout_lengths"].flatten().to(log_probs.device, non_blocking=True)
            mask = mask & counted_tokens(lengths.repeat_interleave(count // len(lengths)), width)
        return {
            "counted": counted,
            "log_probs": log_probs,
            "old_log_probs": data["old_log_probs"].reshape(log_probs.shape),
            "advantages": advantages.reshape(log_probs.shape),
            "mask": mask,
        }

    @staticmethod
    def _mean(data: TensorDict, values: Tensor, mask: Tensor) -> Tensor:
        """This micro-batch's share of the mean of ``values`` [R, w] over the tokens of ``mask``.

        Of the mean over rollouts of theirs, where rollouts differ in length: then how many tokens a mini-batch has may
        be known too late.
        """
        rollouts, values = int(tu.get_non_tensor_data(data, "global_rollouts", 0)), values * mask
        if "rollout_lengths" in data:
            return (values.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum() / max(rollouts, 1)
        tokens = rollouts * values.shape[1]
        if Objective.of(data) is Objective.ANSWERS:
            tokens = int(tu.get_non_tensor_data(data, "global_rollout_tokens", 0))
        return values.sum() / max(tokens, 1)

    def _policy_loss(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        global_rollouts: int,
        data: TensorDict,
    ) -> tuple[Tensor, dict[str, Any]]:
        self.actor.global_batch_info.update(
            dp_size=1,
            batch_num_tokens=int(tu.get_non_tensor_data(data, "global_rollout_tokens", 0)),
            global_batch_size=global_rollouts,
            loss_scale_factor=self.actor.loss_scale_factor,
        )
        loss, metrics = get_policy_loss_fn(self.actor.policy_loss.loss_mode)(
            old_log_prob=old_log_probs,
            log_prob=log_probs,
            advantages=advantages,
            response_mask=mask,
            loss_agg_mode=self.actor.loss_agg_mode,
            config=self.actor,
            rollout_is_weights=None,
        )
        return loss, metrics


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The values of scalars, those on the device read together: the host waits once. A user's may have shape [1]."""
    there = {name: value for name, value in metrics.items() if isinstance(value, Tensor) and not value.is_cpu}
    read = torch.cat([value.detach().double().reshape(1) for value in there.values()]).tolist() if there else []
    here = {name: float(value) for name, value in metrics.items() if name not in there}
    return here | dict(zip(there, read, strict=True))
