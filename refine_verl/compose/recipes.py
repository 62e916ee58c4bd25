"""Recipes and model presets on disk: plain YAML files.

They are shipped with the package or found in the directories of REFINE_RECIPES_PATH: `DIR/NAME.yaml` is a recipe,
`DIR/model/NAME.yaml` a preset.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from refine_verl.config import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]
RECIPES_PATH_VARIABLE = "REFINE_RECIPES_PATH"
GROUPS = {"recipe": "_global_", "model": "model"}
"""Hydra groups of ours, with the place in the configuration that their files describe."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """A recipe or preset on disk."""

    group: str
    name: str
    path: Path
    content: DictConfig

    def own_key(self, key: str) -> str | None:
        """A dotted key as the file has it: in a preset without `model.`; None where it cannot be in the file."""
        package = GROUPS[self.group]
        if package == "_global_":
            return key
        return key.removeprefix(f"{package}.") if key.startswith(f"{package}.") else None

    @property
    def summary(self) -> str:
        """The first sentence of the comment at the top of the file."""
        lines = []
        for line in self.path.read_text().splitlines():
            if not line.startswith("#"):
                break
            lines.append(line.lstrip("# ").strip())
        return re.split(r"\.\s+(?=[A-Z])", " ".join(lines))[0].removesuffix(".")


def find_configs(environment: Mapping[str, str] | None = None) -> list[ConfigFile]:
    """All recipes and presets that can be read: the shipped ones, then those of REFINE_RECIPES_PATH.

    Raises:
        ConfigError: a directory of REFINE_RECIPES_PATH does not exist, or two files of a group have the same name.
    """
    return [item for item in _read_configs(environment).values() if isinstance(item, ConfigFile)]


def broken_configs(environment: Mapping[str, str] | None = None) -> dict[tuple[str, str], ConfigError]:
    """(group, name) of the files that are no YAML mapping, with file, line and reason; they stop nobody else's run."""
    return {key: item for key, item in _read_configs(environment).items() if isinstance(item, ConfigError)}


def _read_configs(environment: Mapping[str, str] | None) -> dict[tuple[str, str], ConfigFile | ConfigError]:
    places = [("recipe", PACKAGE / "recipes"), ("model", PACKAGE / "presets")]
    for entry in (os.environ if environment is None else environment).get(RECIPES_PATH_VARIABLE, "").split(os.pathsep):
        if not entry.strip():
            continue
        directory = Path(entry.strip()).expanduser()
        if not directory.is_dir():
            raise ConfigError(RECIPES_PATH_VARIABLE, f"{directory} is not a directory.")
        places += [("recipe", directory), ("model", directory / "model")]
    paths: dict[tuple[str, str], Path] = {}
    for group, directory in places:
        for path in sorted(directory.glob("*.yaml")):
            other = paths.setdefault((group, path.stem), path)
            if other.resolve() != path.resolve():
                raise ConfigError(
                    RECIPES_PATH_VARIABLE,
                    f"{group} {path.stem!r} is defined twice, in {other} and {path}. Rename one of them.",
                )
    return {(group, name): _read_config(group, path) for (group, name), path in paths.items()}


def _read_config(group: str, path: Path) -> ConfigFile | ConfigError:
    try:
        return ConfigFile(group=group, name=path.stem, path=path, content=_load_mapping(path))
    except ConfigError as error:
        return error


def read_config_dir(directory: Path) -> list[ConfigFile]:
    """The recipes and presets of a directory in Hydra's own layout (`--config-dir`), without those that are broken."""
    found = [_read_config(group, path) for group in GROUPS for path in sorted((directory / group).glob("*.yaml"))]
    return [item for item in found if isinstance(item, ConfigFile)]


def _load_mapping(path: Path) -> DictConfig:
    try:
        content = OmegaConf.load(path)
    except YAMLError as error:
        raise ConfigError(str(path), yaml_problem(error)) from error
    except (OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(str(path), "must hold keys and values, as a mapping.")
    return content


def yaml_problem(error: YAMLError) -> str:
    """What is wrong with a YAML file, and in which line."""
    mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
    if mark is None:
        return f"is not valid YAML: {' '.join(str(error).split())}."
    return f"is not valid YAML: line {mark.line + 1}: {error.problem or error.context}."
