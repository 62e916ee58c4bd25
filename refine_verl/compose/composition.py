"""From recipe names and `key=value` overrides to one configuration, with Hydra.

The primary configuration is `conf/refine.yaml`: verl's own tree, then REFINE's sections, then a model preset,
then a recipe (`refine_verl.compose.recipes`). Nothing here imports torch, ray or verl, except to look for GPUs.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from refine_verl.compose.naming import experiment_name
from refine_verl.compose.recipes import GROUPS, PACKAGE, ConfigFile, find_configs
from refine_verl.config import (
    ConfigError,
    DataSettings,
    ModelSettings,
    PromptSettings,
    RefineSettings,
    Settings,
    list_settings,
)

CONFIG_DIR = PACKAGE / "conf"
CONFIG_NAME = "refine"
_registered: list[ConfigFile] = []


def register_configs(environment: Mapping[str, str] | None = None) -> list[ConfigFile]:
    """Make recipes and presets known to Hydra; safe to call again.

    A file that is no YAML mapping is left out (see `broken_configs`).

    Raises:
        ConfigError: a directory of REFINE_RECIPES_PATH does not exist, or two files of a group have the same name.
    """
    _register_sections()
    store = ConfigStore.instance()
    files = find_configs(environment)
    if files == _registered:
        return files
    for group in GROUPS:
        store.repo.pop(group, None)
    _registered[:] = files
    for file in files:
        store.store(
            group=file.group,
            name=file.name,
            node=file.content,
            package=GROUPS[file.group],
            provider=str(file.path),
        )
    return files


def _register_sections() -> None:
    """What `conf/*.yaml` refers to: the resolvers, and our sections with the defaults of the dataclasses."""
    OmegaConf.register_new_resolver("verl_config_dir", verl_config_dir, replace=True)
    OmegaConf.register_new_resolver("refine_auto", _automatic, replace=True)
    sections = {
        "refine": dataclasses.asdict(RefineSettings()),
        "model": _defaults(ModelSettings),
        "data": _defaults(DataSettings, PromptSettings),
    }
    store = ConfigStore.instance()
    store.store(name="refine_sections", node=OmegaConf.create(sections), provider="refine_verl")


def _defaults(*sections: type[Settings]) -> dict[str, Any]:
    """The defaults of keys, unchecked: without a preset or a path, `model:` is no model yet."""
    return {setting.key.rpartition(".")[2]: setting.default for setting in list_settings(*sections)}


# What the YAML files ask for by interpolation


@functools.cache
def verl_config_dir() -> str:
    """verl's tree of YAML files, found without importing verl (which takes seconds).

    Raises:
        ConfigError: verl is not installed.
    """
    spec = importlib.util.find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("", "verl is not installed in this Python; run `make venv` or `pip install -e .`.")
    return str(Path(list(spec.submodule_search_locations)[0]) / "trainer" / "config")


def _automatic(what: str) -> str | int:
    values: dict[str, Callable[[], str | int]] = {
        "device": lambda: "cuda" if _gpu_count() else "cpu",
        "workers": lambda: _gpu_count() or 1,
        "dtype": automatic_dtype,
        "experiment": experiment_name,
        "scratch": lambda: _scratch_directory().name,
    }
    return values[what]()


def automatic_dtype() -> str:
    """What matrix products run in on this host."""
    return "bfloat16" if _gpu_count() else "float32"


@functools.cache
def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@functools.cache
def _scratch_directory() -> tempfile.TemporaryDirectory[str]:
    """A directory that goes away with this process, for what Hydra insists on writing in a multirun."""
    return tempfile.TemporaryDirectory(prefix="refine_verl_")


# Composition inside a process


def compose_config(overrides: Iterable[str], config_dirs: Sequence[str | Path] = ()) -> DictConfig:
    """The configuration that `python -m refine_verl.main OVERRIDES` would see, not yet validated.

    Args:
        overrides: as on the command line: `recipe=midtrain`, `model.path=DIR`, `refine.nsp.chunks=4`, ...
        config_dirs: more directories with `recipe/NAME.yaml` and `model/NAME.yaml` (Hydra's `--config-dir`).

    Returns:
        The configuration without Hydra's own section.

    Raises:
        hydra.errors.HydraException: names or keys that do not exist, overrides that cannot be read;
            `messages.readable` puts it for a person.
        ConfigError: see `register_configs`.
    """
    register_configs()
    config = _compose(CONFIG_NAME, list(overrides), config_dirs)
    HydraConfig.instance().set_config(config)
    return without_hydra(config)


@functools.cache
def base_schema() -> DictConfig:
    """verl's configuration with REFINE's sections and no recipe: the keys that exist. Do not change it."""
    _register_sections()
    return without_hydra(_compose("base", [], ()))


def _compose(name: str, overrides: list[str], config_dirs: Sequence[str | Path]) -> DictConfig:
    paths = [f"file://{verl_config_dir()}", *(f"file://{Path(item).absolute()}" for item in config_dirs)]
    search = f"hydra.searchpath=[{','.join(_quoted(path) for path in paths)}]"
    hydra = GlobalHydra.instance()
    outer = hydra.hydra  # inside hydra.main there is one already
    hydra.clear()
    try:
        with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base=None):
            return compose(config_name=name, overrides=[*overrides, search], return_hydra_config=True)
    finally:
        hydra.hydra = outer


def _quoted(path: str) -> str:
    escaped = path.replace("'", "\\'")
    return f"'{escaped}'"


def without_hydra(config: DictConfig) -> DictConfig:
    """A copy without Hydra's own section."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
