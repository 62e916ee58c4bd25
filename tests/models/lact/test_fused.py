"""LaCT's fused step is its step of two phases, in float64 with all gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from models.test_fork_equals_prefix import NSP, RELATIVE, assert_same_step, documents_of, relative
from models.test_on_policy import step

from refine_verl.models import FastWeightActor


@pytest.mark.parametrize("checkpointing", ["none", "layer", "segment"])
def test_the_fused_step_is_the_step(make: Callable[..., FastWeightActor], checkpointing: str) -> None:
    documents = documents_of((40, 33))
    fused = step(make(activation_checkpointing=checkpointing), documents, NSP, fused=True)
    assert_same_step(fused, step(make(), documents, NSP, fused=False))


def test_eight_rollouts_and_gradients_that_end_at_the_branch(make: Callable[..., FastWeightActor]) -> None:
    documents, nsp = documents_of((29,)), replace(NSP, rollouts_per_position=8, grad_scope="branch")
    assert_same_step(step(make(), documents, nsp, fused=True), step(make(), documents, nsp, fused=False))


def test_other_draws_differ(make: Callable[..., FastWeightActor]) -> None:
    """Negative control."""
    one, other = (step(make(), documents_of((40,)), NSP, fused=True, seed=seed) for seed in (0, 1))
    assert max(relative(one[1][name], other[1][name]) for name in one[1]) > 1e-3 > RELATIVE
