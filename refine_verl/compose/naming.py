"""What Hydra was given for a run, and the run's name: the recipe, and in a sweep the overrides that vary within it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

EXCLUDE_KEYS = "hydra.job.config.override_dirname.exclude_keys"
"""Hydra's list of the overrides that say nothing of a job; a sweep puts in what all its jobs share."""

LONG_NAME = 120
LONGEST_NAME = 200
"""In characters; file systems take 255."""


def experiment_name() -> str:
    """Name of the run that Hydra is composing: its recipes, and in a multirun what sets this job apart."""
    if not HydraConfig.initialized():
        return "run"
    hydra = HydraConfig.get()
    given = cast("list[str]", OmegaConf.to_container(hydra.overrides.task, resolve=False))
    pairs = [_split(item) for item in given]
    chosen = [value for key, value in pairs if key == "recipe"]
    recipes = re.findall(r"[^\[\],'\" ]+", chosen[-1] if chosen else "run")
    if "MULTIRUN" not in str(hydra.mode):
        return run_name(recipes)
    shared = {"recipe", *hydra.job.config.override_dirname.exclude_keys}
    return run_name(recipes, [(key, value) for key, value in pairs if key not in shared])


def given_overrides() -> dict[str, Any]:
    """Key and value of each override of the run that Hydra is composing, recipe and preset included.

    A key that is taken out (`~key`) keeps its tilde. Interpolations are as they are written.
    """
    if not HydraConfig.initialized():
        return {}
    given = cast("list[str]", OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False))
    parsed = OverridesParser.create().parse_overrides(given)
    return {("~" if item.is_delete() else "") + item.key_or_group: item.value() for item in parsed}


def run_name(recipes: Sequence[str], varying: Iterable[tuple[str, str]] = ()) -> str:
    """A file name for a run; different arguments give different names.

    Args:
        recipes: as chosen.
        varying: key and value of each override that varies within the sweep.

    Returns:
        `RECIPE_KEY=VALUE_...`. What a file name cannot hold becomes a hyphen, long values are cut, and a name that
        lost anything ends in a hash of the whole.
    """
    pairs = list(varying)
    whole = "_".join([*recipes, *(f"{key}={value}" for key, value in pairs)])
    # an equals sign within a value would look like another key
    safe = [(_safe(key), _safe(value).replace("=", "-")) for key, value in pairs]
    stem = "_".join(map(_safe, recipes))
    name = "_".join([stem, *(f"{key}={value}" for key, value in safe)])
    if len(name) > LONG_NAME:
        name = "_".join([stem[:LONG_NAME], *(f"{key}={value[:16]}" for key, value in safe)])
    if len(name) > LONGEST_NAME:
        name = "_".join([stem[:40], *(f"{key.rpartition('.')[2]}={value[:8]}" for key, value in safe)])[:LONGEST_NAME]
    return name if name == whole else f"{name}-{hashlib.sha256(repr((recipes, pairs)).encode()).hexdigest()[:8]}"


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


def _safe(text: str) -> str:
    return re.sub(r"[^\w.=-]+", "-", text)
