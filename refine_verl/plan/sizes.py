"""Bytes for a person, in the unit that suits them."""

from __future__ import annotations

from rich.filesize import pick_unit_and_suffix

_UNITS = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"]


def unit_of(size: int) -> tuple[int, str]:
    """The largest binary unit of which ``size`` has one: its bytes and its name."""
    return pick_unit_and_suffix(size, _UNITS, 1024)


def size_text(size: int, digits: int = 1) -> str:
    """`1.5 MiB`; bytes are whole."""
    unit, name = unit_of(size)
    return f"{size / unit:,.{digits if unit > 1 else 0}f} {name}"
