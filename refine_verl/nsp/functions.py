"""Do the functions that settings name exist?"""

from __future__ import annotations

from refine_verl.config import ConfigError, NSPSettings
from refine_verl.nsp.rewards import validate_reward_name
from refine_verl.nsp.selection import validate_selection_name


def check_functions(settings: NSPSettings) -> None:
    """Look up the reward and the selection strategy of `settings`; imports the module of an import path.

    Raises:
        ConfigError: names the key, and the nearest known name.
    """
    checks = {"reward": validate_reward_name, "selection": validate_selection_name}
    for key, check in checks.items():
        try:
            check(getattr(settings, key))
        except ValueError as error:
            raise ConfigError(f"{settings.SECTION}.{key}", str(error)) from error
