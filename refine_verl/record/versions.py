"""Versions of packages, for what is written down about a run."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from contextlib import suppress


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The version of each package that is installed."""
    found = {}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
