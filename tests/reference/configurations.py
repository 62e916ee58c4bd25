"""Configurations of many tests in little time: what is the same in all of them is parsed, and composed, once."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import omegaconf
import yaml
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides, ResultDefault
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, grammar_parser
from omegaconf._utils import get_yaml_loader

from refine_verl.compose import recipes
from refine_verl.compose.composition import CONFIG_DIR, compose_config, verl_config_dir

_LIST_DEFAULTS, _MERGE = config_loader_impl.create_defaults_list, ConfigLoaderImpl._compose_config_from_defaults_list


@contextlib.contextmanager
def shared_work() -> Iterator[None]:
    """What is the same in every configuration is done once."""
    with shared_parsing(), shared_files(), shared_trees():
        yield


@contextlib.contextmanager
def shared_parsing() -> Iterator[None]:
    """Interpolations and YAML texts are parsed once."""
    grammar, load = grammar_parser.parse, yaml.load
    omegaconf.base.parse = omegaconf._utils.parse = functools.cache(grammar)  # trees are only read

    @functools.cache
    def parse(text: str) -> Any:
        return load(text, Loader=get_yaml_loader())

    def load_once(stream: Any, Loader: Any) -> Any:
        if Loader.__name__ != get_yaml_loader().__name__:
            return load(stream, Loader=Loader)
        text = stream if isinstance(stream, str) else stream.read()
        try:
            return copy.deepcopy(parse(text))
        except yaml.YAMLError:
            if text is not stream:
                stream.seek(0)  # the message names the file
            return load(stream, Loader=Loader)

    yaml.load = load_once
    try:
        yield
    finally:
        omegaconf.base.parse = omegaconf._utils.parse = grammar
        yaml.load = load


@contextlib.contextmanager
def shared_files() -> Iterator[None]:
    """Recipes and presets that have not changed on disk are read once; nobody changes what was read."""
    read = recipes._load_mapping

    @functools.cache
    def read_version(path: Path, modified: int, size: int) -> DictConfig:
        return read(path)

    def read_once(path: Path) -> DictConfig:
        try:
            found = path.stat()
        except OSError:
            return read(path)
        return read_version(path, found.st_mtime_ns, found.st_size)

    recipes._load_mapping = read_once
    try:
        yield
    finally:
        recipes._load_mapping = read


@contextlib.contextmanager
def shared_trees() -> Iterator[None]:
    """Files that the same choice of recipe, preset and verl's groups puts together are put together once.

    Hydra works out which files a command line names, merges them and applies the overrides of values to the result.
    The first two are the same for all that choose the same; each gets a copy. Where files come from a directory that a
    test made they are put together each time.
    """
    lists: dict[Any, DefaultsList] = {}
    trees: dict[int, bytes] = {}
    known = {f"{CONFIG_DIR}", verl_config_dir()}

    def list_once(*, repo: IConfigRepository, config_name: str, overrides_list: list[Override], **how: Any) -> Any:
        values = Overrides(repo=repo, overrides_list=overrides_list).config_overrides
        chosen = [item for item in overrides_list if item not in values]
        files = [source.path for source in repo.get_sources() if source.scheme() == "file"]
        if not known.issuperset(files):
            return _LIST_DEFAULTS(repo=repo, config_name=config_name, overrides_list=overrides_list, **how)
        stored = repr(ConfigStore.instance().repo)
        key = (config_name, *files, stored, *sorted(how.items()), *(item.input_line for item in chosen))
        if key not in lists:
            lists[key] = _LIST_DEFAULTS(repo=repo, config_name=config_name, overrides_list=chosen, **how)
        return dataclasses.replace(lists[key], config_overrides=values)

    def merge_once(self: ConfigLoaderImpl, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        if not any(defaults is one.defaults for one in lists.values()):
            return _MERGE(self, defaults, repo)
        if id(defaults) not in trees:
            trees[id(defaults)] = pickle.dumps(_MERGE(self, defaults, repo))  # twice as fast as a deep copy
        return cast(DictConfig, pickle.loads(trees[id(defaults)]))

    with _hydra_with(list_once, merge_once):
        yield


@contextlib.contextmanager
def hydra_alone() -> Iterator[None]:
    """Hydra as it is, inside `shared_work`."""
    with _hydra_with(_LIST_DEFAULTS, _MERGE):
        yield


@contextlib.contextmanager
def _hydra_with(list_defaults: Any, merge: Any) -> Iterator[None]:
    before = config_loader_impl.create_defaults_list, ConfigLoaderImpl._compose_config_from_defaults_list
    config_loader_impl.create_defaults_list = list_defaults
    ConfigLoaderImpl._compose_config_from_defaults_list = merge  # type: ignore[method-assign]
    try:
        yield
    finally:
        config_loader_impl.create_defaults_list = before[0]
        ConfigLoaderImpl._compose_config_from_defaults_list = before[1]  # type: ignore[method-assign]


class Composer:
    """`compose_config` for command lines that share most of their arguments.

    A base is composed once; overrides of values and sections go onto a copy of it exactly as Hydra puts them there.

    Args:
        bases: command lines to start from.
    """

    def __init__(self, bases: Sequence[Sequence[str]]) -> None:
        self.bases = [tuple(base) for base in bases]
        self.composed: dict[tuple[str, ...], bytes] = {}

    def __call__(self, arguments: Sequence[str]) -> DictConfig:
        """The configuration of a command line that begins with the same argument as its base."""
        base = next(base for base in self.bases if base[0] == arguments[0])
        if base not in self.composed:
            self.composed[base] = pickle.dumps(compose_config(base))
        config: DictConfig = pickle.loads(self.composed[base])
        OmegaConf.set_struct(config, True)
        added = [item for item in arguments if item not in base]
        parsed = OverridesParser.create().parse_overrides(added)
        left_out = {item.partition("=")[0] for item in base if item not in arguments}
        assert left_out <= {str(item.key_or_group) for item in parsed}
        ConfigLoaderImpl._apply_overrides_to_config(parsed, config)
        return config
