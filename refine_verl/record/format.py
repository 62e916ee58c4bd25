"""Numbers as people read them: few digits, no noise, a real minus sign."""

from __future__ import annotations

import math

from rich.filesize import pick_unit_and_suffix

MINUS, NO_BREAK = "\u2212", "\u00a0"
POWERS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
BINARY = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"]
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def format_number(value: float | None, *, percent: bool = False, digits: int = 4) -> str:
    """`digits` significant digits: 3.142, 12.30k, 1.00×10⁻⁶, 41.20%; whole numbers stay whole."""
    if value is None or not math.isfinite(value):
        return "–"
    if percent:
        text = f"{100 * value:.{max(digits - 2, 0)}f}%"
    elif value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{max(digits - 2, 0)}e}".split("e")
        text = f"{mantissa}×{power_of_ten(int(exponent))}"
    else:
        text = _plain(value, digits)
    return text.replace("-", MINUS)


def power_of_ten(exponent: int) -> str:
    """`10⁻⁶`"""
    return "10" + str(exponent).translate(SUPERSCRIPTS)


def format_change(first: float, last: float, *, percent: bool = False) -> str:
    """The difference with its sign; percentages differ by percentage points."""
    change = last - first
    sign = "+" if change > 0 else ""
    if percent:
        return f"{sign}{100 * change:.2f} pts".replace("-", MINUS)
    return sign + format_number(change, digits=3)


def format_duration(seconds: float) -> str:
    """`3 h 12 min`, `4 min 5 s`, `12.3 s`; the spaces do not break."""
    if seconds < 60:
        return f"{seconds:.1f}{NO_BREAK}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    parts = ((hours, "h"), (left, "min")) if hours else ((left, "min"), (rest, "s"))
    return NO_BREAK.join(f"{count}{NO_BREAK}{unit}" for count, unit in parts if count)


def unit_of(size: int) -> tuple[int, str]:
    """The largest binary unit of which ``size`` bytes have one: its bytes and its name."""
    return pick_unit_and_suffix(size, BINARY, 1024)


def size_text(size: int, digits: int = 1) -> str:
    """`1.5 MiB`; bytes are whole."""
    unit, name = unit_of(size)
    return f"{size / unit:,.{digits if unit > 1 else 0}f} {name}"


def _plain(value: float, digits: int) -> str:
    for power, suffix in POWERS:
        if abs(value) >= max(power, 1e4):
            return _significant(value / power, digits) + suffix
    return str(int(value)) if value == int(value) else _significant(value, digits)


def _significant(value: float, digits: int) -> str:
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{max(decimals, 0)}f}"
