"""Where each value of a configuration comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from refine_verl.compose.recipes import GROUPS, ConfigFile
from refine_verl.compose.schema import leaves
from refine_verl.record.redaction import redacted

DEFAULT = "default"
COMMAND_LINE = "command line"
COMPUTED = "computed"


@dataclasses.dataclass(frozen=True)
class Origin:
    """One value.

    Attributes:
        key: dotted.
        value: resolved.
        source: `default`, `preset NAME`, `recipe NAME`, `command line`, or `computed` for what the checks filled in.
        follows: the interpolation behind the value, empty for a plain one.
    """

    key: str
    value: Any
    source: str
    follows: str = ""


def find_origins(
    composed: DictConfig, valid: DictConfig, files: Iterable[ConfigFile], overrides: Sequence[str]
) -> list[Origin]:
    """The source of every leaf of the configuration composed last.

    Args:
        composed: as Hydra made it, with interpolations.
        valid: resolved, as the checks left it.
        files: all presets and recipes there are.
        overrides: of the command line.
    """
    given = OverridesParser.create().parse_overrides(list(overrides))
    typed = {item.key_or_group for item in given} - set(GROUPS)
    names = [("model", HydraConfig.get().runtime.choices.get("model"))]  # then the recipes: the last one wins
    for value in (item.value() for item in given if item.key_or_group == "recipe"):
        names += [("recipe", name) for name in (value if isinstance(value, list) else [value])]
    found = {(file.group, file.name): file for file in files}
    contents = [(found[name], dict(leaves(found[name].content))) for name in names if name in found]
    written = dict(leaves(composed))
    before = dict(leaves(DictConfig(OmegaConf.to_container(composed, resolve=True))))
    origins = []
    for key, value in leaves(valid):
        raw = written.get(key)
        follows = raw if isinstance(raw, str) and "${" in raw else ""
        source = _source(key, typed, contents)
        if source == DEFAULT and before.get(key) != value:
            source = COMPUTED
        origins.append(Origin(key, redacted(value, key), source, follows))
    return origins


def _source(key: str, typed: set[str], contents: Sequence[tuple[ConfigFile, dict[str, Any]]]) -> str:
    if any(key == name or key.startswith(f"{name}.") for name in typed):
        return COMMAND_LINE
    for file, content in reversed(contents):
        own_key = file.own_key(key)
        if own_key and any(own_key == name or own_key.startswith(f"{name}.") for name in content):
            return f"{'preset' if file.group == 'model' else 'recipe'} {file.name}"
    return DEFAULT
