"""Run by `test_placement` in a process of its own: how often the host waits for a second device.

In the passes of an actor, and in a micro-batch that engine and loss train.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from placement.cases import (  # noqa: F401  the fixture
    DEVICE,
    IN_PIECES,
    MODES,
    actor_of,
    documents_on,
    kernels,
    on_policy,
)
from placement.device import Waits, counted_waits
from reference.toy import NSP, VOCABULARY, documents_of
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig

from refine_verl.config import LossSettings, RolloutLength
from refine_verl.models.reward_manager import HiddenStateRewardManager
from refine_verl.workers import engine as engine_module
from refine_verl.workers import objective as objective_module
from refine_verl.workers import worker as worker_module
from refine_verl.workers.engine import RefineEngine
from refine_verl.workers.loss import RefineLoss
from refine_verl.workers.objective import Objective, tokens_to_learn
from refine_verl.workers.worker import NSPRolloutWorker

READS = {
    "rollout": 1,
    "rollout_in_pieces": 1,
    "update": 1,
    "update_in_pieces": 1,
    "on_policy": 1,
    "score": 0,
    "generate": 5,
    "answer_log_probs": 1,
}
"""The entropies or positions, once; after each token of an answer whether it was the last; the lengths of answers."""


def of_passes(waits: Counter[str]) -> Counter[str]:
    """Without those of the stand-ins, whose plans are made on the CPU, and of the tests."""
    ours = ("kernels/chunking.py", "placement/cases.py", "placement/waits.py")
    return Counter({line: count for line, count in waits.items() if not line.startswith(ours)})


@pytest.mark.parametrize("checkpointing", ["none", "layer"])
@pytest.mark.parametrize("documents", [1, 3])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("family", IN_PIECES)
def test_the_host_waits_once_a_pass(family: str, mode: Callable[..., Any], documents: int, checkpointing: str) -> None:
    actor = actor_of(family, DEVICE, checkpointing)
    made = documents_on(DEVICE, (40, 33, 51)[:documents])
    with counted_waits() as waits:
        mode(actor, made)
    expected = READS[mode.__name__]
    if mode is on_policy and checkpointing == "layer":
        expected += 1  # S is read once more, where the positions are known
    assert of_passes(waits.reads).total() == expected, waits.reads
    assert not of_passes(waits.uploads), waits.uploads


VERLS = 3
"""verl's policy loss looks at three of its metrics."""


def trained_by_worker(family: str, objective: Objective, monkeypatch: pytest.MonkeyPatch, **nsp: Any) -> Waits:
    """A micro-batch of three documents, as it comes from the driver, through engine and loss to its gradients."""
    settings, rows = replace(NSP, **nsp), 3
    worker: Any = NSPRolloutWorker.__new__(NSPRolloutWorker)
    worker.engine = engine = RefineEngine.__new__(RefineEngine)
    engine.module, engine.nsp = actor_of(family, DEVICE), settings
    engine.on_policy_pass = worker._on_policy_pass
    worker.settings = SimpleNamespace(
        refine=SimpleNamespace(nsp=settings), seed=0, rollout_micro_batch_size=2, max_length=60,
        algorithm={"adv_estimator": "grpo", "norm_adv_by_std_in_grpo": True},
    )  # fmt: skip
    worker.rewards, worker.written, worker.reward_seconds = HiddenStateRewardManager("hybrid"), [], 0.0
    monkeypatch.setattr(engine_module, "get_device_id", lambda: DEVICE)
    monkeypatch.setattr(worker_module, "get_torch_device", lambda: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(RefineEngine, "get_data_parallel_group", lambda self: None)
    made = documents_of((40, 33, 51))
    shape = (rows, settings.chunks, settings.rollouts_per_position, settings.longest_rollout)
    generator = torch.Generator().manual_seed(4)
    tensors = {
        "tokens": made.tokens,
        "lengths": torch.tensor(made.lengths),
        "weight": torch.tensor([1.0, 1.0, 0.0]),
        "document_id": torch.arange(rows),
        "row": torch.arange(rows),
        "positions": torch.tensor([[3, 11, 27]] * rows),
        "rollout_tokens": torch.randint(0, VOCABULARY, shape, generator=generator),
        "old_log_probs": -torch.rand(shape, generator=generator),
        "advantages": torch.randn(shape, generator=generator),
    }
    others = {
        "objective": objective, "global_step": 1, "rollouts_per_row": shape[1] * shape[2], "rollout_length": shape[3],
        "batch_num_tokens": 500, "global_rollouts": 100, "global_rollout_tokens": 100 * shape[3],
    }  # fmt: skip
    data = tu.get_tensordict(tensor_dict=tensors, non_tensor_dict=others)
    data["loss_mask"] = tokens_to_learn(data)
    actor = ActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio=0.2, clip_ratio_low=0.2,
        clip_ratio_high=0.2,
    )  # fmt: skip
    with counted_waits() as waits:
        loss, output = engine.forward_step(data, RefineLoss(LossSettings(), actor), forward_only=False)
        loss.backward()
    assert output["metrics"]["actor/pg_loss"].values and all(p.grad is not None for p in engine.module.parameters())
    return waits


@pytest.mark.parametrize("family", IN_PIECES)
def test_an_update_waits_for_its_metrics_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them at once; the next micro-batch is prepared while the device is busy with the backward pass."""
    waits = trained_by_worker(family, Objective.ROLLOUTS, monkeypatch)
    assert of_passes(waits.reads).total() == 1 + VERLS, waits.reads
    assert not of_passes(waits.uploads), waits.uploads


@pytest.mark.parametrize("lengths", [4, RolloutLength(min=1, max=4, by="entropy")], ids=["k", "unequal"])
@pytest.mark.parametrize("family", IN_PIECES)
def test_a_fused_step_waits_for_what_it_decides_by(family: str, lengths: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entropies, the rewards, and its metrics."""
    waits = trained_by_worker(family, Objective.ON_POLICY, monkeypatch, rollout_length=lengths)
    assert of_passes(waits.reads).total() == 2 + 1 + VERLS, waits.reads
    assert not of_passes(waits.uploads), waits.uploads


# Negative controls


def test_a_batch_that_is_moved_whole_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective_module, "ON_HOST", frozenset())
    waits = trained_by_worker("delta_net in pieces", Objective.ROLLOUTS, monkeypatch)
    assert of_passes(waits.reads).total() > 1 + VERLS + 3


def test_looking_at_a_value_is_counted() -> None:
    x = torch.arange(6).to(DEVICE, non_blocking=True)
    looks = [
        lambda: x[0].item(),
        lambda: x.tolist(),
        lambda: bool((x > 1).any()),
        lambda: x.cpu(),
        lambda: x[x > 2],
        lambda: x.nonzero(),
        lambda: float(x.sum()),
    ]
    for look in looks:
        with counted_waits() as waits:
            look()
        assert waits.reads.total() == 1 and not waits.uploads
    for move in (
        lambda: torch.tensor([1], device=DEVICE),
        lambda: torch.zeros(2).to(DEVICE),
        lambda: x[torch.tensor([1])],
    ):
        with counted_waits() as waits:
            move()
        assert waits.uploads.total() == 1 and not waits.reads
    with counted_waits() as waits:
        x[torch.arange(2, device=DEVICE)] + 1
    assert not waits.reads and not waits.uploads
