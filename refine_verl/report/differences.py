"""The keys in which runs differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from refine_verl.report.markup import Markup, el
from refine_verl.report.page import flatten, setting_text, table_card

__all__ = ["differences"]

FOLD_FROM = 60  # more rows are unfolded by who wants to read them

Flat = Mapping[str, Any]


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
    if len(partly) > FOLD_FROM:
        # hundreds of keys that a run says nothing about would bury the few whose values differ, and fill reams of paper
        differ = [key for key in differ if key not in set(partly)]
        words = f"{len(partly)} keys that only some of the runs have, also in {file}"
        rest: Markup | None = _folded(words, "screen", _rows(partly, flat), names)
    else:
        partly, rest = [], None
    same = len(keys) - len(differ) - len(partly)
    note = el("p", f"{len(differ)} of {len(keys)} keys; the same in all runs: {same}.", class_="note")
    if len(differ) > FOLD_FROM:
        table: Markup | None = _folded(f"{len(differ)} keys", None, _rows(differ, flat), names)
    else:
        table = _table(_rows(differ, flat), names) if differ else None
    return el("section", heading, table, note, rest)


def _rows(keys: Iterable[str], flat: Sequence[Flat]) -> list[Markup]:
    rows = []
    for key in keys:
        texts = [setting_text(key, tree[key]) if key in tree else "–" for tree in flat]
        cells = (el("td", el("code", text), class_="setting-value") for text in texts)
        rows.append(el("tr", el("th", key, class_="key"), *cells))
    return rows


def _table(rows: Sequence[Markup], names: Sequence[str]) -> Markup:
    return table_card(("key", *names), rows, numbers=False)


def _folded(title: str, style: str | None, rows: Sequence[Markup], names: Sequence[str]) -> Markup:
    return el("details", el("summary", title), _table(rows, names), class_=style)
