"""Versions of packages, for what is written down about a run."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterable
from contextlib import suppress


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The version of each package that is installed.

    Where a package is loaded and says of which build it is, that too: `2.13.0+cu130`. Builds of one version of torch
    differ in the last bits of what they compute, and the usual build's metadata says `2.13.0` alone.
    """
    found = {}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
            build = str(getattr(sys.modules.get(name), "__version__", ""))
            found[name] = build if build.startswith(f"{version}+") else version
    return found
