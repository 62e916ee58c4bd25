"""The one grammar of options: `KEY=VALUE`, or `--KEY VALUE`, which means the same.

Keys are the fields of a `Settings` class, whose types, bounds and rules check the values. A value stays the text that
was typed unless the field's type wants something else. `--KEY` alone sets a switch; a list is `a,b` or `[a,b]`, or
several words after `--KEY`; hyphens in `--KEY` are underscores of the field. A field that holds a section of its own
has the keys of that section, `refine.nsp.chunks`; one that holds a mapping takes any key below it, `adapt.lr`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from refine_verl.config import ConfigError, Settings, did_you_mean, option, require_choice

S = TypeVar("S", bound=Settings)
_SWITCH = {"true": True, "false": False}
_KEY = re.compile(r"[A-Za-z_][\w.]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputSettings(Settings):
    """Keys of a command that shows tables."""

    json: bool = option(False, "one JSON object instead of tables (--json)")


@dataclasses.dataclass(frozen=True)
class Key:
    """One key: its name as typed, the types it may have, its default (MISSING: must be given) and its meaning."""

    name: str
    kinds: tuple[Any, ...]
    default: Any
    help: str
    choices: tuple[str, ...] | None


def keys_of(settings: type[Settings] | Settings, prefix: str = "") -> dict[str, Key]:
    """All keys of a class of settings by name; a section in an instance has the values there as defaults."""
    found: dict[str, Key] = {}
    hints = typing.get_type_hints(settings if isinstance(settings, type) else type(settings))
    for field in dataclasses.fields(settings):
        default = _default(field) if isinstance(settings, type) else getattr(settings, field.name)
        if isinstance(default, Settings):
            found |= keys_of(default, f"{default.SECTION}.")
            continue
        hint = hints[field.name]
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        name = prefix + field.name
        found[name] = Key(name, kinds, default, field.metadata["help"], field.metadata.get("choices"))
    return found


def list_keys(settings: type[Settings], *, without: Iterable[str] = ()) -> str:
    """A line for each key, for a command's help: what it is, its default, its meaning and its choices."""
    lines = []
    for key in keys_of(settings).values():
        if key.name in without:
            continue
        choices = f" ({', '.join(key.choices)})" if key.choices else ""
        lines.append(f"  {key.name + '=' + _shown(key.default):<34} {key.help}{choices}")
    return "\n".join(lines)


def _shown(default: Any) -> str:
    if isinstance(default, (list, tuple)):
        return ",".join(map(str, default))
    names = {None: "null", True: "true", False: "false", dataclasses.MISSING: "..."}
    return next((text for value, text in names.items() if default is value), str(default))


def read_keys(arguments: Sequence[str], settings: type[S], *, words: bool = False) -> tuple[S, list[str]]:
    """Settings from a command line, and with `words` what is no key, such as names of directories.

    Raises:
        ConfigError: an unknown key or option (with the nearest one), a key given twice, without a value or not at all
            where it has no default, or a value that cannot be used.
    """
    given, rest = take_keys(arguments, settings)
    for word in rest:
        if not (words and _is_word(word)):
            raise _unknown(word, settings)
    return make_settings(settings, given), rest


def read_command(arguments: Sequence[str], commands: Mapping[str, type[Settings]]) -> tuple[str, Settings]:
    """The command that is named first, `read` or `ask` say, and its settings.

    Raises:
        ConfigError: none, an unknown one, or keys that cannot be used.
    """
    if not arguments:
        raise ConfigError("", f"no command given. Allowed: {', '.join(commands)}. See --help.")
    name, *rest = arguments
    if name.startswith("-"):
        raise unknown_option(name, ["--help"])
    require_choice("", name, commands, kind="command")
    return name, read_keys(rest, commands[name])[0]


def take_keys(arguments: Sequence[str], settings: type[Settings]) -> tuple[dict[str, Any], list[str]]:
    """Take the keys of ``settings`` out of a command line.

    Returns:
        The text of each key (a list of several words after `--KEY`), and everything else in its order.

    Raises:
        ConfigError: a key given twice or without a value.
    """
    keys = keys_of(settings)
    given: dict[str, Any] = {}
    rest: list[str] = []
    waiting = deque(arguments)
    while waiting:
        word = waiting.popleft()
        is_option = word.startswith("--")
        name, equals, text = word.removeprefix("--").partition("=")
        name = name.replace("-", "_") if is_option else name
        key = _find(name, keys)
        if key is None or not (is_option or equals):
            rest.append(word)
            continue
        if name in given:
            raise ConfigError(name, "is given twice. Leave one of them out.")
        given[name] = text if equals else _value_after(word, key, waiting, keys)
    return given, rest


def _find(name: str, keys: Mapping[str, Key]) -> Key | None:
    """The key of this name, or the one that holds a mapping with it."""
    section = keys.get(name.partition(".")[0])
    return keys.get(name) or (section if section is not None and dict in section.kinds else None)


