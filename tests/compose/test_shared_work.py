"""Configurations that tests compose with shared work are those that Hydra composes alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf
from reference.configurations import hydra_alone

from refine_verl.compose.composition import compose_config

GIVEN = ["model.path=DIR", "data.train_files=FILE"]
LINES = [
    ["recipe=midtrain", *GIVEN],
    ["recipe=midtrain", *GIVEN, "refine.nsp.chunks=4", "+trainer.more={a: [1, 2]}"],
    ["recipe=midtrain", *GIVEN, "model=lact_760m"],
    ["recipe=[midtrain,sft]", *GIVEN, "~refine.nsp.reward"],
    ["recipe=ttt", "model@other=tiny_lact", "actor@actor_rollout_ref.actor=megatron_actor"],
    ["recipe=ttt", "hydra.job.name=named", "hydra.run.dir=/tmp/x"],
    ["recipe=midtrainn"],
    ["recipe=midtrain", "refine.nsp.chnks=4"],
    ["recipe=midtrain", "nothing@there=x"],
    ["~recipe", "~trainer"],
]


def composed(overrides: list[str]) -> Any:
    """Everything that comes of it: a configuration and Hydra's own, or an error."""
    HydraConfig.instance().cfg = None
    try:
        config = compose_config(overrides)
    except HydraException as error:
        return type(error), str(error)
    every: list[Any] = [config, HydraConfig.instance().cfg]
    found = [OmegaConf.to_container(one) for one in every]
    flags = [one._metadata.flags for one in every]
    config.trainer = None  # what others get is theirs
    config.refine.nsp = None
    return found, flags


@pytest.mark.parametrize("overrides", LINES, ids=" ".join)
def test_shared_or_not(overrides: list[str]) -> None:
    with hydra_alone():
        alone = composed(overrides)
    assert composed(overrides) == alone
    assert composed(overrides) == alone


def test_a_recipe_that_has_changed(recipe_file: Callable[..., Path]) -> None:
    for chunks in (4, 16):
        recipe_file("mine", f"refine: {{nsp: {{chunks: {chunks}}}}}")
        assert compose_config(["recipe=mine"]).refine.nsp.chunks == chunks


def test_a_recipe_that_has_changed_in_a_directory_of_hydras(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    for chunks in (4, 16):
        (tmp_path / "recipe/mine.yaml").write_text(f"# @package _global_\nrefine: {{nsp: {{chunks: {chunks}}}}}")
        assert compose_config(["recipe=mine"], [tmp_path]).refine.nsp.chunks == chunks
