"""The estimate against bytes that real passes really held, counted by another counter."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from reference.live_bytes import LiveBytes
from reference.toy import InSegments
from transformers import AutoConfig, AutoModelForCausalLM

from refine_verl.config import LoraSettings, NSPSettings, RolloutLength
from refine_verl.models import Branches, Documents, RolloutDraws, load_model, make_actor, snapshot_count
from refine_verl.models.lora import add_adapters, trainable_numbers
from refine_verl.plan.hollow import STATES
from refine_verl.plan.memory import Shape, _probe, _state_parts, estimate_memory, pass_peaks

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
    "qwen3_next": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 48,
        "vocab_size": 300,
    },
    "olmo_hybrid": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 32,
        "intermediate_size": 160,
        "vocab_size": 300,
        "pad_token_id": None,
        "eos_token_id": None,
    },
}


HYBRIDS = ("olmo_hybrid", "qwen3_next")


def config_of(family: str, layers: int) -> Any:
    kinds = {"layer_types": ["linear_attention", "full_attention"] * (layers // 2)} if family in HYBRIDS else {}
    return AutoConfig.for_model(family, num_hidden_layers=layers, **kinds, **FAMILIES[family])


def measured(config: Any, shape: Shape) -> dict[str, int]:
    """Peak bytes of rollouts and update with real numbers, positions one after the other at both ends of two chunks."""
    actor = make_actor(
        load_model(None, config=copy.deepcopy(config)),
        activation_checkpointing=shape.activation_checkpointing,
        balance_coef=shape.balance_coef,
    )
    if shape.lora.lora_rank:
        add_adapters(actor, shape.lora, seed=0)
    for parameter in actor.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    rows, nsp = shape.update_rows, shape.nsp
    documents = Documents.from_tensors(torch.randint(0, 300, (rows, shape.length)), (shape.length,) * rows)
    written = Documents.from_tensors(
        torch.randint(0, 300, (shape.rollouts_of, shape.length)), (shape.length,) * shape.rollouts_of
    )
    sizes = (shape.rollouts_of, nsp.chunks, nsp.rollouts_per_position, nsp.rollout_length)
    draws = RolloutDraws(torch.rand(sizes[:2], dtype=torch.float64), torch.rand(sizes, dtype=torch.float64))
    how = {"nsp": nsp, "draws": draws, "snapshots": snapshot_count(nsp.chunks, shape.length)}
    if shape.on_policy:
        with LiveBytes() as live:
            _, output = actor(mode="on_policy", documents=documents, **how)
            (output["ntp_loss_sum"] + output["log_probs"].sum()).backward()
        return {"update": live.peak}
    with LiveBytes() as live:
        rollouts = actor(mode="rollout", documents=written, read_together=shape.rollout_rows, **how)
    middle = (shape.length - nsp.rollout_length) // 2
    positions = torch.tensor([[0, 2 * middle - 1]]).repeat(rows, 1)
    branches, peak = Branches(positions, rollouts.tokens[:rows].clone()), live.peak
    del rollouts
    with LiveBytes() as live:
        output = actor(mode="update", documents=documents, branches=branches, nsp=nsp)
        loss = output["ntp_loss_sum"] + output["log_probs"].sum()
        (loss + output["balance_loss_sum"] if shape.balance_coef else loss).backward()
    return {"rollout": peak, "update": live.peak}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "checkpointing", "on_policy"),
    [
        ("delta_net", "none", False),
        ("delta_net", "none", True),
        ("delta_net", "layer", False),
        ("delta_net", "segment", False),
        ("gated_deltanet", "layer", True),
        ("lact_swiglu", "none", False),
        ("lact_swiglu", "layer", False),
        ("olmo_hybrid", "layer", True),
        ("qwen3_next", "layer", False),
    ],
)
def test_within_fifteen_percent_of_real_passes(family: str, checkpointing: str, on_policy: bool) -> None:
    """Deeper and longer than anything that is probed: both directions are extrapolated."""
    shape = Shape(length=450, nsp=NSP, activation_checkpointing=checkpointing, on_policy=on_policy)
    config = config_of(family, 6 if family in HYBRIDS else 3)
    estimated, real = pass_peaks(config, shape), measured(config, shape)
    for phase, value in real.items():
        assert sum(estimated[phase].values()) == pytest.approx(value, rel=0.15), phase


def test_a_load_balance_loss_is_counted() -> None:
    config = config_of("qwen3_next", 2)
    config.num_experts, config.num_experts_per_tok = 64, 1
    plain, balanced = (Shape(length=150, nsp=NSP, balance_coef=coef) for coef in (0.0, 0.1))
    estimated, real = (pass_peaks(config, balanced)["update"], measured(config, balanced)["update"])
    assert sum(estimated.values()) == pytest.approx(real, rel=0.15)
    more = sum(estimated.values()) - sum(pass_peaks(config, plain)["update"].values())
    assert more >= 2 * 150 * 64 * 4  # the probabilities of each router, float32


@pytest.mark.slow
@pytest.mark.parametrize(("family", "checkpointing"), [("delta_net", "none"), ("olmo_hybrid", "layer")])
def test_with_adapters_too(family: str, checkpointing: str) -> None:
    shape = Shape(length=450, nsp=NSP, activation_checkpointing=checkpointing, lora=LoraSettings(lora_rank=4))
    config = config_of(family, 6 if family in HYBRIDS else 3)
    estimated, real = pass_peaks(config, shape), measured(config, shape)
    for phase, value in real.items():
        assert sum(estimated[phase].values()) == pytest.approx(value, rel=0.15), phase


@pytest.mark.parametrize("family", FAMILIES)
def test_what_adapters_leave_of_the_optimiser_and_of_a_snapshot(family: str) -> None:
    config, lora = config_of(family, 2), LoraSettings(lora_rank=2)
    full = estimate_memory(config, Shape(length=64, nsp=NSP, workers=2, resets=True))
    small = estimate_memory(config, Shape(length=64, nsp=NSP, workers=2, resets=True, lora=lora))
    model = load_model(None, config=copy.deepcopy(config))
    add_adapters(model, lora, seed=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert small.trained == trained and small.parameters == full.parameters + trained
    assert small.base_parameters == full.base_parameters == full.parameters
    own = -(-trained // 2) * 4
    assert small.snapshot == own and full.snapshot == -(-full.parameters // 2) * 4
    assert small.phases["optimiser"]["optimiser"] == 2 * own and small.phases["update"]["gradients"] == own


def test_a_snapshot_of_adapters_is_two_percent_of_a_full_one_at_most() -> None:
    """DeltaNet-1.3B with adapters of rank 16: what is kept aside to return to."""
    config = AutoConfig.for_model("delta_net", hidden_size=2048, num_hidden_layers=24, num_heads=16, vocab_size=32000)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    full = trainable_numbers(model, LoraSettings())
    assert full > 1.3e9 and trainable_numbers(model, LoraSettings(lora_rank=16)) < 0.02 * full


def test_the_state_of_a_hybrid_grows_by_its_keys_and_values() -> None:
    """One layer of attention of two: 2 x 2 heads of 16 numbers for each token."""
    config = config_of("olmo_hybrid", 2)
    (fixed, short), (same, long) = (_state_parts(config, Shape(length=length, nsp=NSP)) for length in (100, 300))
    assert (short, long) == (100 * 2 * 2 * 16 * 4, 300 * 2 * 2 * 16 * 4)
    assert (
        fixed == same == (4 * 16 * 32 + 4 * (16 + 16 + 32) * 4) * 4
    )  # recurrent states, and four inputs of convolutions


def test_more_documents_per_pass() -> None:
    shape = Shape(length=200, update_rows=3, rollout_rows=3, rollouts_of=6, nsp=NSP)
    config = config_of("delta_net", 2)
    estimated, real = pass_peaks(config, shape), measured(config, shape)
    for phase, value in real.items():
        assert sum(estimated[phase].values()) == pytest.approx(value, rel=0.15), phase
    single = measured(config, Shape(length=200, nsp=NSP))
    assert real["update"] > 2 * single["update"]  # the measurement can tell


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointing", "on_policy"), [("none", False), ("none", True), ("layer", False)])
def test_pieces_of_rollouts(checkpointing: str, on_policy: bool) -> None:
    """The forks of a piece and what it keeps are counted, not those of all 64 rollouts."""
    config, found = config_of("delta_net", 2), []
    for together in (64, 16):
        nsp = dataclasses.replace(NSP, rollouts_per_position=32, rollouts_together=together)
        shape = Shape(length=50, nsp=nsp, activation_checkpointing=checkpointing, on_policy=on_policy)
        estimated, real = pass_peaks(config, shape), measured(config, shape)
        for phase, value in real.items():
            assert sum(estimated[phase].values()) == pytest.approx(value, rel=0.15), phase
        found.append(real)
    assert all(found[1][phase] < 0.6 * found[0][phase] for phase in found[0])


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


def test_gradients_that_are_measured_are_held_beside_their_own() -> None:
    config = config_of("delta_net", 2)
    plain, more = (estimate_memory(config, Shape(length=64, nsp=NSP, gradients_held=held)) for held in (0, 2))
    assert "measured" not in plain.phases and {**more.phases, "measured": 0} == {**plain.phases, "measured": 0}
    assert more.phases["measured"] == {**plain.phases["update"], "gradients": 3 * plain.phases["update"]["gradients"]}


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


def test_what_reading_keeps_on_a_gpu() -> None:
    """fla's operators are cut: k, v, beta and the convolutions' inputs in bf16, for every token of a pass."""
    config, width = config_of("delta_net", 1), WIDTH["hidden_size"]
    short, long = (
        pass_peaks(config, Shape(length=length, nsp=NSP, cuda=True))["rollout"][STATES] for length in (256, 512)
    )
    per_token = (long - short) / 256
    assert 5 * width * 2 <= per_token <= 5.5 * width * 2


def test_reading_in_segments_keeps_the_states_between_them() -> None:
    """Not what they could be had from at every token: what grows with the document is its hidden states."""
    nsp, config = NSPSettings(chunks=2, rollout_length=2), config_of("delta_net", 24)
    whole, cut = (
        [
            sum(pass_peaks(config, Shape(length=length, nsp=nsp, cuda=True, reading=reading))["rollout"].values())
            for length in (8192, 16384)
        ]
        for reading in ("whole", "segments")
    )
    assert cut[0] < 0.5 * whole[0] and cut[1] - cut[0] < 0.4 * (whole[1] - whole[0])


@pytest.mark.parametrize(
    ("family", "length", "checkpointing", "error"),
    [("delta_net", 16384, "none", 0.05), ("delta_net", 16384, "segment", 0.05), ("lact_swiglu", 2600, "layer", 0.1)],
)
def test_fewer_layers_and_shorter_documents_say_what_a_gpu_needs(
    family: str, length: int, checkpointing: str, error: float
) -> None:
    """Against a run of all layers at the real length; two lengths that were too short once gave three times as much."""
    config = config_of(family, 4)
    # of LaCT's chunks few, and of a vocabulary's logits a chunk that is full long before the document's end
    config.lact_chunk_size, config.vocab_size = 512, 150_000
    shape = Shape(length=length, nsp=NSP, cuda=True, activation_checkpointing=checkpointing)
    for phase, parts in pass_peaks(config, shape).items():
        whole = max(sum(moment.values()) for moment in _probe(config, 4, shape)[phase].values())
        assert sum(parts.values()) == pytest.approx(whole, rel=error), phase


def test_states_are_counted_by_the_longest_document_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """As workers count them where documents are read in segments: what is read may be shorter than data.max_length."""
    monkeypatch.setattr("refine_verl.plan.memory.adapter_for", lambda _: InSegments())
    nsp = NSPSettings(chunks=2, rollout_length=2, rollouts_per_position=1)
    shape = Shape(length=12, nsp=nsp, cuda=True)
    states = [
        pass_peaks(config_of("delta_net", 1), dataclasses.replace(shape, longest=longest))["rollout"][STATES]
        for longest in (None, 12, 16, 4096)
    ]
    assert states[0] == states[1] < states[2] == states[3]  # 12 segments, and 8 in each of 2 chunks


def test_rollouts_of_unequal_length_have_room_for_the_longest() -> None:
    config = config_of("delta_net", 1)
    three, *others = (
        pass_peaks(config, Shape(length=64, nsp=dataclasses.replace(NSP, rollout_length=length)))
        for length in (3, *(RolloutLength(min=1, max=3, by=by) for by in ("entropy", "sentence")))
    )
    for other in others:
        for phase, parts in three.items():
            assert sum(other[phase].values()) == pytest.approx(sum(parts.values()), rel=0.01), phase


@pytest.mark.parametrize(
    ("family", "cuda"), [("gated_deltanet", True), ("gated_deltanet", False), ("olmo_hybrid", True)]
)
def test_what_is_asked_for_surprise_is_counted(family: str, cuda: bool) -> None:
    config = config_of(family, 2)
    plain, asked = (
        pass_peaks(config, Shape(length=300, nsp=NSPSettings(chunks=2, selection=selection), cuda=cuda))["rollout"]
        for selection in ("entropy", "surprise")
    )
    assert sum(plain.values()) <= sum(asked.values()) <= 1.2 * sum(plain.values())