def _value_after(word: str, key: Key, waiting: deque[str], keys: Mapping[str, Key]) -> Any:
    if key.kinds == (bool,):
        return "true"
    values: list[str] = []
    several = any((typing.get_origin(kind) or kind) in (list, tuple) for kind in key.kinds)
    while waiting and not waiting[0].startswith("--") and (several or not values):
        if values and _find(waiting[0].partition("=")[0], keys) and "=" in waiting[0]:
            break
        values.append(waiting.popleft())
    if not values:
        raise ConfigError("", f"{word} needs a value: {word} VALUE, or {key.name}=VALUE.")
    return values if len(values) > 1 else values[0]


def _is_word(word: str) -> bool:
    """Not meant as a key or an option: a name, or something that exists, such as the directory of a sweep's run."""
    if word.startswith("-") and word != "-":
        return False
    return "=" not in word or not _KEY.fullmatch(word.partition("=")[0]) or os.path.exists(word)


def _unknown(word: str, settings: type[Settings]) -> ConfigError:
    keys = keys_of(settings)
    if word.startswith("-") and word != "-":
        return unknown_option(word, ["--help", *(f"--{name.replace('_', '-')}" for name in keys)])
    if not keys:
        return ConfigError("", f"{word!r} is not wanted here: this takes no keys. See --help.")
    name, equals, _ = word.partition("=")
    short = {full.rpartition(".")[2]: full for full in reversed(keys)}
    hint = f" Did you mean {short[name]!r}?" if name in short else did_you_mean(name, keys)
    if not equals:
        return ConfigError("", f"{word!r} is not of the form key=value.{hint} See --help.")
    allowed = dict.fromkeys(re.sub(r"[^.]+$", "*", full) if "." in full else full for full in keys)
    return ConfigError(name, f"unknown key. Allowed: {', '.join(allowed)}.{hint}")


def unknown_option(word: str, known: Iterable[str]) -> ConfigError:
    """What all commands say of an option they do not have."""
    option = word.partition("=")[0]
    known = [name for name in known if name.startswith("--") == option.startswith("--")]
    return ConfigError("", f"unknown option {option}.{did_you_mean(option, known)} See --help.")


def make_settings(settings: type[S], given: Mapping[str, Any]) -> S:
    """Settings from the texts of `take_keys`; messages name keys as they are typed.

    Raises:
        ConfigError: a key without a default that is not given, or a value that cannot be used.
    """
    keys = keys_of(settings)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        default = _default(field)
        if isinstance(default, Settings):
            own = _below(default.SECTION, given)
            read = {name: _read(text, keys[f"{default.SECTION}.{name}"].kinds) for name, text in own.items()}
            values[field.name] = dataclasses.replace(default, **read)
        elif field.name in given or _below(field.name, given):
            values[field.name] = _value(keys[field.name], given)
        if default is dataclasses.MISSING and values.get(field.name) in (None, "", [], ()):
            raise ConfigError(field.name, f"is missing: give {field.name}=... ({keys[field.name].help}).")
    try:
        return settings(**values)
    except ConfigError as error:  # keys of a command are typed without its name in front
        raise ConfigError("", str(error).removeprefix(f"{settings.SECTION}.")) from error


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _below(section: str, given: Mapping[str, Any]) -> dict[str, Any]:
    start = f"{section}."
    return {name.removeprefix(start): text for name, text in given.items() if name.startswith(start)}


def _value(key: Key, given: Mapping[str, Any]) -> Any:
    parts = _below(key.name, given)
    if not parts:
        return _read(given[key.name], key.kinds)
    if key.name in given:
        raise ConfigError(key.name, f"and {key.name}.{next(iter(parts))} are both given. Leave one of them out.")
    return _mapping([f"{name}={text}" for name, text in parts.items()])


def _read(text: Any, kinds: tuple[Any, ...]) -> Any:
    """A text as what the key holds; as typed where it is nothing of the kind, for the settings to refuse."""
    if text == "null" and types.NoneType in kinds:
        return None
    for kind in kinds:
        origin = typing.get_origin(kind) or kind
        if origin in (list, tuple):
            parts = text if isinstance(text, list) else text.removeprefix("[").removesuffix("]").split(",")
            inner = typing.get_args(kind)[:1] or (str,)
            return origin(_read(part.strip(), inner) for part in parts if part.strip())
        if kind is dict and text.startswith("{"):
            return _mapping([f"value={text}"])["value"]
        if isinstance(kind, type) and issubclass(kind, Settings) and isinstance(text, str) and text.startswith("{"):
            # as Hydra reads them, which asks for no space behind a colon
            return kind.from_mapping(_mapping([f"value={re.sub(r':(?=[^ ])', ': ', text)}"])["value"])
        if kind is bool and text in _SWITCH:
            return _SWITCH[text]
        if kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def _mapping(pairs: list[str]) -> dict[str, Any]:
    """A nested mapping from `a.b=VALUE`, its values as in a recipe."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        found: Any = OmegaConf.to_container(OmegaConf.from_dotlist(pairs), resolve=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError("", f"{' '.join(pairs)} cannot be read: {' '.join(str(error).split())}") from error
    return dict(found)
