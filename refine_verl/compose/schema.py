"""Holding a composed configuration to the keys that exist, which Hydra does not do when it merges recipes."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from refine_verl.compose.recipes import ConfigFile
from refine_verl.config import ConfigError

Container = dict[str, Any]

OPEN_SECTIONS = ("ray_kwargs.ray_init", "model.config", "actor_rollout_ref.model.override_config")
"""Mappings that take any key, besides those that are empty or null in the schema (`override_config`, ...)."""

NULL_SECTIONS = ("actor_rollout_ref.actor.fsdp_config.mixed_precision",)
"""Sections whose null means something to verl; it is looked at elsewhere."""


NUMBER_OR_SECTION = ("refine.nsp.rollout_length",)
"""Numbers in whose place there may be a section; the typed settings know its keys."""


TEXT_OR_LIST = ("actor_rollout_ref.model.target_modules",)
"""Texts in whose place there may be a list of names."""


def check_keys(config: DictConfig, schema: DictConfig, files: Iterable[ConfigFile] = ()) -> None:
    """Refuse keys that do not exist and values of the wrong kind, also in verl's sections.

    Args:
        config: as composed, without Hydra's section; interpolations may be unresolved.
        schema: `composition.base_schema()`.
        files: recipes and presets, to name the file a wrong key comes from.

    Raises:
        ConfigError: with the dotted key, its file if it is in one, and the nearest key.
    """
    given, known = _plain(config), _plain(schema)
    for key, value, expected in _differences(given, known, ""):
        where = _origin(key, value, files)
        if expected is _UNKNOWN:
            hint = whole_section(key) or nearest_key(key, schema)
            raise ConfigError(key, f"unknown key{where}.{hint}")
        raise ConfigError(key, f"takes {_kind(expected)}, got {value!r}{where}.")


def nearest_key(key: str, schema: DictConfig) -> str:
    """` Did you mean 'a.b.c'?` for the likeliest key meant by `key`, or an empty string.

    A sibling with a similar name comes first, then the same name elsewhere, then the most similar dotted key.
    """
    known = [item for item in _dotted(_plain(schema)) if item != key]
    parent, _, name = key.rpartition(".")
    siblings = {item.rpartition(".")[2]: item for item in known if item.rpartition(".")[0] == parent}
    near = difflib.get_close_matches(name, siblings, n=1)
    meant = [siblings[item] for item in near]
    meant += sorted((item for item in known if item.rpartition(".")[2] == name), key=_usual_place)
    others = [item for item in known if not key.startswith(f"{item}.")]
    meant += difflib.get_close_matches(key, others, n=1, cutoff=0.8)
    return f" Did you mean {meant[0]!r}?" if meant else ""


def whole_section(key: str) -> str:
    """What to write for a key of a section that stands in the place of a number; an empty string for other keys."""
    parent = key.rpartition(".")[0]
    if parent not in NUMBER_OR_SECTION:
        return ""
    return f' Write the section as a whole: "{parent}={{min:...,max:...,by:...}}".'


def takes_any_key(key: str, schema: DictConfig) -> bool:
    """Whether a section that `key` is in takes keys that the schema does not list."""
    section = key.rpartition(".")[0]
    while section and section not in OPEN_SECTIONS and OmegaConf.select(schema, section) != {}:
        section = section.rpartition(".")[0]
    return bool(section)


def _usual_place(key: str) -> tuple[int, int]:
    """Sections that REFINE uses before verl's others."""
    sections = (
        "refine",
        "model",
        "data",
        "trainer",
        "actor_rollout_ref.actor",
        "actor_rollout_ref",
        "algorithm",
    )
    rank = next((i for i, section in enumerate(sections) if key.startswith(f"{section}.")), len(sections))
    return rank, len(key)


def missing_values(config: DictConfig) -> set[str]:
    """Dotted keys whose value is `???`."""
    return {key for key, value in leaves(config) if value == "???"}


def leaves(config: DictConfig) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no section, interpolations as they are written."""
    return _leaves(_plain(config))


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for each dotted key whose value differs; a key that is missing counts as None."""
    keys = {**before, **after}
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys if before.get(key) != after.get(key)]


_UNKNOWN = object()


def _differences(given: Container, known: Container, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value, what the schema holds or _UNKNOWN) of everything that does not fit."""
    for name, value in given.items():
        key = f"{prefix}{name}"
        if name not in known:
            if name not in _fields_of_target(known):
                yield key, value, _UNKNOWN
            continue
        expected = known[name]
        if isinstance(expected, dict) and expected and key not in OPEN_SECTIONS:
            if isinstance(value, dict):
                yield from _differences(value, expected, f"{key}.")
            elif not _is_interpolation(value) and not (value is None and key in NULL_SECTIONS):
                yield key, value, expected
        elif (key in NUMBER_OR_SECTION and isinstance(value, dict)) or (
            key in TEXT_OR_LIST and isinstance(value, list)
        ):
            continue
        elif not _same_kind(value, expected) or (value is None and expected and key in OPEN_SECTIONS):
            yield key, value, expected


def _fields_of_target(known: Container) -> set[str]:
    """Keys that verl's dataclass accepts though its YAML file does not list them."""
    target = known.get("_target_")
    if not target:
        return set()
    return {field.name for field in dataclasses.fields(get_class(target)) if not field.name.startswith("_")}


def _same_kind(value: Any, expected: Any) -> bool:
    if (
        value is None
        or expected is None
        or expected == "???"
        or _is_interpolation(value)
        or _is_interpolation(expected)
    ):
        return True
    if isinstance(expected, bool):
        return isinstance(value, bool)
    if isinstance(expected, (int, float)):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(expected, str):
        return not isinstance(value, (dict, list))
    if isinstance(expected, list):
        return isinstance(value, (list, str))
    return isinstance(value, dict)


def _kind(expected: Any) -> str:
    if isinstance(expected, bool):
        return "true or false"
    if isinstance(expected, (int, float)):
        return "a number"
    if isinstance(expected, dict):
        return f"a section with the keys {', '.join(str(key) for key in expected if key != '_target_')}"
    return "a list" if isinstance(expected, list) else "a string"


def _is_interpolation(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def _plain(config: DictConfig) -> Container:
    container = OmegaConf.to_container(config, resolve=False)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _dotted(container: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in container.items():
        if name == "_target_":
            continue
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{name}.")


def _leaves(container: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in container.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _origin(key: str, value: Any, files: Iterable[ConfigFile]) -> str:
    """` (in FILE)` for the recipe or preset that sets `key` to `value`; user files come after the shipped ones."""
    for file in reversed(list(files)):
        own_key = file.own_key(key)
        node: Any = _UNKNOWN if own_key is None else _plain(file.content)
        for part in (own_key or "").split("."):
            node = node.get(part, _UNKNOWN) if isinstance(node, dict) else _UNKNOWN
        if node is not _UNKNOWN and node == value:
            return f" (in {file.path})"
    return ""
