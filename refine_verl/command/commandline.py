"""Hydra's command line, looked at before Hydra acts on it, and its errors put for a person."""

from __future__ import annotations

import argparse
import dataclasses
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from refine_verl.command.keys import unknown_option
from refine_verl.compose.composition import base_schema, compose_config
from refine_verl.compose.messages import readable
from refine_verl.compose.recipes import GROUPS, ConfigFile, find_configs, read_config_dir
from refine_verl.compose.validate import ValidConfig, validate
from refine_verl.config import ConfigError, Refusal, nearest

_COMPLETION = ("install=", "uninstall=", "query=")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandLine:
    """What was asked for.

    Attributes:
        arguments: for Hydra: options first, then the overrides.
        overrides: `key=value` as typed.
        multirun: one run for every combination of values.
        shows: prints something and starts no run (`--cfg`, `--info`, ...).
        config_dir: directory with more recipes and presets, None without `--config-dir`.
    """

    arguments: list[str]
    overrides: list[str]
    multirun: bool
    shows: bool
    config_dir: str | None

    def files(self) -> list[ConfigFile]:
        """Recipes and presets that may contribute, for messages."""
        return find_configs() + (read_config_dir(Path(self.config_dir)) if self.config_dir else [])

    def compose(self, overrides: Sequence[str]) -> tuple[ValidConfig, DictConfig]:
        """The checked configuration of ``overrides``, and what it was composed to before.

        Raises:
            ConfigError, DataError, hydra.errors.HydraException: see `compose_config` and `validate`.
        """
        composed = compose_config(overrides, [self.config_dir] if self.config_dir else [])
        return validate(composed, self.files()), composed


def read_command_line(arguments: Sequence[str], *, known: Sequence[str] | None = None) -> CommandLine:
    """Parse with Hydra's own parser, and refuse what Hydra would answer with a traceback or not at all.

    Args:
        arguments: as typed.
        known: options to suggest for an unknown one; None: Hydra's.

    Raises:
        ConfigError: an unknown option, or options that do not go together.
    """
    parser = get_args_parser()
    parser.exit_on_error = parser.allow_abbrev = False
    try:
        given, rest = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ConfigError("", f"{error}. See --help.") from error
    options = [item for item in rest if item.startswith("-")]
    if options:
        _refuse_key_as_option(options[0])
        raise unknown_option(options[0], parser._option_string_actions if known is None else known)
    overrides = [*given.overrides, *rest]  # argparse gives up on overrides that follow an option
    _refuse_misspelt_recipe(overrides)
    _check_options(given, overrides)
    flags = list(arguments)
    for item in overrides:
        flags.remove(item)
    shows = given.cfg or given.info or given.shell_completion or given.hydra_help
    return CommandLine(
        arguments=[*flags, *overrides],
        overrides=overrides,
        multirun=bool(given.multirun),
        shows=bool(shows),
        config_dir=given.config_dir,
    )


def _refuse_key_as_option(option: str) -> None:
    """`--refine.nsp.chunks 4` is a key in the grammar of the other commands; Hydra has one way to write it."""
    name = option.lstrip("-").partition("=")[0]
    if name in GROUPS or (name and OmegaConf.select(base_schema(), name) is not None):
        raise ConfigError("", f"unknown option --{name}: keys of a run are written {name}=VALUE. See --help.")


def _refuse_misspelt_recipe(overrides: Sequence[str]) -> None:
    """Hydra would say that a recipe is missing."""
    names = [item.lstrip("+~").partition("=")[0] for item in overrides]
    if "recipe" not in names and (near := nearest("recipe", names, cutoff=0.75)):
        raise ConfigError(near[0], "unknown key. Did you mean 'recipe'?")


def _check_options(given: argparse.Namespace, overrides: list[str]) -> None:
    commands = {
        "--multirun": given.multirun,
        "--cfg": given.cfg,
        "--info": given.info,
        "--shell-completion": given.shell_completion,
        "--run": given.run,
    }
    chosen = [name for name, value in commands.items() if value]
    if len(chosen) > 1:
        cure = (
            f"{chosen[1]} is for one configuration: leave out -m (--multirun) and give each key one value."
            if chosen[0] == "--multirun"
            else "Choose one of them."
        )
        raise ConfigError("", f"{chosen[0]} and {chosen[1]} do not go together. {cure}")
    for name in ("resolve", "package"):
        if getattr(given, name) and not given.cfg:
            raise ConfigError("", f"--{name} only means something with --cfg job: it is about what --cfg shows.")
    if given.experimental_rerun is not None:
        raise ConfigError(
            "", "--experimental-rerun is not supported: a command that is given again resumes from its checkpoint."
        )
    if given.shell_completion and not any(item.startswith(_COMPLETION) for item in overrides):
        raise ConfigError("", "--shell-completion needs install=SHELL, uninstall=SHELL or query=SHELL.")


@contextmanager
def readable_errors(*, own_words: Sequence[str] = (), one_run: str | None = None) -> Iterator[None]:
    """Errors of Hydra, OmegaConf and YAML within become refusals.

    Args:
        own_words, one_run: see `messages.readable`.

    Raises:
        ConfigError: the same in one message for a person.
    """
    try:
        yield
    except Refusal:
        raise
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        text = readable(error, base_schema(), own_words=own_words, one_run=one_run)
        raise ConfigError("", text) from error
    except (ValueError, TypeError) as error:
        if not (str(error).startswith("Config group override") or _is_of_groups(error)):
            raise
        cure = "recipe=, model= and verl's groups take names: recipe=midtrain, model=tiny_deltanet."
        raise ConfigError("", cure) from error


def _is_of_groups(error: BaseException) -> bool:
    """Whether Hydra failed over the choices of its groups: `data=[1]`, where it wants names."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.endswith(os.path.join("hydra", "_internal", "defaults_list.py"))
