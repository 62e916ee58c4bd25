"""The operators of all supported families against token loops in float64: values, final states, all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference.delta_rule import write_norms_reference
from reference.fla_operators import OPERATORS, Case, Inputs, told_of_writes
from torch import Tensor

from refine_verl.kernels.cuts import Cuts
from refine_verl.kernels.operators import recorded
from refine_verl.kernels.recording import record_states
from refine_verl.kernels.writes import DELTA_RULES

TOLERANCE = 3e-5
"""Relative, of each tensor as a whole. The kernels compute in float32; 7e-6 is the largest error seen."""
WRONG = 1e-3
"""Thirty times as much, and less than any of the mistakes below changes."""

LENGTHS = {"plain": None, "packed": [0, 1, 71, 100]}


def relative(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def measured(outputs: tuple[Tensor, Tensor], inputs: Inputs | None) -> list[Tensor]:
    """Outputs, final states, and the gradient of a random linear loss for every input."""
    if inputs is None:
        return [x.detach() for x in outputs]
    gen = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=gen).to(x.dtype)).sum() for x in outputs)
    return [x.detach() for x in (*outputs, *torch.autograd.grad(loss, list(inputs.values())))]


def make(case: Case, cu: list[int] | None, tokens: int) -> Inputs:
    batch, sequences = (2, 2) if cu is None else (1, len(cu) - 1)
    inputs = case.make(torch.Generator().manual_seed(0), batch, tokens, sequences)
    return {name: x.requires_grad_() for name, x in inputs.items()}


def run(case: Case, operator: Callable[..., Any], inputs: Inputs, cu: list[int] | None) -> list[Tensor]:
    bounds = None if cu is None else torch.tensor(cu)
    with torch.set_grad_enabled(case.backward):
        outputs = operator(**inputs, **case.flags, output_final_state=True, cu_seqlens=bounds)
    return measured(outputs, inputs if case.backward else None)


def expected(case: Case, inputs: Inputs, cu: list[int] | None) -> list[Tensor]:
    wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    return measured(case.reference(wide, cu), wide if case.backward else None)


def damaged(inputs: Inputs) -> dict[str, Inputs]:
    """Inputs with one small mistake each."""
    other_token = inputs["k"].detach().clone()
    other_token[:, 0] = other_token[:, 1]
    return {
        "no state": {**inputs, "initial_state": torch.zeros_like(inputs["initial_state"])},
        "a token": {**inputs, "k": other_token},
    }


@pytest.mark.parametrize("layout", LENGTHS)
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_equals_the_token_loop(name: str, layout: str, real: Callable[[str], Any]) -> None:
    case, cu = OPERATORS[name], LENGTHS[layout]
    inputs = make(case, cu, 100)
    got, wanted = run(case, real(case.target), inputs, cu), expected(case, inputs, cu)
    names = ["outputs", "final states", *(inputs if case.backward else ())]
    errors = {name: relative(*pair) for name, *pair in zip(names, got, wanted, strict=True)}
    assert max(errors.values()) < TOLERANCE, errors
    for mistake, wrong in damaged(inputs).items():
        assert relative(got[0], expected(case, wrong, cu)[0]) > WRONG, mistake


@pytest.mark.parametrize("layout", LENGTHS)
@pytest.mark.parametrize("name", [name for name, case in OPERATORS.items() if case.target.split(":")[1] in DELTA_RULES])
def test_norms_of_writes_are_those_of_the_token_loop(name: str, layout: str, real: Callable[[str], Any]) -> None:
    case, cu = OPERATORS[name], LENGTHS[layout]
    inputs = {key: x.detach() for key, x in make(case, cu, 100).items() if key != "initial_state"}
    lengths = [100, 100] if cu is None else [stop - start for start, stop in zip(cu, cu[1:], strict=False)]
    with torch.no_grad(), record_states(Cuts.even(lengths, 2, torch.device("cpu"))) as recorder:
        bounds = None if cu is None else torch.tensor(cu)
        recorded(real(case.target))(**inputs, **case.flags, output_final_state=True, cu_seqlens=bounds)
        got = recorder.write_norms()[0]
    told = told_of_writes({key: x.double() for key, x in inputs.items()}, case.flags)
    assert relative(got, write_norms_reference(**told, l2norm=True, cu_seqlens=cu)) < TOLERANCE
    wrong = {**told, "beta": 0.99 * told["beta"]}
    assert relative(got, write_norms_reference(**wrong, l2norm=True, cu_seqlens=cu)) > WRONG
