"""Where recipes are found, how they inherit, and what wins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from refine_verl.compose.composition import compose_config, register_configs
from refine_verl.compose.recipes import broken_configs, find_configs
from refine_verl.config import ConfigError

RecipeFile = Callable[..., Path]
MINE = """\
# My own recipe. It has a second sentence.
defaults:
  - midtrain
  - _self_
refine:
  nsp:
    chunks: 4
trainer:
  total_training_steps: 7
"""


def test_a_users_recipe_inherits_and_the_command_line_wins(recipe_file: RecipeFile) -> None:
    recipe_file("mine", MINE)
    config = compose_config(["recipe=mine", "trainer.total_training_steps=9"])
    assert config.refine.nsp.chunks == 4
    assert config.refine.ppo_mini_batch_size == 32
    assert config.data.max_length == 16384
    assert config.trainer.total_training_steps == 9
    assert config.trainer.experiment_name == "mine"


def test_recipes_are_layered_in_the_order_given(recipe_file: RecipeFile) -> None:
    recipe_file("short", "data: {max_length: 64}\n")
    config = compose_config(["recipe=[midtrain,short]"])
    assert (config.data.max_length, config.data.train_batch_size) == (64, 128)
    assert config.trainer.experiment_name == "midtrain_short"
    assert compose_config(["recipe=[short,midtrain]"]).data.max_length == 16384


def test_a_recipe_chooses_its_preset_and_the_command_line_another() -> None:
    assert compose_config(["recipe=quickstart"]).model.config.hidden_size == 128
    other = compose_config(["recipe=quickstart", "model=deltanet_1b3"]).model
    assert (other.config.hidden_size, other.config_tokenizer) == (2048, "fla-hub/delta_net-1.3B-100B")


def test_a_recipe_wins_over_a_preset(recipe_file: RecipeFile) -> None:
    recipe_file("wide", "defaults: [{override /model: tiny_deltanet}, _self_]\nmodel: {config: {hidden_size: 64}}\n")
    assert compose_config(["recipe=wide"]).model.config.hidden_size == 64


def test_a_users_preset_lies_beside_the_recipes(recipe_file: RecipeFile) -> None:
    recipe_file("small", "config_tokenizer: bytes\nconfig: {model_type: delta_net}\n", folder="model")
    config = compose_config(["recipe=midtrain", "model=small"])
    assert config.model.config_tokenizer == "bytes"
    assert config.model.activation_checkpointing == "layer"


def test_config_dir_in_hydras_own_layout(tmp_path: Path) -> None:
    directory = tmp_path / "with 'quotes' and spaces"
    (directory / "recipe").mkdir(parents=True)
    (directory / "recipe" / "mine.yaml").write_text(f"# @package _global_\n{MINE}")
    (directory / "model").mkdir()
    (directory / "model" / "small.yaml").write_text("config: {model_type: delta_net}\n")
    config = compose_config(["recipe=mine", "model=small"], config_dirs=[directory])
    assert (config.refine.nsp.chunks, config.data.train_batch_size) == (4, 128)
    assert config.model.config.model_type == "delta_net"


def test_several_directories_and_summaries(
    recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = recipe_file("mine", MINE).parent
    second = tmp_path / "more"
    second.mkdir()
    (second / "yours.yaml").write_text("# Yours (v1.5).\nrefine: {}\n")
    monkeypatch.setenv("REFINE_RECIPES_PATH", f"{first}:{second}:")
    found = {file.name: file.summary for file in find_configs()}
    assert found["mine"] == "My own recipe"
    assert found["yours"] == "Yours (v1.5)"
    assert "midtrain" in found


def test_two_files_may_not_have_one_name(recipe_file: RecipeFile) -> None:
    recipe_file("midtrain", MINE)
    with pytest.raises(ConfigError, match="'midtrain' is defined twice, in .*Rename"):
        register_configs()


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="REFINE_RECIPES_PATH: .*nowhere is not a directory"):
        find_configs({"REFINE_RECIPES_PATH": str(tmp_path / "nowhere")})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("refine:\n  nsp: [\n", "not valid YAML: line 3"),
        ("- a\n- b\n", "keys and values"),
        ("a: ${\n", "cannot be read"),
    ],
)
def test_a_broken_file_is_left_out_and_named(recipe_file: RecipeFile, text: str, message: str) -> None:
    recipe_file("mine", MINE)
    path = recipe_file("broken", text)
    assert {file.name for file in find_configs()} >= {"mine", "midtrain"}
    assert "broken" not in {file.name for file in find_configs()}
    said = str(broken_configs()["recipe", "broken"])
    assert message in said and str(path) in said
    assert compose_config(["recipe=mine"]).refine.nsp.chunks == 4


def test_a_recipe_that_is_gone_is_forgotten(recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe_file("mine", MINE)
    assert "mine" in {file.name for file in register_configs()}
    monkeypatch.delenv("REFINE_RECIPES_PATH")
    with pytest.raises(Exception, match="recipe/mine"):
        compose_config(["recipe=mine"])
