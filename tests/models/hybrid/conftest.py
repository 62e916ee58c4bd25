"""Small hybrids of every family."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from reference.hybrid import FAMILIES, fla_attention, hybrid_actor, precise

from refine_verl.models import FastWeightActor
from refine_verl.models import adapters as adapters_module


@pytest.fixture(autouse=True)
def own_forward_functions() -> Iterator[None]:
    """Of fla's hybrids, too, can be called."""
    with fla_attention():
        yield


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything; and documents are long enough to be cut."""
    monkeypatch.setattr(adapters_module, "TOKENS_PER_PIECE", 64)
    with precise():
        yield


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make(family: str) -> Callable[..., FastWeightActor]:
    """``make(**of_make_actor)`` -> the same actor every time."""
    return lambda **kwargs: hybrid_actor(family, **kwargs)
