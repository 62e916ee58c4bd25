"""Cases that are not judged well yet, by what is wrong. Who mends one takes it off: the test fails until then."""

from __future__ import annotations

BY_KIND: dict[str, tuple[str, ...]] = {}

KNOWN = {case: kind for kind, cases in BY_KIND.items() for case in cases}
"""Case to kind."""
