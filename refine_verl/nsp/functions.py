"""Do the functions that settings name exist?"""

from __future__ import annotations

from refine_verl.config import ConfigError, NSPSettings
from refine_verl.nsp.rewards import REWARDS
from refine_verl.nsp.selection import SELECTIONS


def check_functions(settings: NSPSettings) -> None:
    """Look up the reward and the selection strategy of `settings`; imports the module of an import path.

    Raises:
        ConfigError: names the key, and the nearest known name.
    """
    for key, registry in (("reward", REWARDS), ("selection", SELECTIONS)):
        try:
            registry.find(getattr(settings, key))
        except ValueError as error:
            raise ConfigError(f"{settings.SECTION}.{key}", str(error)) from error
