"""The learning rate's schedule: verl's, but warm-up begins with a step that trains."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_steps(optim: Any) -> int:
    """Steps of warm-up, by verl's rule: ``lr_warmup_steps``, or else a share of all steps.

    Args:
        optim: verl's section, with ``total_training_steps``.
    """
    if optim.lr_warmup_steps > 0:
        return int(optim.lr_warmup_steps)
    return int(optim.lr_warmup_steps_ratio * optim.total_training_steps)


def rising_from_the_first_step(scheduler: LambdaLR, optimizer: Optimizer, steps: int) -> LambdaLR:
    """A schedule in whose warm-up step i, from 0, has (i + 1) / ``steps`` of the learning rate.

    verl's has i / ``steps``: a first step that changes nothing. After the warm-up, and without one, nothing differs;
    nor does what a checkpoint holds of it.

    Args:
        scheduler: verl's, of this optimiser, at its beginning.
        optimizer: its only parameter group has the rate.
        steps: of warm-up.
    """
    if steps == 0:
        return scheduler
    (schedule,) = scheduler.lr_lambdas
    return LambdaLR(optimizer, lambda step: (step + 1) / steps if step < steps else schedule(step))
