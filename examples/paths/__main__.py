"""The way through a star-shaped graph: REFINE against the next-token loss where teacher forcing is known to fail.

    python -m examples.paths              # two seeds: its part of docs/results.md
    python -m examples.paths --fast       # one seed, fewer steps: below outputs/paths/fast

A run that was cut resumes where it was. The machinery is that of the example on recall.
"""

from __future__ import annotations

from collections.abc import Sequence

from examples.recall.__main__ import Example, main
from examples.recall.jobs import Amount, Job

FULL = Amount(seeds=2)
FAST = Amount(seeds=1, steps=10, ablation_steps=5, held_out=64)


def jobs(models: Sequence[str], amount: Amount) -> list[Job]:
    """Base models, and training from their plateau, where all but the first step of a way is known."""
    found = []
    for model in models:
        found += [Job("base", model, seed) for seed in range(amount.seeds)]
        found += [Job("signal", model, seed, "plateau") for seed in range(amount.seeds)]
    return found


PATHS = Example("paths", ("paths",), jobs, FULL, FAST, __doc__)

if __name__ == "__main__":
    main(example=PATHS)
