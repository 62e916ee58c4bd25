"""Say which replaced fla names a test compares with a reference; a test checks that none is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Test = TypeVar("Test", bound=Callable[..., None])


def compares(*targets: str) -> Callable[[Test], Test]:
    """Declare that the decorated test compares the stand-ins for these ``module:attribute`` names."""

    def declare(test: Test) -> Test:
        test.compares = targets  # type: ignore[attr-defined]
        return test

    return declare
