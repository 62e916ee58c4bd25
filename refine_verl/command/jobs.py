"""Runs that Hydra composes: one, or the jobs of a sweep, which are all checked before the first one starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from unittest import mock

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from omegaconf import DictConfig

from refine_verl.command.commandline import CommandLine, read_command_line, readable_errors
from refine_verl.command.front import BAD_INPUT
from refine_verl.compose.composition import CONFIG_DIR, CONFIG_NAME, register_configs, without_hydra
from refine_verl.compose.naming import EXCLUDE_KEYS
from refine_verl.compose.validate import ValidConfig, validate
from refine_verl.config import ConfigError


def run_jobs(
    arguments: Sequence[str], run: Callable[[ValidConfig], int], check: Callable[[ValidConfig], object]
) -> int:
    """Let Hydra compose ``arguments``, and run what comes out.

    Args:
        arguments: as typed.
        run: runs one configuration; returns its exit code, and anything but 0 ends a sweep.
        check: what a job of a sweep must pass before the first one starts; raises a `Refusal`.

    Returns:
        The exit code of the last run, or of Hydra's own output (`--cfg`, `--info`, ...).

    Raises:
        Refusal: what cannot be used.
    """
    with readable_errors():
        command = read_command_line(arguments)
        register_configs()
        given = _checked_sweep(command, check) if command.multirun else command.arguments
        try:
            return _with_hydra(given, lambda config: run(validate(config, command.files())))
        except SystemExit as stop:  # Hydra's
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            return BAD_INPUT if code and command.shows else code


def _with_hydra(arguments: list[str], run: Callable[[DictConfig], int]) -> int:
    """Let Hydra parse ``arguments`` and call ``run``; its errors come out as exceptions, not as messages of its own."""
    failures: list[Exception] = []

    def job(config: DictConfig) -> None:
        # Hydra would report an exception itself; SystemExit also ends a sweep
        try:
            code = run(without_hydra(config))
        except Exception as error:
            failures.append(error)
            raise SystemExit(1) from error
        if code:
            raise SystemExit(code)

    process = mock.patch.object(sys, "argv", [sys.argv[0], *arguments])
    with process, mock.patch.dict(os.environ, {"HYDRA_FULL_ERROR": "1"}):
        try:
            hydra.main(config_path=str(CONFIG_DIR), config_name=CONFIG_NAME, version_base=None)(job)()
        except SystemExit:
            if failures:
                raise failures[0] from None
            raise
    return 0


def _checked_sweep(command: CommandLine, check: Callable[[ValidConfig], object]) -> list[str]:
    """Check all jobs of a sweep before the first one starts; returns the arguments for Hydra.

    Raises:
        Refusal, hydra.errors.HydraException: what is wrong with the first job that cannot run, or two jobs with one run
            directory.
    """
    apart = exclude_shared(command.overrides)
    jobs = sweep_jobs(command.overrides) or []
    runs = [command.compose([*job, apart, "hydra.mode=MULTIRUN"])[0] for job in jobs]
    refuse_shared_directory(jobs, [run.config.trainer.default_local_dir for run in runs])
    for valid in runs:
        check(valid)
    return [*command.arguments, apart]


def exclude_shared(overrides: Sequence[str]) -> str:
    """The override that tells Hydra which keys are the same for all jobs of a sweep (see `naming.experiment_name`).

    Raises:
        hydra.errors.OverrideParseException: an override that cannot be read.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    varying = {item.key_or_group for item in parsed if item.is_sweep_override()}
    shared = sorted({item.key_or_group for item in parsed if not item.is_hydra_override()} - varying)
    return f"{EXCLUDE_KEYS}=[{','.join(repr(key) for key in shared)}]"


def sweep_jobs(overrides: Sequence[str]) -> list[list[str]] | None:
    """The overrides of each job, in the order they run; None if Hydra's basic sweeper is not the one that decides.

    Raises:
        hydra.errors.OverrideParseException: an override that cannot be read.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    if any(item.key_or_group == "hydra/sweeper" for item in parsed):
        return None
    if any(item.value_type == ValueType.GLOB_CHOICE_SWEEP for item in parsed):
        return None  # means the files of a group, which Hydra looks up later
    (jobs,) = BasicSweeper.split_arguments(parsed, None)
    return [list(job) for job in jobs]


def refuse_shared_directory(jobs: Sequence[Sequence[str]], directories: Sequence[str]) -> None:
    """Two jobs with one run directory would resume from each other's checkpoints.

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
