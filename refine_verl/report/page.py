"""What all pages share: the frame around the content, headers, tiles, legends, cards, tables, and writing the file.

No script, no font and nothing from elsewhere: a page can be mailed, archived and opened without a network.
Its own content policy refuses anything else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from refine_verl.record.files import write_atomically
from refine_verl.record.redaction import redacted
from refine_verl.report.markup import Markup, el, join
from refine_verl.report.style import STYLE

CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render_page(title: str, *body: object, style: str = "") -> str:
    """A complete page; `style` is added to the common style sheet."""
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=CONTENT_POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", title),
        el("style", Markup(STYLE + style)),
    )
    return "<!DOCTYPE html>\n" + el("html", head, el("body", el("main", *body)), lang="en") + "\n"


def write_page(target: Path, page: str) -> Path:
    """Write a page in one step; its directory is made where needed. Returns `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, page)
    return target


def header(kicker: str, title: object, facts: Iterable[str]) -> Markup:
    """The top of a page: what kind of page it is, its title, and a line of facts."""
    return el(
        "header",
        el("p", kicker, class_="kicker"),
        el("h1", title),
        el("p", " · ".join(facts), class_="facts"),
    )


def tile(
    name: str, value: str, *, unit: str = "", change: str = "", verdict: str | None = None, detail: str = ""
) -> Markup:
    """A figure that is seen first, with its unit, its change (`verdict`: good, poor or none) and a line of detail."""
    return el(
        "div",
        el("p", name, class_="name"),
        el(
            "p",
            value,
            el("small", " " + unit) if unit else None,
            join(" ", el("small", change, class_=verdict)) if change else None,
            class_="value",
        ),
        el("p", detail, class_="detail"),
        class_="tile",
    )


def figure(title: str, unit: str, legend: Markup, drawing: Markup, style: str) -> Markup:
    """A drawing with its title and legend above it."""
    caption = el("figcaption", el("h3", title, el("span", unit, class_="unit")), legend)
    return el("figure", caption, drawing, class_=style)


def sample(shape: str, style: str, *marks: Markup) -> Markup:
    """A piece of a line or an area, for a legend."""
    return el("svg", el("path", class_=style, d=shape), *marks, viewBox="0 0 20 10", aria_hidden="true")


def card(table: Markup) -> Markup:
    """A table on a card."""
    return el("div", el("div", table, class_="panel"), class_="card")


def folded(title: str, table: Markup, style: str) -> Markup:
    """A table on a card that is unfolded by its title."""
    return el("details", el("summary", title), el("div", table, class_="panel"), class_=style)


def table_card(head: Sequence[object], rows: Iterable[object], *, numbers: bool) -> Markup:
    """A card with a table; all columns but the first are numbers or texts."""
    style = "number" if numbers else None
    cells = [el("th", head[0]), *(el("th", name, class_=style) for name in head[1:])]
    return card(el("table", el("thead", el("tr", *cells)), el("tbody", *rows)))


def number_cells(cells: Iterable[object]) -> list[Markup]:
    """Cells of a table that hold numbers."""
    return [el("td", cell, class_="number") for cell in cells]


def key_table(tree: Mapping[str, Any]) -> Markup:
    """Dotted keys with their values."""
    rows = [
        el("tr", el("th", key, class_="key"), el("td", el("code", setting_text(key, value)), class_="setting"))
        for key, value in flatten(tree)
    ]
    return el("table", el("tbody", *rows))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a nested mapping, in order."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def setting_text(key: str, value: Any) -> str:
    """The value as it would be typed; a secret is never written into a page that gets passed on."""
    value = redacted(value, key)
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=str)
