"""Options of Hydra's command line, and the jobs of a sweep, looked at before Hydra acts on them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType

from refine_verl.compose.naming import EXCLUDE_KEYS
from refine_verl.config import ConfigError, did_you_mean

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


def read_command_line(
    arguments: Sequence[str], *, suggest: Sequence[str] | None = None, help_option: str = "--hydra-help"
) -> CommandLine:
    """Parse with Hydra's own parser, and refuse what Hydra would answer with a traceback or not at all.

    Args:
        arguments: as typed.
        suggest: options to suggest for an unknown one; None: Hydra's.
        help_option: what lists them.

    Raises:
        ConfigError: an unknown option, or options that do not go together.
    """
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        given, rest = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ConfigError("", f"{error}. See {help_option}.") from error
    options = [item for item in rest if item.startswith("-")]
    if options:
        known = list(parser._option_string_actions) if suggest is None else suggest
        raise ConfigError("", f"unknown option {options[0]}.{did_you_mean(options[0], known)} See {help_option}.")
    overrides = [*given.overrides, *rest]  # argparse gives up on overrides that follow an option
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
            "", "--experimental-rerun is not supported: a command that is given again goes on from its checkpoint."
        )
    if given.shell_completion and not any(item.startswith(_COMPLETION) for item in overrides):
        raise ConfigError("", "--shell-completion needs install=SHELL, uninstall=SHELL or query=SHELL.")


# Sweeps


def shared_keys(overrides: Sequence[str]) -> list[str]:
    """Keys of the overrides that are the same for all jobs of a sweep.

    Raises:
        hydra.errors.OverrideParseException: an override that cannot be read.
    """
    parsed = _parse(overrides)
    varying = {item.key_or_group for item in parsed if item.is_sweep_override()}
    return sorted({item.key_or_group for item in parsed if not item.is_hydra_override()} - varying)


def exclude_shared(overrides: Sequence[str]) -> str:
    """The override that tells Hydra which overrides say nothing of a job (see `naming.experiment_name`)."""
    quoted = ",".join(f"'{key}'" for key in shared_keys(overrides))
    return f"{EXCLUDE_KEYS}=[{quoted}]"


def sweep_jobs(overrides: Sequence[str]) -> list[list[str]] | None:
    """The overrides of each job, in the order they run; None if Hydra's basic sweeper is not the one that decides.

    Raises:
        hydra.errors.OverrideParseException: an override that cannot be read.
    """
    parsed = _parse(overrides)
    if any(item.key_or_group == "hydra/sweeper" for item in parsed):
        return None
    if any(item.value_type == ValueType.GLOB_CHOICE_SWEEP for item in parsed):
        return None  # means the files of a group, which Hydra looks up later
    (jobs,) = BasicSweeper.split_arguments(parsed, None)
    return [list(job) for job in jobs]


def refuse_shared_directory(jobs: Sequence[Sequence[str]], directories: Sequence[str]) -> None:
    """Two jobs with one run directory would go on from each other's checkpoints.

    Args:
        jobs: their overrides.
        directories: their run directories, in the same order.

    Raises:
        ConfigError: names both jobs.
    """
    seen: dict[str, Sequence[str]] = {}
    for job, directory in zip(jobs, directories, strict=True):
        other = seen.setdefault(directory, job)
        if other is not job:
            apart = [item for item in job if item not in other] or list(job)
            raise ConfigError(
                "trainer.default_local_dir",
                f"the runs of this sweep would share {directory} (one with {' '.join(apart)}). Leave it and "
                "trainer.experiment_name out, so that each run gets a name of its own, or put what varies into it: "
                "'trainer.default_local_dir=DIR/${trainer.experiment_name}'.",
            )


def _parse(overrides: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(overrides))
