"""What typed settings are made of: one field is one key, which checks itself and names itself in each error.

Standard library only, as `refine_verl.config`, which holds the settings themselves.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from refine_verl.config.refusals import ConfigError

S = TypeVar("S", bound="Settings")


def nearest(value: object, known: Iterable[str], *, most: int = 1, cutoff: float = 0.5) -> list[str]:
    """Those of `known` that are like `value`, the nearest first."""
    return difflib.get_close_matches(str(value), list(known), n=most, cutoff=cutoff)


def did_you_mean(value: object, known: Iterable[str], *, cutoff: float = 0.5) -> str:
    """` Did you mean 'x'?` for the nearest of `known`, or an empty string if none is near."""
    near = nearest(value, [item for item in known if item != value], cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""


def require_choice(key: str, value: object, choices: Iterable[str], *, kind: str = "value") -> None:
    """Refuse a `value` that is not one of `choices`.

    Raises:
        ConfigError: with the allowed values and the nearest one.
    """
    choices = tuple(choices)
    if value not in choices:
        hint = did_you_mean(value, choices)
        raise ConfigError(key, f"unknown {kind} {value!r}. Allowed: {', '.join(choices)}.{hint}")


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    paper: str | None = None,
    empty: bool = True,
    configured: Any = dataclasses.MISSING,
) -> Any:
    """A dataclass field with its meaning, its bounds (`empty=False` refuses an empty string) and the paper's value.

    `configured` is the default of the key in a configuration, where that is not the field's.
    """
    metadata = {"help": help, "choices": choices, "at_least": at_least, "above": above, "paper": paper, "empty": empty}
    metadata["configured"] = default if configured is dataclasses.MISSING else configured
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all sections: checks types and bounds of every field, then the rules between fields."""

    SECTION: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            key = f"{self.SECTION}.{field.name}"
            value = _checked(key, getattr(self, field.name), hints[field.name], field.metadata)
            object.__setattr__(self, field.name, value)
        self._check_rules()

    def _check_rules(self) -> None:
        """Rules between fields; each raises `ConfigError`."""

    @classmethod
    def from_mapping(cls: type[S], mapping: Mapping[str, Any]) -> S:
        """Build the section from a plain (or OmegaConf) mapping.

        Raises:
            ConfigError: unknown key (with the nearest one), wrong type, value out of bounds, contradiction.
        """
        hints = typing.get_type_hints(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        values: dict[str, Any] = {}
        for key in mapping:
            if key not in names:
                hint = did_you_mean(key, names)
                raise ConfigError(f"{cls.SECTION}.{key}", f"unknown key. Allowed: {', '.join(names)}.{hint}")
            values[key] = _nested(f"{cls.SECTION}.{key}", mapping[key], hints[key])
        return cls(**values)


def _nested(key: str, value: Any, hint: Any) -> Any:
    if isinstance(hint, types.UnionType) and isinstance(value, Mapping):
        # a number or a section, for example
        hint = next((kind for kind in typing.get_args(hint) if _is_section(kind)), hint)
    if not _is_section(hint) or isinstance(value, Settings):
        return value
    if value is None:
        return hint()
    if not isinstance(value, Mapping):
        raise ConfigError(key, f"is a section with keys of its own, got {value!r}.")
    return hint.from_mapping(value)


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Settings)


def _checked(key: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if typing.get_origin(hint) is tuple and typing.get_args(hint)[0] is str:
        return require_names(key, value)
    if value is None:
        if types.NoneType in allowed:
            return None
        raise ConfigError(key, f"needs a value ({_type_name(allowed)}), got null.")
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    origins = tuple(typing.get_origin(kind) or kind for kind in allowed)
    if dict in origins and isinstance(value, Mapping):
        value = dict(value)
    if tuple in origins and isinstance(value, list):
        value = tuple(value)
    if not isinstance(value, origins) or (isinstance(value, bool) and bool not in origins):
        raise ConfigError(key, f"must be {_type_name(allowed)}, got {value!r}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(key, f"must be a finite number, got {value}.")
    if isinstance(value, str) and not value.strip() and not metadata.get("empty", True):
        raise ConfigError(key, "is empty. Give a name, or leave it out.")
    if isinstance(value, Settings):
        return value  # it has checked itself
    if metadata.get("choices"):
        require_choice(key, value, metadata["choices"])
    if metadata.get("at_least") is not None and value < metadata["at_least"]:
        raise ConfigError(key, f"must be at least {metadata['at_least']}, got {value}.")
    if metadata.get("above") is not None and value <= metadata["above"]:
        raise ConfigError(key, f"must be greater than {metadata['above']}, got {value}.")
    return value


def require_names(key: str, value: Any) -> tuple[str, ...]:
    """One name or several (None: none) as a tuple.

    Raises:
        ConfigError: something in it is no name.
    """
    names = () if value is None else (value,) if isinstance(value, str) or not isinstance(value, Iterable) else value
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ConfigError(key, f"holds {name!r}; it takes a name or path, or a list of these.")
    return tuple(names)


def _type_name(kinds: tuple[Any, ...]) -> str:
    names = {
        int: "an integer",
        float: "a number",
        str: "a string",
        bool: "true or false",
        dict: "a mapping",
        list: "a list",
        types.NoneType: "null",
    }
    return " or ".join(
        f"a section with {', '.join(field.name for field in dataclasses.fields(kind))}"
        if _is_section(kind)
        else names.get(typing.get_origin(kind) or kind, str(kind))
        for kind in kinds
    )
