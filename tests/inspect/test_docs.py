"""The page on inspecting names every key with its default."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from omegaconf import OmegaConf

from refine_verl.config import list_settings
from refine_verl.inspect.settings import ROLLOUTS, InspectSettings
from refine_verl.inspect.terminal import WHOLE_TEXT_TOKENS

PAGE = (Path(__file__).resolve().parents[2] / "docs/inspect.md").read_text()


def test_keys_and_defaults() -> None:
    rows = dict(re.findall(r"^\| `([\w.*]+)=?` \| ?(.*?) ?\|", PAGE, re.M))
    shown = {
        info.key.removeprefix("inspect."): ""
        if info.default is dataclasses.MISSING
        else f"`{OmegaConf.to_yaml({'is': info.default}).split(': ', 1)[1].strip()}`"
        for info in list_settings(InspectSettings)
        if info.key != "inspect.nsp"
    }
    assert rows == {**shown, "refine.nsp.*": "as in a recipe"}
    assert f"`rollouts_per_position` is {ROLLOUTS} unless set" in PAGE
    assert f"more than {WHOLE_TEXT_TOKENS} tokens" in PAGE
