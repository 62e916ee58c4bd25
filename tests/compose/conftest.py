"""Every test here runs in an empty directory and without the user's own recipes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig

from refine_verl.compose.recipes import RECIPES_PATH_VARIABLE


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    directory = tmp_path / "cwd"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.delenv(RECIPES_PATH_VARIABLE, raising=False)
    yield directory
    HydraConfig.instance().cfg = None


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`recipe_file(name, text)` writes a recipe into a directory of REFINE_RECIPES_PATH."""
    directory = tmp_path / "recipes"

    def write(name: str, text: str, folder: str = ".") -> Path:
        path = directory / folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        monkeypatch.setenv(RECIPES_PATH_VARIABLE, str(directory))
        return path

    return write
