"""A command run in this process, up to the moment before Ray would start; and the judgement of what it did."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import logging
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from reference.configurations import Composer

import refine_verl
from refine_verl.compose.composition import base_schema

REFUSED = 2
PACKAGE = Path(refine_verl.__file__).parent
PATIENCE = 5
"""Seconds of processor time for one command: they all take less than one."""
MODULES = {"main": "refine_verl.main", "train": "refine_verl.trainer.launch"}
"""Where commands are found; the others are `refine_verl.NAME.__main__`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command did.

    Attributes:
        code: its exit code; None if an exception came out of it.
        config: the configuration that would be trained; None if nothing would.
        output, errors: what it printed.
        problem: the exception that came out of it, as text.
        written: files and directories it made or changed in its working directory or beside its input.
    """

    code: int | None
    config: DictConfig | None
    output: str
    errors: str
    problem: str
    written: tuple[str, ...]

    @property
    def accepted(self) -> bool:
        return self.config is not None or self.code == 0


def run(command: str, arguments: Sequence[str], here: Path, inputs: Path, checks: Checks | None = None) -> Outcome:
    """Run `python -m refine_verl.COMMAND ARGUMENTS` in the empty directory `here`, which is emptied afterwards.

    Where training would start the configuration is kept instead, and the command ends with 0. What is written below
    `here` and `inputs` is in the outcome. With `checks` they stand in for the command.
    """
    main = importlib.import_module(MODULES.get(command, f"refine_verl.{command}.__main__")).main
    launch = importlib.import_module(MODULES["train"])
    started: list[DictConfig] = []

    def train(config: DictConfig, *_: Any, **__: Any) -> Path:
        started.append(config)
        return Path(config.trainer.default_local_dir)

    before, trainer, files = Path.cwd(), launch.train, _state_of(here, inputs)
    output, errors, code, problem = io.StringIO(), io.StringIO(), None, ""
    launch.train = train
    os.chdir(here)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), _logging_to(errors):
            command_line = list(arguments)
            code, problem = _exit_code(lambda: checks(command_line, train) if checks else main(command_line))
    finally:
        os.chdir(before)
        launch.train = trainer
    written = tuple(sorted(path for path, _ in _state_of(here, inputs) - files))
    for path in here.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    config = started[0] if started else None
    return Outcome(
        code=code,
        config=config,
        output=output.getvalue(),
        errors=errors.getvalue(),
        problem=problem,
        written=written,
    )


def _state_of(*directories: Path) -> set[tuple[str, tuple[int, int]]]:
    """Every path with size and time of change; a directory is there or not."""
    found = [path for directory in directories for path in directory.rglob("*")]
    states = [(path, path.lstat()) for path in found]
    return {(str(path), (0, 0) if path.is_dir() else (at.st_size, at.st_mtime_ns)) for path, at in states}


class _Endless(BaseException):
    """Raised where a command has had its time; no handler of exceptions takes it for one."""


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """By the processor's time: what others do on the machine does not count."""

    def stop(*_: Any) -> None:
        raise _Endless

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _exit_code(main: Callable[[], int]) -> tuple[int | None, str]:
    try:
        with _limited(PATIENCE):
            return main(), ""
    except _Endless as stop:
        return None, f"endless ({_place(stop)})"
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None), ""
    except Exception as error:
        return None, f"traceback: {type(error).__name__}: {error} ({_place(error)})"


def _place(error: BaseException) -> str:
    """Where it was raised: file and function of the package."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)] or list(frames)
    return f"{Path(ours[-1].filename).name}: {ours[-1].name}"


@contextlib.contextmanager
def _logging_to(stream: io.StringIO) -> Iterator[None]:
    """As in a process of its own: what is logged is on standard error, in the order of what is said there."""
    handler = logging.StreamHandler(stream)
    handler.setLevel(logging.INFO)
    root = logging.getLogger()
    before, level = root.handlers, logging.getLogger("refine_verl").level
    root.handlers = [handler]
    logging.getLogger("refine_verl").setLevel(logging.INFO)
    try:
        yield
    finally:
        root.handlers = before
        logging.getLogger("refine_verl").setLevel(level)


# The judgement


def fault(outcome: Outcome, *, names: Sequence[str], may_act: bool, must_act: bool = False) -> str:
    """What is wrong with an outcome, or an empty string.

    Args:
        outcome: of a command with one thing wrong.
        names: what a refusal must name, one of them at least.
        may_act: whether going ahead is right as well.
        must_act: whether only going ahead is right.
    """
    if outcome.problem:
        return outcome.problem
    if "Traceback (most recent call last)" in outcome.errors:
        return f"traceback: {outcome.errors.strip().splitlines()[-1]}"
    if outcome.accepted:
        return "" if may_act or must_act else "accepted"
    if must_act:
        return f"refused: {said(outcome)}"
    if outcome.code != REFUSED:
        return f"exit code {outcome.code}: {said(outcome)}"
    messages = re.findall(r"^(?:.*: )?error: .*$", outcome.errors, re.MULTILINE)
    if len(messages) != 1:
        return f"{len(messages)} messages: {outcome.errors.strip()[:200]!r}"
    if not any(name in outcome.errors for name in names):
        return f"does not name {' or '.join(names)}: {said(outcome)}"
    if outcome.written:
        return f"refused, but wrote {', '.join(outcome.written[:3])}"
    return ""


def said(outcome: Outcome) -> str:
    """The last line on standard error, shortened."""
    lines = outcome.errors.strip().splitlines()
    return lines[-1][:200] if lines else "nothing was said"


# What is the same in every case is done once


class Checks:
    """What `python -m refine_verl.main` does until it would train, with compositions that are shared (`Composer`).

    Args:
        bases: command lines to start from.
    """

    def __init__(self, bases: Sequence[Sequence[str]]) -> None:
        self.compose = Composer(bases)

    def __call__(self, arguments: Sequence[str], train: Callable[[DictConfig], object]) -> int:
        """Compose, check and prepare; hand what is to be trained to `train`, and return the exit code."""
        from refine_verl.compose.messages import readable
        from refine_verl.compose.validate import validate
        from refine_verl.config import Refusal
        from refine_verl.preflight.run import prepare_run

        message = ""
        try:
            prepared = prepare_run(validate(self.compose(arguments)), starts_here=True)
            train(prepared.launch_config())
        except (Refusal, OSError) as error:
            message = str(error)
        except (HydraException, OmegaConfBaseException) as error:
            message = readable(error, base_schema())
        if message:
            sys.stderr.write(f"error: {message}\n")
        return REFUSED if message else 0


def value_of(outcome: Outcome, key: str) -> Any:
    """What the key has in the configuration that would be trained."""
    assert outcome.config is not None
    return OmegaConf.select(outcome.config, key)
