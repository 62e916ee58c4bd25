"""What all pages share: the frame around the content, tiles, legends and tables of keys.

No script, no font and nothing from elsewhere: a page can be mailed, archived and opened without a network.
Its own content policy refuses anything else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from refine_verl.record.redaction import redacted
from refine_verl.report.headline import Headline
from refine_verl.report.markup import Markup, el, join
from refine_verl.report.style import STYLE

__all__ = ["flatten", "key_table", "render_page", "sample", "setting_text", "tile"]

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


def tile(headline: Headline) -> Markup:
    """A figure that is seen first."""
    unit = el("small", " " + headline.unit) if headline.unit else None
    change = join(" ", el("small", headline.change, class_=headline.verdict or None)) if headline.change else None
    return el(
        "div",
        el("p", headline.name, class_="name"),
        el("p", headline.value, unit, change, class_="value"),
        el("p", headline.detail, class_="detail"),
        class_="tile",
    )


def sample(shape: str, style: str, *marks: Markup) -> Markup:
    """A piece of a line or an area, for a legend."""
    return el("svg", el("path", class_=style, d=shape), *marks, viewBox="0 0 20 10", aria_hidden="true")


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
