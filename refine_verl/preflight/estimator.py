"""Whether an advantage estimator of verl's registry can work with what REFINE's rollouts offer."""

from __future__ import annotations

import inspect

from verl.trainer.ppo.core_algos import get_adv_estimator_fn

from refine_verl.config import ConfigError

_OFFERED = ("token_level_rewards", "response_mask", "index", "norm_adv_by_std_in_grpo", "config")


def check_estimator(name: str) -> None:
    """Check that verl's estimator ``name`` can work with what a rollout offers.

    Raises:
        ConfigError: it also needs values, log-probabilities or rewards of a baseline.
    """
    parameters = inspect.signature(get_adv_estimator_fn(name)).parameters.values()
    named = (parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD)
    missing = [p.name for p in named if p.default is p.empty and p.name not in _OFFERED]
    if missing:
        raise ConfigError(
            "algorithm.adv_estimator",
            f"{name} needs {', '.join(missing)}, which REFINE's rollouts do not have; they have rewards and groups. "
            "grpo is the paper's.",
        )
