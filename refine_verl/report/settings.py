"""The settings of a run: REFINE's first, then the others that its recipes name, then the rest of verl's."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from refine_verl.record.run import CONFIG_FILE
from refine_verl.report.markup import Markup, el
from refine_verl.report.page import card, flatten, folded, key_table

__all__ = ["settings_section"]

PACKAGE = Path(__file__).resolve().parents[1]
NAMED_IN = ("conf/base.yaml", "recipes/*.yaml")
OWN_SECTIONS = ("refine", "model")


def settings_section(config: Mapping[str, Any]) -> Markup | None:
    """Tables of keys. Paper unfolds all but verl's own, hundreds of defaults that would fill a dozen sheets."""
    if not config:
        return None
    own = config.get("refine")
    others = {key: value for key, value in config.items() if key != "refine"}
    named = {key: value for key, value in flatten(others) if _is_named(key)}
    rest = {key: value for key, value in flatten(others) if key not in named}
    parts = [el("h2", "Settings")]
    if own:
        parts.append(card(key_table({"refine": own})))
    if named:
        parts.append(folded(f"Model, data and training ({len(named)})", key_table(named), "card"))
    if rest:
        title = f"verl's other settings ({len(rest)}), also in {CONFIG_FILE}"
        parts.append(folded(title, key_table(rest), "card screen"))
    return el("section", *parts)


def _is_named(key: str) -> bool:
    parts = key.split(".")
    return parts[0] in OWN_SECTIONS or any(".".join(parts[:count]) in _named() for count in range(1, len(parts) + 1))


@cache
def _named() -> frozenset[str]:
    """Dotted keys to which the package's configuration and recipes give a value."""
    files = (path for pattern in NAMED_IN for path in PACKAGE.glob(pattern))
    return frozenset(key for path in files for key, _ in flatten(yaml.safe_load(path.read_text("utf-8")) or {}))
