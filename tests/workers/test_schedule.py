"""The learning rate of a run: what is reported of a step is what it was made with, and every step is made with some."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from verl.workers.config.optimizer import FSDPOptimizerConfig
from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

from refine_verl.workers.engine import RefineEngine
from refine_verl.workers.schedule import warmup_steps

LR = 0.5


def engine(kind: type[FSDPEngine] = RefineEngine, **optim: Any) -> FSDPEngine:
    """With an optimiser of one weight, and no model."""
    made = kind.__new__(kind)
    made.rank = 1
    made.optimizer_config = FSDPOptimizerConfig(lr=LR, **{"total_training_steps": 8, **optim})
    made.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=LR)
    made.lr_scheduler = made._build_lr_scheduler(made.optimizer)
    return made


def moved(made: FSDPEngine) -> float:
    """How far a gradient of 1 moves the weight: the learning rate that is really used."""
    (weight,) = made.optimizer.param_groups[0]["params"]
    before = weight.item()
    weight.grad = torch.ones(1)
    made.optimizer.step()
    return before - weight.item()


def rates(made: FSDPEngine, steps: int = 8) -> tuple[list[float], list[float]]:
    """Used and reported."""
    pairs = [(moved(made), made.lr_scheduler_step()) for _ in range(steps)]
    return [used / LR for used, _ in pairs], [reported / LR for _, reported in pairs]


def test_warm_up_has_no_dead_step_and_reports_what_it_used() -> None:
    used, reported = rates(engine(lr_warmup_steps=4))
    assert reported == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert used == pytest.approx(reported, abs=1e-6)


def test_verls_own_first_step_is_dead_and_it_reports_the_next() -> None:
    """The control."""
    used, reported = rates(engine(FSDPEngine, lr_warmup_steps=4), 4)
    assert used[0] == 0 and used == pytest.approx([0, 0.25, 0.5, 0.75], abs=1e-6) and reported == [0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize("zero_indexed", [True, False])
@pytest.mark.parametrize("warmup", [{"lr_warmup_steps": 3}, {"lr_warmup_steps_ratio": 0.375}])
def test_a_cosine_warms_up_too_and_falls_as_it_did(warmup: dict[str, Any], zero_indexed: bool) -> None:
    optim = {"lr_scheduler_type": "cosine", "zero_indexed_step": zero_indexed, **warmup}
    used, reported = rates(engine(**optim))
    assert reported[:3] == pytest.approx([1 / 3, 2 / 3, 1]) and used == pytest.approx(reported, abs=1e-6)
    assert reported[3:] == pytest.approx(rates(engine(FSDPEngine, **optim))[0][3:], abs=1e-6)


@pytest.mark.parametrize("kind", ["constant", "cosine"])
def test_without_warm_up_nothing_differs_from_verls(kind: str) -> None:
    mine, theirs = (rates(engine(one, lr_scheduler_type=kind))[0] for one in (RefineEngine, FSDPEngine))
    assert mine == theirs


def test_several_updates_of_a_step_have_one_rate() -> None:
    made = engine(lr_warmup_steps=2)
    assert isinstance(made, RefineEngine)
    made.hold_learning_rate = True
    assert made.lr_scheduler_step() == made.lr_scheduler_step() == LR / 2
    made.hold_learning_rate = False
    assert made.lr_scheduler_step() == LR / 2 and made.lr_scheduler_step() == LR


@pytest.mark.parametrize("saved_by", [RefineEngine, FSDPEngine])
def test_a_run_resumes_within_its_warm_up(saved_by: type[FSDPEngine]) -> None:
    """Also from a checkpoint of verl's schedule, whose next step has the rate that was meant for it."""
    before, after = engine(saved_by, lr_warmup_steps=4), engine(lr_warmup_steps=4)
    rates(before, 2)
    after.lr_scheduler.load_state_dict(before.lr_scheduler.state_dict())
    after.optimizer.load_state_dict(before.optimizer.state_dict())
    assert rates(after, 3)[1] == [0.75 if saved_by is RefineEngine else 0.5, 1, 1]


@pytest.mark.parametrize(("given", "steps"), [((-1, 0.0), 0), ((0, 0.3), 2), ((5, 0.3), 5), ((-1, 1.0), 8)])
def test_how_long_it_is(given: tuple[int, float], steps: int) -> None:
    optim = FSDPOptimizerConfig(lr_warmup_steps=given[0], lr_warmup_steps_ratio=given[1], total_training_steps=8)
    assert warmup_steps(optim) == steps
