"""A user's function that scores answers, with verl's signature: loaded and checked before anything starts."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from refine_verl.compose.phases import REWARD_FUNCTION
from refine_verl.config import ConfigError, RunFailed

ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")
"""What verl calls such a function with, by name."""

RewardFunction = Callable[[str, str, list[str], Mapping[str, Any]], float]


def load_reward_function(config: DictConfig) -> RewardFunction | None:
    """The function that `reward.custom_reward_function` names, None if it names none. Imports verl.

    It is called with the task, an answer, the reference answers, and more about the prompt, and returns the score.

    Args:
        config: resolved.

    Raises:
        ConfigError: no such file or function, or one that cannot be called as verl does.
    """
    section = config.reward.custom_reward_function
    if section.path is None:
        return None
    function = _found(section.path, section.name)
    more: dict[str, Any] = OmegaConf.to_container(section.reward_kwargs or OmegaConf.create({}))  # type: ignore[assignment]
    _check_signature(function, f"{section.path}: {section.name}", more)

    def score(task: str, answer: str, references: list[str], about: Mapping[str, Any]) -> float:
        # as in verl's data sets: the reference itself, and a list only of several
        truth = references[0] if len(references) == 1 else references
        given = dict(zip(ARGUMENTS, (task, answer, truth, dict(about)), strict=True))
        found = function(**{**given, **more})
        return _number(asyncio.run(found) if inspect.iscoroutine(found) else found, section.name)

    return score


def _found(path: str, name: str) -> Callable[..., Any]:
    from verl.utils.import_utils import load_extern_object

    try:
        function = load_extern_object(path, name)
    except FileNotFoundError as error:
        raise ConfigError(f"{REWARD_FUNCTION}.path", f"{path}: no such file.") from error
    except AttributeError as error:
        raise ConfigError(f"{REWARD_FUNCTION}.name", f"{path} has no function {name!r}.") from error
    except Exception as error:  # a user's module may fail in any way while it is imported
        cause = error.__cause__ or error
        raise ConfigError(
            f"{REWARD_FUNCTION}.path", f"{path} cannot be imported ({type(cause).__name__}: {cause})."
        ) from error
    if not callable(function):
        raise ConfigError(f"{REWARD_FUNCTION}.name", f"{name!r} of {path} is no function, but {function!r}.")
    return function


def _check_signature(function: Callable[..., Any], where: str, more: Mapping[str, Any]) -> None:
    try:
        inspect.signature(function).bind(**{**dict.fromkeys(ARGUMENTS), **more})
    except TypeError as error:
        extra = f" and {', '.join(more)}" if more else ""
        raise ConfigError(
            REWARD_FUNCTION, f"{where} cannot be called with {', '.join(ARGUMENTS)}{extra} by name: {error}."
        ) from error
    except ValueError:  # of a function in C, whose signature nobody knows
        return


def _number(found: Any, name: str) -> float:
    """The score that was returned, or that of `score` in a mapping, as in verl."""
    value = found.get("score") if isinstance(found, Mapping) else found
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RunFailed(f"{REWARD_FUNCTION}: {name} returned {found!r}; a score is a finite number.")
    return number
