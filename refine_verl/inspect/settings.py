"""The command's keys, checked like a recipe's before torch is loaded or a file is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import yaml

from refine_verl.config import (
    ConfigError,
    NSPSettings,
    RefineSettings,
    Settings,
    did_you_mean,
    is_made_of_documents,
    option,
    refuse_repeats,
)

NSP_PREFIX = NSPSettings.SECTION + "."
STDIN = "-"
ROLLOUTS = 4
"""n where it is not given: a recipe's 1 shows little of what a model might say; the paper's Table F.1 shows 4."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectSettings(Settings):
    """What to look at and how; `nsp` has the names and meanings it has in a recipe."""

    SECTION: ClassVar[str] = "inspect"

    model: str = option("", "directory or hub id of a Hugging Face checkpoint with weights")
    text: str = option("", "a UTF-8 text file, or - for standard input")
    out: str | None = option(None, "the HTML page to write; without it only the terminal shows the result")
    tokenizer: str | None = option(None, "directory or hub id, or bytes; null: the model's own")
    external_lib: str | None = option(None, "package to import first: one that registers a model and its adapter")
    max_length: int = option(16384, "tokens that are read; what follows is left out", at_least=2)
    seed: int = option(0, "of positions and rollouts", at_least=0)
    nsp: NSPSettings = dataclasses.field(default_factory=lambda: NSPSettings(rollouts_per_position=ROLLOUTS))

    def _check_rules(self) -> None:
        for name, example in (("model", "model=DIR"), ("text", "text=FILE, or text=- for standard input")):
            if not getattr(self, name).strip():
                raise ConfigError("", f"{name} is missing: give {example}.")
        if self.seed >= 2**63:
            raise ConfigError("seed", f"must be below 2**63, got {self.seed}.")
        if self.tokenizer is not None and is_made_of_documents(self.tokenizer):
            raise ConfigError(
                "tokenizer",
                f"{self.tokenizer} would be trained on a run's own documents. Give the directory of the model it was "
                "saved with, a hub id, or bytes.",
            )
        if self.nsp.grad_scope != "full":
            raise ConfigError("refine.nsp.grad_scope", "has no effect here, where nothing is trained: leave it out.")
        RefineSettings(nsp=self.nsp)  # the rules of groups and of a single rollout


def read_arguments(arguments: Sequence[str]) -> InspectSettings:
    """Settings from `key=value` arguments; values are YAML, as in a recipe.

    Raises:
        ConfigError: not of that form, an unknown key (with the nearest), a key given twice, a bad value.
    """
    refuse_repeats(argument.partition("=")[0] for argument in arguments if "=" in argument)
    own: dict[str, Any] = {}
    nsp: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise ConfigError("", f"{argument!r} is not of the form key=value.{_nearest(argument)}")
        section, name = (nsp, key.removeprefix(NSP_PREFIX)) if key.startswith(NSP_PREFIX) else (own, key)
        if section is own and key not in KEYS:
            raise ConfigError(key, f"unknown key. Allowed: {', '.join(KEYS)} and refine.nsp.*.{_nearest(key)}")
        section[name] = value if key in TEXTS and value != "null" else _value(key, value)
    try:
        return InspectSettings(**own, nsp=NSPSettings.from_mapping({"rollouts_per_position": ROLLOUTS, **nsp}))
    except ConfigError as error:  # keys of this command are typed without its name in front
        raise ConfigError("", str(error).removeprefix(f"{InspectSettings.SECTION}.")) from error


def _value(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(key, f"{text!r} cannot be read as a value. Put it in quotes.") from error


def _nearest(key: str) -> str:
    known = [*KEYS, *(NSP_PREFIX + field.name for field in dataclasses.fields(NSPSettings))]
    short = {name.removeprefix(NSP_PREFIX): name for name in known}
    if key in short:
        return f" Did you mean {short[key]!r}?"
    return did_you_mean(key, known)


KEYS = tuple(field.name for field in dataclasses.fields(InspectSettings) if field.name != "nsp")
TEXTS = ("model", "text", "out", "tokenizer", "external_lib", "refine.nsp.reward", "refine.nsp.selection")
