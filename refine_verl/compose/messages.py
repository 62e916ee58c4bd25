"""Errors of Hydra and OmegaConf, put for a person: what was wrong, what is allowed, what is nearest."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from refine_verl.compose.recipes import GROUPS, broken_configs, find_configs, yaml_problem
from refine_verl.compose.schema import nearest_key, takes_any_key, whole_section
from refine_verl.config import did_you_mean

FOREIGN_PRESETS = ("hf_model",)
"""What verl happens to keep in a group of the same name as ours."""


REPLACED = {
    "midtrain_grouped": (
        "recipe=midtrain_many_rollouts has taken its place, with more positions and credit per token. Its own settings "
        "were recipe=midtrain refine.nsp.rollouts_per_position=8 refine.nsp.group=position refine.loss.rl_coef=1 "
        "algorithm.norm_adv_by_std_in_grpo=false."
    )
}
"""Recipes that there were, and what to use now."""


def readable(error: Exception, schema: DictConfig, *, own_words: Sequence[str] = (), one_run: str | None = None) -> str:
    """One message for an error of configuration; ours pass through as they are.

    Args:
        error: whatever composition or validation raised.
        schema: `composition.base_schema()`, to find the nearest key.
        own_words: what the command takes as ``WORD=`` besides keys.
        one_run: what a command that has no ``-m`` makes, `a plan`; None where there is one.
    """
    if isinstance(error, MissingConfigException):
        return _unknown_file(error)
    if isinstance(error, YAMLError):
        mark = getattr(error, "problem_mark", None)
        return f"{mark.name}: {yaml_problem(error)}" if mark else yaml_problem(error)
    text = str(error).strip()
    if found := re.match(r"Could not override '([^']+)'", text):
        return _unknown_key(found[1], schema, own_words)
    if text.startswith("You must specify 'recipe'"):
        return f"recipe: choose one with recipe=NAME. {_listing('recipe')}"
    if found := re.match(r"Ambiguous value for argument '(.+?)'", text):
        key, _, value = found[1].partition("=")
        if one_run:
            return f"{key}: {one_run} takes one value at a time, got {value}. Write {key}=[{value}] for a list."
        return f"{key}: write {key}=[{value}] for a list, or add -m for one run per value."
    if one_run and (found := re.match(r"Sweep parameters '(.+?)=(.+)' requires --multirun", text)):
        return f"{found[1]}: {one_run} takes one value at a time, got {found[2]}."
    if found := re.match(r"Error parsing override '(.*)'\s+(.*)", text):
        return f"{found[1]!r} is not of the form key=value ({found[2].strip()})."
    if "See https://hydra.cc" in text:
        detail = " ".join(text.split("See https://hydra.cc")[0].split())
        return f"an override cannot be read ({detail}). Quote special characters: 'key=\"a=b\"'."
    return " ".join(text.split()) or type(error).__name__


def _unknown_file(error: MissingConfigException) -> str:
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    if group not in GROUPS:
        return " ".join(str(error).split("Config search path")[0].split())
    if broken := broken_configs().get((group, name)):
        return f"{group}={name} cannot be used: {broken}"
    if group == "recipe" and name in REPLACED:
        return f"recipe: {name!r} is no longer there: {REPLACED[name]}"
    names = list(error.options or [])
    hint = did_you_mean(name, [item for item in names or _names(group) if item not in FOREIGN_PRESETS])
    parent = re.match(r"In '(?:recipe|model)/([^']+)'", str(error))
    where = f" (in the defaults of {parent[1]!r})" if parent else ""
    kind = "recipe" if group == "recipe" else "model preset"
    return f"{group}: unknown {kind} {name!r}{where}. {_listing(group, names)}{hint}"


def _unknown_key(key: str, schema: DictConfig, own_words: Sequence[str]) -> str:
    section = OmegaConf.select(schema, key)
    if isinstance(section, DictConfig):  # the key is known; a key in its value is not
        if takes_any_key(f"{key}.NAME", schema):
            return f"{key}: takes keys of your own one by one, each with a plus: +{key}.NAME=VALUE."
        return f"{key}: unknown key in its value. Allowed: {', '.join(map(str, section))}."
    hint = whole_section(key) or did_you_mean(key, own_words, cutoff=0.7) or nearest_key(key, schema)
    if not hint:
        open_to_all = takes_any_key(key, schema)
        hint = f" Add a key of your own with a plus: +{key}=..." if open_to_all else " See --help for the keys."
    return f"{key}: unknown key.{hint}"


def _names(group: str) -> list[str]:
    return [file.name for file in find_configs() if file.group == group]


def _listing(group: str, names: list[str] | None = None) -> str:
    shown = [name for name in names or _names(group) if name not in FOREIGN_PRESETS]
    return f"Available: {', '.join(sorted(shown))}."
