"""Configurations of many tests in little time: what is the same in all of them is parsed, and composed, once."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import omegaconf
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, grammar_parser
from omegaconf._utils import get_yaml_loader

from refine_verl.compose.composition import compose_config


@contextlib.contextmanager
def shared_parsing() -> Iterator[None]:
    """Interpolations and YAML texts, the same ones in every configuration, are parsed once."""
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


class Composer:
    """`compose_config` for command lines that share most of their arguments.

    A base is composed once; overrides of values and sections go onto a copy of it exactly as Hydra puts them there.

    Args:
        bases: command lines to start from.
    """

    def __init__(self, bases: Sequence[Sequence[str]]) -> None:
        self.bases = [tuple(base) for base in bases]
        self.composed: dict[tuple[str, ...], DictConfig] = {}

    def __call__(self, arguments: Sequence[str]) -> DictConfig:
        """The configuration of a command line that begins with the same argument as its base."""
        base = next(base for base in self.bases if base[0] == arguments[0])
        if base not in self.composed:
            self.composed[base] = compose_config(base)
        config = copy.deepcopy(self.composed[base])
        OmegaConf.set_struct(config, True)
        added = [item for item in arguments if item not in base]
        parsed = OverridesParser.create().parse_overrides(added)
        left_out = {item.partition("=")[0] for item in base if item not in arguments}
        assert left_out <= {str(item.key_or_group) for item in parsed}
        ConfigLoaderImpl._apply_overrides_to_config(parsed, config)
        return config
