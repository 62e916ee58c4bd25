"""Hydra's options in all the ways that do not go together, and recipes that cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from refine_verl.command.commandline import read_command_line
from refine_verl.main import main

RecipeFile = Callable[..., Path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "--cfg", "job", "recipe=quickstart"], "--multirun and --cfg do not go together. --cfg is for one"),
        (["recipe=quickstart", "--info", "all", "-m"], "--multirun and --info do not go together"),
        (["--cfg", "job", "--info", "all", "recipe=quickstart"], "--cfg and --info do not go together. Choose one"),
        (["--run", "-m", "recipe=quickstart"], "--multirun and --run do not go together"),
        (["--resolve", "recipe=quickstart"], "--resolve only means something with --cfg job"),
        (["--package", "refine", "recipe=quickstart"], "--package only means something with --cfg job"),
        (["--cfg", "jobb", "recipe=quickstart"], "invalid choice: 'jobb' (choose from"),
        (["--info", "recipe=quickstart"], "invalid choice: 'recipe=quickstart'"),
        (["--cfg"], "argument --cfg/-c: expected one argument"),
        (["--multrun", "recipe=quickstart"], "unknown option --multrun. Did you mean '--multirun'?"),
        (["--con", "x", "recipe=quickstart"], "unknown option --con. Did you mean '--"),
        (["--recipe", "quickstart"], "unknown option --recipe: keys of a run are written recipe=VALUE."),
        (["--refine.nsp.chunks", "4"], "unknown option --refine.nsp.chunks: keys of a run are written"),
        (["recipee=quickstart"], "recipee: unknown key. Did you mean 'recipe'?"),
        (["--experimental-rerun", "x.pickle"], "--experimental-rerun is not supported"),
        (["--shell-completion", "recipe=quickstart"], "--shell-completion needs install=SHELL"),
        (["--config-dir", "/nowhere", "recipe=quickstart"], "'/nowhere' not found"),
        (["-m", "--config-dir", "/nowhere", "recipe=quickstart"], "/nowhere"),
        (["--config-name", "foo", "recipe=quickstart"], "Cannot find primary config 'foo'"),
        (["--cfg", "job", "--package", "refin", "recipe=quickstart"], "package 'refin' not found"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str], empty_directory: Path
) -> None:
    assert main(arguments) == 2
    said = capfd.readouterr().err
    assert message in said and "Traceback" not in said and len(said.strip().splitlines()) == 1
    assert list(empty_directory.iterdir()) == []


def test_overrides_may_come_before_and_after_options(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["recipe=quickstart", "--cfg", "job", "refine.nsp.chunks=3", "--package", "refine.nsp"]
    assert read_command_line(arguments).overrides == ["recipe=quickstart", "refine.nsp.chunks=3"]
    assert main(arguments) == 0
    assert "chunks: 3" in capfd.readouterr().out


def test_information_about_hydra_is_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--info", "searchpath", "recipe=quickstart"]) == 0
    assert main(["--hydra-help"]) == 0
    assert "Config search path" in capfd.readouterr().out


BROKEN = "refine:\n  nsp:\n    chunks: [4\ndata: {}\n"


def test_a_broken_recipe_stops_only_its_own_runs(
    recipe_file: RecipeFile, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = recipe_file("broken", BROKEN)
    assert main(["recipe=midtrain", "--cfg", "job", "--package", "refine.nsp"]) == 0
    assert "chunks: 8" in capfd.readouterr().out
    assert [record.getMessage() for record in caplog.records if str(path) in record.getMessage()] == [
        f"{path}: is not valid YAML: line 4: expected ',' or ']', but got ':'. It is left out."
    ]
    for choice in ("recipe=broken", "recipe=[quickstart,broken]"):
        assert main([choice]) == 2
        said = capfd.readouterr().err
        assert f"error: recipe=broken cannot be used: {path}: is not valid YAML: line 4" in said
    child = recipe_file("child", "defaults: [broken, _self_]\n")
    assert main(["recipe=child"]) == 2
    assert f"recipe=broken cannot be used: {path}" in capfd.readouterr().err
    assert child.is_file()


def test_a_broken_recipe_of_config_dir_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "configs" / "recipe" / "broken.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(f"# @package _global_\n{BROKEN}")
    options = ["--config-dir", str(tmp_path / "configs")]
    assert main([*options, "recipe=midtrain", "--cfg", "job", "--package", "refine.nsp"]) == 0
    assert main([*options, "recipe=broken"]) == 2
    said = capfd.readouterr().err
    assert str(path) in said and "line 5" in said and "Traceback" not in said
