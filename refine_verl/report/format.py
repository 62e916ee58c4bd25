"""Numbers as people read them: few digits, no noise, a real minus sign."""

from __future__ import annotations

import math

__all__ = ["format_change", "format_duration", "format_number"]

MINUS = "\u2212"
POWERS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k"))
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def format_number(value: float | None, *, percent: bool = False, digits: int = 4) -> str:
    """`value` with about `digits` significant digits: 3.142, 12.3k, 1×10⁻⁶, 41.2%; a dash for None and NaN."""
    if value is None or not math.isfinite(value):
        return "–"
    if percent:
        text = f"{100 * value:.{max(digits - 2, 0)}f}%"
    elif value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{max(digits - 2, 0)}e}".split("e")
        text = f"{_trim(mantissa)}×10{str(int(exponent)).translate(SUPERSCRIPTS)}"
    else:
        text = _plain(value, digits)
    return text.replace("-", MINUS)


def format_change(first: float, last: float, *, percent: bool = False) -> str:
    """The difference with its sign; percentages differ by points."""
    change = last - first
    sign = "+" if change > 0 else ""
    text = format_number(100 * change, digits=3) + " points" if percent else format_number(change, digits=3)
    return sign + text


def format_duration(seconds: float) -> str:
    """`3 h 12 min`, `4 min 5 s`, `12.3 s`."""
    if seconds < 60:
        return f"{format_number(seconds, digits=3)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def _plain(value: float, digits: int) -> str:
    suffix = ""
    for power, name in POWERS:
        if abs(value) >= power:
            value, suffix = value / power, name
            break
    before = len(str(int(abs(value))))
    return _trim(f"{value:.{max(digits - before, 0)}f}") + suffix


def _trim(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text
