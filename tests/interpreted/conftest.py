"""fla's real Triton kernels, interpreted: `make test-kernels`, in a process of its own.

Triton decides when it is imported whether kernels are compiled or interpreted, so a run without ``TRITON_INTERPRET=1``
in its environment collects nothing here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from reference.interpreter import INTERPRETED, prepare

collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    prepare()


@pytest.fixture
def real() -> Iterator[Callable[[str], Any]]:
    """``real("module:attribute")``: fla's own, never one of this package's stand-ins."""
    from refine_verl.kernels.patch import cpu_kernels_in_use

    assert not cpu_kernels_in_use()

    def get(target: str) -> Any:
        module, name = target.split(":")
        return getattr(importlib.import_module(module), name)

    yield get
    assert not cpu_kernels_in_use()
