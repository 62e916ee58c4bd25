"""Versions as a run writes them down."""

from __future__ import annotations

import importlib.metadata
import sys
from types import SimpleNamespace

import pytest
import torch

from refine_verl.record.versions import installed_versions


def test_the_build_of_torch_is_named() -> None:
    """The usual build's metadata has no `+cu130`, that of the CPU build has its `+cpu`."""
    assert installed_versions(["torch"]) == {"torch": torch.__version__}


@pytest.mark.parametrize(
    ("loaded", "named"),
    [
        ({"__version__": "2.13.0+cu130"}, "2.13.0+cu130"),
        ({"__version__": "2.13.0"}, "2.13.0"),
        ({"__version__": "2.13.01"}, "2.13.0"),  # not a build of it
        ({"__version__": "2.1"}, "2.13.0"),  # a copy of its own, or a number for something else
        ({}, "2.13.0"),
        (None, "2.13.0"),
    ],
)
def test_only_a_build_of_the_installed_version_is_believed(
    loaded: dict[str, str] | None, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.13.0")
    monkeypatch.setitem(sys.modules, "some_package", None if loaded is None else SimpleNamespace(**loaded))
    assert installed_versions(["some_package"]) == {"some_package": named}


def test_what_is_not_installed_is_left_out() -> None:
    assert installed_versions(["no-such-package", "numpy"]).keys() == {"numpy"}
