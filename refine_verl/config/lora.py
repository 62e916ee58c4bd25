"""verl's keys of LoRA, typed: in a run `actor_rollout_ref.model.*`, in `refine_verl.adapt` by the same names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from refine_verl.config.options import Settings, option
from refine_verl.config.refusals import ConfigError

ALL_LINEAR = "all-linear"
LORA_RANK = 0
LORA_ALPHA = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSettings(Settings):
    """Which adapters are trained, if any; verl's names and defaults.

    Raises:
        ConfigError: a value out of bounds, of the wrong type, or a pattern that is none.
    """

    SECTION: ClassVar[str] = "actor_rollout_ref.model"

    lora_rank: int = option(LORA_RANK, "rank of LoRA adapters, which alone are trained; 0: all weights", at_least=0)
    lora_alpha: int = option(LORA_ALPHA, "adapters count lora_alpha / lora_rank", at_least=1)
    target_modules: str | tuple[str, ...] = option(
        ALL_LINEAR, "linear layers that get an adapter: all-linear, names, or a pattern", empty=False
    )
    exclude_modules: str | tuple[str, ...] | None = option(
        None, "linear layers that get none: names, or a pattern", empty=False
    )
    lora_adapter_path: str | None = option(
        None, "directory of a PEFT adapter to go on from, with its rank, alpha and layers", empty=False
    )

    @staticmethod
    def of(section: Mapping[str, Any]) -> LoraSettings:
        """From `actor_rollout_ref.model`, which has other keys, too."""
        names = [field.name for field in dataclasses.fields(LoraSettings)]
        return LoraSettings.from_mapping({name: section[name] for name in names if name in section})

    def _check_rules(self) -> None:
        check_names(self.SECTION, "target_modules", self.target_modules)
        check_names(self.SECTION, "exclude_modules", self.exclude_modules)


def check_names(section: str, name: str, value: str | tuple[Any, ...] | None) -> None:
    """Refuse what is neither names of modules nor a pattern (a regular expression that matches whole names).

    Raises:
        ConfigError: with the key.
    """
    key = f"{section}.{name}"
    if isinstance(value, str) and value != ALL_LINEAR:
        try:
            re.compile(value)
        except re.error as error:
            raise ConfigError(key, f"{value!r} is no regular expression ({error}). For names, give a list.") from error
    elif isinstance(value, tuple):
        if not value:
            raise ConfigError(key, "is an empty list. Leave it out, or name layers.")
        for entry in value:
            if not isinstance(entry, str) or not entry.strip():
                raise ConfigError(key, f"takes names of modules, got {entry!r}.")
