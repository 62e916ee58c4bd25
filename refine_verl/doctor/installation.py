"""Python, packages and verl's plug-in."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Iterator

from packaging.requirements import Requirement

from refine_verl.doctor.findings import FAIL, OK, Finding

PYTHONS = ((3, 10), (3, 13))
"""From (inclusive), to (exclusive), as in setup.py."""
IMPORTED = ("torch", "ray", "verl", "fla", "transformers", "tensordict", "datasets")
"""What a run imports first, in this order: a broken one is named by itself and not by whoever needs it."""


def check_python() -> Iterator[Finding]:
    """The interpreter is one that verl and its dependencies support."""
    seen, version = platform.python_version(), sys.version_info[:2]
    if PYTHONS[0] <= version < PYTHONS[1]:
        yield Finding("python", OK, seen)
    else:
        yield Finding("python", FAIL, f"{seen}; 3.10 to 3.12 are supported", "make venv PYTHON=/path/to/python3.12")


def check_versions() -> Iterator[Finding]:
    """Every dependency is installed in a version within the bounds of setup.py."""
    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires("refine_verl") or []]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("packages", FAIL, "refine_verl is not installed in this Python", "pip install -e .")
        return
    here = [needed for needed in wanted if needed.marker is None or needed.marker.evaluate({"extra": ""})]
    bad = [finding for requirement in here if (finding := _version(requirement))]
    yield from bad
    yield Finding("packages", OK, f"{len(here) - len(bad)} dependencies within their bounds")


def _version(requirement: Requirement) -> Finding | None:
    try:
        found = importlib.metadata.version(requirement.name)
        if requirement.specifier.contains(found, prereleases=True):
            return None
        seen = f"{found}, needed: {requirement.specifier}"
    except importlib.metadata.PackageNotFoundError:
        seen = "not installed"
    return Finding(
        f"package {requirement.name}", FAIL, seen, f'pip install "{requirement.name}{requirement.specifier}"'
    )


def check_imports() -> Iterator[Finding]:
    """The large packages can be imported, together."""
    for name in IMPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken binary may raise anything
            yield Finding(
                f"import {name}",
                FAIL,
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                f"reinstall it: pip install --force-reinstall --no-deps {name if name != 'fla' else 'fla-core'} "
                "(undefined symbols mean that it was built for another torch)",
            )
            return
    yield Finding("imports", OK, ", ".join(IMPORTED))


def check_plugin() -> Iterator[Finding]:
    """verl finds our platform, through its entry-point group."""
    groups = importlib.metadata.entry_points(group="verl.plugins")
    if "refine_verl" not in groups.names:
        yield Finding(
            "verl plug-in",
            FAIL,
            "the entry point refine_verl of the group verl.plugins is not installed",
            "pip install -e . (again: entry points are written at installation)",
        )
        return
    from refine_verl.plugin import PluginError
    from refine_verl.plugin import check_plugin as ask

    try:
        device = ask()
    except PluginError as error:
        yield Finding("verl plug-in", FAIL, str(error), "uninstall the other plug-in, or set VERL_PLATFORM")
        return
    yield Finding("verl plug-in", OK, f"loaded; verl's device is {device}")
