"""Markup that is well-formed and escaped by construction."""

from __future__ import annotations

from html import escape

VOID_ELEMENTS = frozenset({"meta", "br", "hr", "link"})


class Markup(str):
    """Text that is markup already and is not escaped again."""

    __slots__ = ()


def el(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element; children that are not `Markup` are escaped, `None` children and attributes are left out.

    A trailing underscore of an attribute is dropped (`class_`), others become hyphens (`stroke_width`).
    """
    opening = name + "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_text(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    content = join(*children)
    if name in VOID_ELEMENTS:
        return Markup(f"<{opening}/>")
    return Markup(f"<{opening}>{content}</{name}>")


def join(*children: object) -> Markup:
    """Children one after the other, escaped where they are not markup."""
    present = (child for child in children if child is not None)
    return Markup("".join(child if isinstance(child, Markup) else escape(_text(child)) for child in present))


def _text(value: object) -> str:
    # control characters are not allowed in markup, escaped or not
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(character for character in text if character in "\t\n\r" or ord(character) >= 32)
