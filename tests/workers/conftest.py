"""What one rank and two ranks compute on the same batches, once for all tests here."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from reference.ranks import run_ranks
from reference.runs import toy_overrides

OVERRIDES = (
    "refine.warmup_steps=0",
    "refine.nsp.rollouts_per_position=2",
    # two optimiser steps a step, so the second sees a policy that has moved
    "refine.ppo_mini_batch_size=4",
    # with this epsilon Adam's step is nearly proportional to the gradient: differences stay as small as they were
    "+actor_rollout_ref.actor.optim.override_optimizer_config.eps=1.0",
)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Results by number of ranks; see `reference.ranks.scenarios`."""
    directory = tmp_path_factory.mktemp("ranks")
    overrides = toy_overrides(directory, directory / "run", *OVERRIDES)
    with ThreadPoolExecutor() as pool:
        started = {world: pool.submit(run_ranks, world, directory / str(world), overrides) for world in (1, 2)}
        return {world: future.result() for world, future in started.items()}
