"""The estimate against bytes that real passes really held, counted by another counter."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from reference.live_bytes import LiveBytes
from transformers import AutoConfig

from refine_verl.config import NSPSettings
from refine_verl.models import Branches, Documents, RolloutDraws, load_model, make_actor, snapshot_count
from refine_verl.plan.hollow import STATES
from refine_verl.plan.memory import Shape, estimate_memory, pass_peaks

NSP = NSPSettings(chunks=2, rollout_length=3, rollouts_per_position=2)
WIDTH = {"hidden_size": 64, "num_heads": 2, "vocab_size": 300, "hidden_ratio": 4, "fuse_cross_entropy": False}
LACT = {
    "hidden_size": 64,
    "num_attn_heads": 4,
    "num_lact_heads": 2,
    "lact_chunk_size": 64,
    "window_size": 96,
    "w0_w2_low_rank": 4,
    "vocab_size": 300,
    "use_muon": True,
    "use_momentum": True,
    "rope_theta": 1e4,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "delta_net": WIDTH,
    "gated_deltanet": {**WIDTH, "head_dim": 32},
    "lact_swiglu": LACT,
}


def config_of(family: str, layers: int) -> Any:
    return AutoConfig.for_model(family, num_hidden_layers=layers, **FAMILIES[family])


def measured(config: Any, shape: Shape) -> dict[str, int]:
    """Peak bytes of rollouts and update with real numbers, positions one after the other at both ends of two chunks."""
    actor = make_actor(load_model(None, config=copy.deepcopy(config)), checkpoint_segments=shape.checkpoint_segments)
    for parameter in actor.parameters():
        parameter.grad = torch.zeros_like(parameter)
    rows, nsp = shape.update_rows, shape.nsp
    documents = Documents.from_tensors(torch.randint(0, 300, (rows, shape.length)), (shape.length,) * rows)
    written = Documents.from_tensors(
        torch.randint(0, 300, (shape.rollouts_of, shape.length)), (shape.length,) * shape.rollouts_of
    )
    sizes = (shape.rollouts_of, nsp.chunks, nsp.rollouts_per_position, nsp.rollout_length)
    draws = RolloutDraws(torch.rand(sizes[:2], dtype=torch.float64), torch.rand(sizes, dtype=torch.float64))
    with LiveBytes() as live:
        rollouts = actor(
            mode="rollout",
            documents=written,
            nsp=nsp,
            draws=draws,
            snapshots=snapshot_count(nsp.chunks, shape.length),
            read_together=shape.rollout_rows,
        )
    middle = (shape.length - nsp.rollout_length) // 2
    positions = torch.tensor([[0, 2 * middle - 1]]).repeat(rows, 1)
    branches, peak = Branches(positions, rollouts.tokens[:rows].clone()), live.peak
    del rollouts
    with LiveBytes() as live:
        output = actor(mode="update", documents=documents, branches=branches, nsp=nsp)
        (output["ntp_loss_sum"] + output["log_probs"].sum()).backward()
    return {"rollout": peak, "update": live.peak}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [("delta_net", False), ("delta_net", True), ("gated_deltanet", True), ("lact_swiglu", False)],
)
def test_within_fifteen_percent_of_real_passes(family: str, checkpointing: bool) -> None:
    """Deeper and longer than anything that is probed: both directions are extrapolated."""
    shape = Shape(length=450, nsp=NSP, checkpoint_segments=checkpointing)
    config = config_of(family, 3)
    estimated, real = pass_peaks(config, shape), measured(config, shape)
    for phase, value in real.items():
        assert sum(estimated[phase].values()) == pytest.approx(value, rel=0.15), phase


def test_more_documents_per_pass() -> None:
    shape = Shape(length=200, update_rows=3, rollout_rows=3, rollouts_of=6, nsp=NSP)
    config = config_of("delta_net", 2)
    estimated, real = pass_peaks(config, shape), measured(config, shape)
    for phase, value in real.items():
        assert sum(estimated[phase].values()) == pytest.approx(value, rel=0.15), phase
    single = measured(config, Shape(length=200, nsp=NSP))
    assert real["update"] > 2 * single["update"]  # the measurement can tell


def test_what_training_holds_between_steps() -> None:
    """Parameters, gradients and AdamW's states, by torch's own account."""
    config = config_of("delta_net", 2)
    model = load_model(None, config=config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    size = sum(p.untyped_storage().nbytes() for p in model.parameters())
    moments = sum(
        value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    )
    parts = estimate_memory(config, Shape(length=64, nsp=NSP)).phases["update"]
    assert (parts["parameters"], parts["gradients"], parts["optimiser"]) == (size, size, moments)


def test_workers_share_what_is_sharded_and_gather_the_rest() -> None:
    config = config_of("delta_net", 2)
    one, four = (estimate_memory(config, Shape(length=64, nsp=NSP, workers=workers)) for workers in (1, 4))
    for part in ("parameters", "gradients", "optimiser"):
        assert four.phases["update"][part] == pytest.approx(one.phases["update"][part] / 4, rel=0.01)
    assert four.phases["rollout"]["gathered"] == one.phases["rollout"]["gathered"] == 4 * one.parameters
    assert four.phases["update"]["activations"] == one.phases["update"]["activations"]


def test_on_a_gpu_activations_are_half_as_wide() -> None:
    """bf16 products; nothing here says how exact it is."""
    config = config_of("delta_net", 1)
    cpu, gpu = (pass_peaks(config, Shape(length=192, nsp=NSP, cuda=cuda))["update"] for cuda in (False, True))
    assert 0.3 < gpu["activations"] / cpu["activations"] < 0.9


def test_the_counter_of_this_test_counts() -> None:
    with LiveBytes() as live:
        kept = torch.zeros(1000)
        torch.zeros(500)
    assert live.peak == 6000 and live.now == 4000
    del kept
    assert live.now == 0


def test_states_are_counted_by_the_longest_document_there_may_be() -> None:
    """As workers count them: what is read may be shorter than data.max_length."""
    nsp = NSPSettings(chunks=2, rollout_length=2, rollouts_per_position=1)
    shape = Shape(length=12, nsp=nsp, cuda=True)
    states = [
        pass_peaks(config_of("delta_net", 1), dataclasses.replace(shape, longest=longest))["rollout"][STATES]
        for longest in (None, 12, 16, 4096)
    ]
    assert states[0] == states[1] < states[2] == states[3]  # 12 segments, and 8 in each of 2 chunks
