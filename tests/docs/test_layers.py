"""The picture of the layers in docs/architecture.md is what `make check` holds the code to."""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


def layers_of_the_contract() -> list[set[str]]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = [item for item in settings["contracts"] if item["type"] == "layers"]
    return [set(re.findall(r"\w+", line)) for line in contract["layers"]]


def layers_of_the_picture() -> list[set[str]]:
    page = (ROOT / "docs/architecture.md").read_text()
    picture = page[page.index("## The shape") :].split("```")[1]
    notes = len("preflight  workers   adaptation   prepare   report        ")  # the column where they begin
    return [set(line[:notes].split()) for line in picture.strip().splitlines()]


def test_the_picture_is_the_contract() -> None:
    assert layers_of_the_picture() == layers_of_the_contract()


def test_every_room_has_its_row() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    rooms = {path.name for path in (ROOT / "refine_verl").iterdir() if (path / "__init__.py").is_file()}
    table = page[page.index("| room |") : page.index("`refine_verl/plugin.py` is")]
    assert rooms == set(re.findall(r"`refine_verl/(\w+)`", table))
