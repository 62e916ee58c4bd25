"""The settings of a run: what its command gave, then REFINE's, then the others that its recipes name, then verl's.

Of several runs, those in which they differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from refine_verl.record.run import CONFIG_FILE
from refine_verl.report.markup import Markup, el
from refine_verl.report.page import card, flatten, folded, key_table, setting_text, table_card

PACKAGE = Path(__file__).resolve().parents[1]
NAMED_IN = ("conf/base.yaml", "recipes/*.yaml")
OWN_SECTIONS = ("refine", "model")
FOLD_FROM = 60  # more rows are unfolded by who wants to read them


def settings_section(config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Markup | None:
    """Tables of keys. Paper unfolds all but verl's own, hundreds of defaults that would fill a dozen sheets.

    Args:
        config: all settings of the run.
        overrides: those that its command gave.
    """
    if not config:
        return None
    others = {key: value for key, value in config.items() if key != "refine"}
    named = {key: value for key, value in flatten(others) if _is_named(key)}
    rest = {key: value for key, value in flatten(others) if key not in named}
    parts = [el("h2", "Settings")]
    if overrides:
        parts += [el("p", "Given on the command line:", class_="note"), card(key_table(overrides))]
    if own := config.get("refine"):
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


def differences(
    title: str, file: str, names: Sequence[str], trees: Sequence[Mapping[str, Any]], left_out: Sequence[str]
) -> Markup | None:
    """Keys whose values are not the same everywhere; a run without the file has dashes.

    Args:
        title: of the section.
        file: what was read of each run.
        names: of the runs.
        trees: what each run's file holds, empty where it has none.
        left_out: keys that are always different.
    """
    flat = [dict(flatten(tree)) for tree in trees]
    known = [tree for tree, full in zip(flat, trees, strict=True) if full]
    if len(known) < 2:
        return None
    keys = dict.fromkeys(key for tree in known for key in tree if key not in left_out)
    heading = el("h2", title)
    differ = [key for key in keys if len({repr(tree[key]) if key in tree else "" for tree in known}) > 1]
    if not differ:
        return el("section", heading, el("p", f"None of {len(keys)}.", class_="note"))
    partly = [key for key in differ if not all(key in tree for tree in known)]
    if len(partly) <= FOLD_FROM:
        partly = []
    # hundreds of keys that a run says nothing about would bury the few whose values differ, and fill reams of paper
    shown = [key for key in differ if key not in partly]
    table = _table(shown, flat, names) if shown else None
    if len(shown) > FOLD_FROM:
        table = el("details", el("summary", f"{len(shown)} keys"), table)
    note = el("p", f"{len(shown)} of {len(keys)} keys; the same in all runs: {len(keys) - len(differ)}.", class_="note")
    rest = None
    if partly:
        words = f"{len(partly)} keys that only some of the runs have, also in {file}"
        rest = el("details", el("summary", words), _table(partly, flat, names), class_="screen")
    return el("section", heading, table, note, rest)


def _table(keys: Sequence[str], flat: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Markup:
    rows = []
    for key in keys:
        texts = [setting_text(key, tree[key]) if key in tree else "–" for tree in flat]
        cells = (el("td", el("code", text), class_="setting-value") for text in texts)
        rows.append(el("tr", el("th", key, class_="key"), *cells))
    return table_card(("key", *names), rows, numbers=False)
