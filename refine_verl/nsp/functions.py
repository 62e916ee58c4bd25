"""Do the functions that settings name exist?"""

from __future__ import annotations

from refine_verl.config import SELECTIONS as BUILT_IN
from refine_verl.config import ConfigError, NSPSettings, RolloutLength
from refine_verl.nsp.rewards import REWARDS, try_reward
from refine_verl.nsp.selection import SELECTIONS, try_selection


def check_functions(settings: NSPSettings, hidden_size: int | None = None, layers: int = 2) -> None:
    """Look up the reward and the selection strategy of `settings`; imports the module of an import path.

    Args:
        settings: what names them.
        hidden_size, layers: of the model, for the made-up document that a strategy of a user's is tried out on; None:
            unknown, and a strategy that raises an exception there is not refused.

    Raises:
        ConfigError: names the key, and the nearest known name; a reward whose result cannot be used, or does not say
            what each token earned with `credit=token` or rollouts of unequal lengths, or a strategy that does not
            choose c valid positions, tried out on a made-up input.
    """
    for key, registry in (("reward", REWARDS), ("selection", SELECTIONS)):
        try:
            registry.find(getattr(settings, key))
        except ValueError as error:
            raise ConfigError(f"{settings.SECTION}.{key}", str(error)) from error
    if settings.selection not in BUILT_IN:
        try:
            try_selection(settings, hidden_size, layers)
        except ValueError as error:
            raise ConfigError(
                f"{settings.SECTION}.selection",
                f"{error}, when it was tried out on a made-up document. Return {settings.SECTION}.chunks="
                f"{settings.chunks} increasing positions from 0 to T-1-k, or name another strategy: "
                f"{', '.join(BUILT_IN)}.",
            ) from error
    try:
        try_reward(settings.reward, settings.longest_rollout, per_token=False)
    except (TypeError, ValueError) as error:
        tried = f"{error}, when it was tried out on made-up rollouts."
        raise ConfigError(f"{settings.SECTION}.reward", tried) from error
    varies = isinstance(settings.rollout_length, RolloutLength)
    if varies or settings.credit == "token":
        key, value, cure = "credit", "token", "credit=rollout"
        if varies:
            key, value, cure = "rollout_length", "{min, max, by}", "rollout_length to a number"
        try:
            try_reward(settings.reward, settings.longest_rollout, per_token=True)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{settings.SECTION}.{key}",
                f"{value} needs a reward that says what each token earned: {error}. Return that from the reward, or "
                f"set {settings.SECTION}.{cure}.",
            ) from error
