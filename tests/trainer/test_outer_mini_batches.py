"""How many optimiser steps the answers of a batch make, whatever those on its prompts are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference.prompt_ranks import columns, tokenised
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from refine_verl.compose.composition import compose_config, register_configs
from refine_verl.compose.validate import validate
from refine_verl.trainer.posttrain import PosttrainTrainer
from refine_verl.workers.objective import Objective

BASE = ("recipe=posttrain", "model=tiny_deltanet", "data.train_files=FILE", "trainer.n_gpus_per_node=1")
SIZES = ("data.train_batch_size=8", "refine.ppo_mini_batch_size=2", "trainer.device=cpu")


@pytest.mark.parametrize(("overrides", "size"), [((), 2), (("refine.outer_mini_batch_size=8",), 8)])
def test_rows_of_a_mini_batch(overrides: tuple[str, ...], size: int) -> None:
    """Two rows are four optimiser steps on 8 rows, eight rows are one, as in the authors' code."""
    register_configs()
    trainer = PosttrainTrainer(validate(compose_config([*BASE, *SIZES, *overrides])).config)
    trainer.global_steps, sent = 1, []

    class Group:
        world_size = 1

        def update(self, data: TensorDict) -> Any:
            sent.append(tu.get(data, "mini_batch_size"))
            metrics = {"grad_norm": [1.0], "lr": [0.1], "perf/max_memory_allocated_gb": [0.0], "forward_tokens": [1.0]}
            return Done(tu.get_tensordict(tensor_dict={}, non_tensor_dict={"metrics": metrics}))

    trainer.actor_rollout_wg = Group()
    rows = columns(tokenised(8, 1))
    trainer._imitate(rows, {}, {})
    trainer._update(trainer.prompts(rows), Objective.DOCUMENTS, {})
    trainer.answer, trainer.texts, trainer.scores = answered, lambda _: [["a", "b"]] * 8, lambda *_: {"score": 1.0}
    trainer._reinforce(rows, {}, {})
    assert sent == [size, 2, size]


class Done:
    def __init__(self, value: Any) -> None:
        self.get = lambda: value


def answered(*_: Any, **__: Any) -> tuple[TensorDict, float]:
    """Two answers of one token to each prompt."""
    shape = (8, 2, 1)
    tensors = {
        "answer_tokens": torch.full(shape, 97),
        "answer_lengths": torch.ones(shape[:2], dtype=torch.int64),
        "old_log_probs": torch.zeros(shape),
    }
    return TensorDict(tensors, batch_size=8), 0.0
