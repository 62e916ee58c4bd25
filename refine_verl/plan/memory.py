"""Peak memory of a training process, part by part, before there is one.

What the passes keep is counted by making them with fake tensors (`refine_verl.plan.hollow`): the model's own code, the
real widths, but few layers and mostly short documents. Peaks are linear in both, so few such runs give the rest.
Parameters, gradients, optimiser and what FSDP2 gathers are arithmetic.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from refine_verl.config import LoraSettings, NSPSettings
from refine_verl.kernels.patch import cpu_kernels
from refine_verl.models import Branches, Documents, FastWeightActor, RolloutDraws, adapters, make_actor, snapshot_count
from refine_verl.models.adapters import (
    DeltaRuleAdapter,
    FlaAdapter,
    ModelAdapter,
    RecomputingAdapter,
    RoutingAdapter,
    TracingAdapter,
    WritesAdapter,
    adapter_for,
    has_attention_layers,
)
from refine_verl.models.head import chunk_elements
from refine_verl.models.hybrid import DeltaRuleHybridAdapter, HybridAdapter
from refine_verl.models.hybrid.families import attention_layers
from refine_verl.models.lora import add_adapters, trainable_numbers
from refine_verl.models.packing import Packed
from refine_verl.models.state import FastWeightState
from refine_verl.models.trace import Trace
from refine_verl.plan.fused import fused_kernels
from refine_verl.plan.gpu_kernels import gpu_delta_rules
from refine_verl.plan.hollow import LABELS, LOGITS, STATES, HollowRun, tensors_in

FP32 = 4
PROBED_LAYERS = (2, 3)
FARTHEST = 8
"""A document is at most so many times as long as the shorter of the two that are run: other peaks win when short."""
TOKENS_PER_SEGMENT = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What decides the memory of a worker, besides the model.

    Attributes:
        length: tokens of the longest document that is read.
        longest: tokens of the longest that may be, by which states are counted (`longest_possible`); None: `length`.
        update_rows, rollout_rows: documents per pass over S.
        rollouts_of: of how many documents rollouts are written together.
        workers: processes the parameters are sharded over.
        nsp: c, n, k and how rollouts are made.
        with_rollouts: whether there are rollouts at all (``RefineSettings.uses_rollouts``).
        on_policy: ``refine.on_policy``.
        activation_checkpointing: ``model.activation_checkpointing``.
        reading: ``model.reading``.
        cuda: fla's kernels and bf16 matrix products instead of the CPU's.
        reshard: FSDP2 frees gathered layers after their forward pass.
        gradients_held: further gradients that are held while those of a mini-batch are measured
            (``refine.gradient_snr_every``).
        balance_coef: ``model.balance_coef``.
        lora: the adapters that are trained, if any; all else is frozen then.
        resets: whether what is trained is kept aside to return to (``refine.ttt.reset``).
    """

    length: int
    longest: int | None = None
    update_rows: int = 1
    rollout_rows: int = 1
    rollouts_of: int = 1
    workers: int = 1
    nsp: NSPSettings = dataclasses.field(default_factory=NSPSettings)
    with_rollouts: bool = True
    on_policy: bool = False
    activation_checkpointing: str = "none"
    reading: str = "whole"
    cuda: bool = False
    reshard: bool = True
    gradients_held: int = 0
    balance_coef: float = 0.0
    lora: LoraSettings = dataclasses.field(default_factory=LoraSettings)
    resets: bool = False

    @property
    def writes_in_update(self) -> bool:
        """Whether rollouts are written in the trained pass."""
        return self.with_rollouts and self.on_policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes per worker by part, in each phase of a step.

    Attributes:
        parameters: numbers of the whole model, adapters included.
        state_bytes: of the state of one document.
        phases: bytes by phase and part.
        trained: those of the parameters that are trained.
        shared_bytes: of the state, keys and values of attention layers, which forks do not copy.
        snapshot: bytes of host memory in which they are kept aside to return to, if they are.
        adapters: numbers of LoRA adapters, of the parameters.
    """

    parameters: int
    state_bytes: int
    phases: dict[str, dict[str, int]]
    trained: int
    shared_bytes: int = 0
    snapshot: int = 0
    adapters: int = 0

    @property
    def base_parameters(self) -> int:
        """Numbers of the model without adapters, which it also has once they are merged."""
        return self.parameters - self.adapters

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        """Bytes of the phase that needs most."""
        return sum(self.phases[self.peak_phase].values())


Peaks = dict[str, dict[str, int]]
"""Bytes by phase and label."""


def estimate_memory(config: PretrainedConfig, shape: Shape, passes: Peaks | None = None) -> MemoryEstimate:
    """Peak bytes of one worker in rollouts, update and optimiser step, for documents of ``shape.length`` tokens.

    Args:
        config: of the model.
        shape: what is run.
        passes: of `pass_peaks`, where they are known; they do not depend on the number of workers.
    """
    passes = passes or pass_peaks(config, shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    trained = trainable_numbers(model, shape.lora)
    adapters = trained if shape.lora.lora_rank else 0
    total = sum(parameter.numel() for parameter in model.parameters()) + adapters
    held = {"parameters": -(-total // shape.workers) * FP32}
    own = -(-trained // shape.workers)
    held.update({"gradients": own * FP32, "optimiser": 2 * own * FP32})
    unit = _largest_unit(model)
    phases = {}
    if "rollout" in passes:
        # gathered(): every layer stays whole while rollouts are written; gradients are gone by then
        phases["rollout"] = {**held, "gradients": 0, "gathered": total * FP32, **passes["rollout"]}
    # the layer at work and the one fetched ahead, and their gradients before they are summed over the workers
    held_of_unit = round(2 * unit * trained / total)  # gradients; of frozen parameters there are none
    kept = 2 * unit if shape.reshard and not shape.writes_in_update else total
    kept += held_of_unit
    phases["update"] = {**held, "gathered": kept * FP32, **passes["update"]}
    if shape.gradients_held:
        phases["measured"] = {**phases["update"], "gradients": (1 + shape.gradients_held) * own * FP32}
    # torch's fused-by-loop AdamW makes temporaries as large as its parameters on a GPU, and one tensor's on a CPU
    largest = max(parameter.numel() for parameter in model.parameters()) // shape.workers
    scratch = own if shape.cuda else min(own, largest)
    phases["optimiser"] = {**held, "scratch": scratch * FP32}
    fixed, shared = _state_parts(config, shape)
    return MemoryEstimate(
        parameters=total,
        state_bytes=fixed + shared,
        shared_bytes=shared,
        phases=phases,
        trained=trained,
        snapshot=own * FP32 if shape.resets else 0,  # taken before there is an optimiser state
        adapters=adapters,
    )


def pass_peaks(config: PretrainedConfig, shape: Shape) -> Peaks:
    """Bytes that the passes of a step keep beyond parameters and gradients, by label, at their peaks.

    Returns:
        ``rollout`` and ``update``.
    """
    layers, lengths = _probes(config, shape)
    pieces = -(-shape.length // adapters.TOKENS_PER_PIECE)  # as many as the real documents have
    found = {}
    for length in lengths:
        with mock.patch.object(adapters, "TOKENS_PER_PIECE", -(-length // pieces)):
            for count in layers:
                found[count, length] = _probe(config, count, dataclasses.replace(shape, length=length))
    wanted = (int(config.num_hidden_layers), shape.length)
    result = {}
    for phase, peaks in next(iter(found.values())).items():
        moments = [
            {
                label: _bilinear({at: probe[phase][moment][label] for at, probe in found.items()}, wanted)
                for label in LABELS
            }
            for moment in peaks
            if all(moment in probe[phase] for probe in found.values())
        ]
        result[phase] = max(moments, key=lambda moment: sum(moment.values()))
    return result


def _probes(config: PretrainedConfig, shape: Shape) -> tuple[Sequence[int], Sequence[int]]:
    """Numbers of layers and lengths to run: the real ones where these are small, or take no longer."""
    count = int(config.num_hidden_layers)
    layers = PROBED_LAYERS if count > PROBED_LAYERS[-1] else (count,)
    if kinds := _kinds(config):  # whole periods, so that each kind of layer has its share
        period = next(p for p in range(1, count + 1) if kinds[p:count] == kinds[: count - p])
        layers = (period, 2 * period) if count > 2 * period and count % period == 0 else (count,)
    if shape.cuda and isinstance(adapter_for(config), FlaAdapter | HybridAdapter):
        return layers, (shape.length,)  # in a few pieces, however long
    chunk = max(getattr(config, "lact_chunk_size", 0), getattr(config, "window_size", 0) or 0)
    unit = max(TOKENS_PER_SEGMENT * (shape.nsp.chunks + 1), 4 * chunk, shape.length // FARTHEST)
    if shape.cuda:  # logits grow with the document up to a chunk of them
        unit = max(unit, chunk_elements("cuda") // config.vocab_size + 1)
    return layers, (unit, 2 * unit) if shape.length > 2 * unit else (shape.length,)


def _kinds(config: PretrainedConfig) -> list[Any]:
    """What kind of layer each of a hybrid's is; nothing for other models."""
    if getattr(config, "layer_types", None):
        return list(config.layer_types)
    if not has_attention_layers(config):
        return []
    attention = attention_layers(config)
    return [index in attention for index in range(config.num_hidden_layers)]


def _bilinear(values: dict[tuple[int, int], int], wanted: tuple[int, int]) -> int:
    """The value at ``wanted`` of the function that is linear in each coordinate and has these values."""
    by_layers: dict[int, dict[int, float]] = {}
    for (layers, length), value in values.items():
        by_layers.setdefault(layers, {})[length] = value
    return max(0, round(_linear({layers: _linear(at, wanted[1]) for layers, at in by_layers.items()}, wanted[0])))


def _linear(values: dict[int, float], x: int) -> float:
    """The value at ``x`` of the line through one or two points."""
    (first, value), *others = sorted(values.items())
    return value + sum((other - value) / (at - first) * (x - first) for at, other in others)


def _largest_unit(model: nn.Module) -> int:
    """Parameters of the largest module that FSDP2 gathers at once: a layer, the embeddings or the head."""
    classes = set(getattr(model, "_no_split_modules", None) or ())
    units = [
        sum(parameter.numel() for parameter in module.parameters())
        for module in model.modules()
        if type(module).__name__ in classes or isinstance(module, nn.Embedding)
    ]
    return max(units, default=sum(parameter.numel() for parameter in model.parameters()))


_TERMS = ("ntp_loss_sum", "balance_loss_sum", "log_probs")
"""What an actor's pass returns that is trained."""


class _Watched:
    """An adapter whose states are counted as such."""

    def __init__(self, inner: ModelAdapter, run: HollowRun) -> None:
        self.inner, self.counter = inner, run

    def run(
        self, model: nn.Module, packed: Packed, state: FastWeightState | None, keep_state: bool
    ) -> tuple[Tensor, FastWeightState | None]:
        if state is not None:
            self.counter.relabel(state.tensors, STATES)
        hidden, after = self.inner.run(model, packed, state, keep_state)
        if after is not None:
            self.counter.relabel(after.tensors, STATES)
        return hidden, after

    def recomputed_layers(self, model: nn.Module) -> AbstractContextManager[None]:
        assert isinstance(self.inner, RecomputingAdapter)
        return self.inner.recomputed_layers(model)


class _WatchedTracing(_Watched):
    def trace(
        self, model: nn.Module, documents: Documents, positions: Tensor | None = None
    ) -> tuple[list[Tensor], Trace] | None:
        assert isinstance(self.inner, TracingAdapter)
        traced = self.inner.trace(model, documents, positions)
        if traced is not None and not torch.is_grad_enabled():
            self.counter.relabel(tensors_in(traced[1]), STATES)
        return traced

    def write_norms(self, trace: Trace) -> Tensor:
        assert isinstance(self.inner, WritesAdapter)
        return self.inner.write_norms(trace)


class _WatchedRouting(_WatchedTracing):
    """Of a hybrid, which may have experts."""

    @property
    def balances(self) -> bool:
        assert isinstance(self.inner, RoutingAdapter)
        return self.inner.balances

    @balances.setter
    def balances(self, wanted: bool) -> None:
        assert isinstance(self.inner, RoutingAdapter)
        self.inner.balances = wanted

    def routes(self) -> Tensor | None:
        assert isinstance(self.inner, RoutingAdapter)
        return self.inner.routes()

    def balance_loss(self) -> Tensor:
        assert isinstance(self.inner, RoutingAdapter)
        return self.inner.balance_loss()


def _probe(config: PretrainedConfig, layers: int, shape: Shape) -> dict[str, dict[str, dict[str, int]]]:
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    result: dict[str, dict[str, dict[str, int]]] = {}
    with fused_kernels(), cpu_kernels(), gpu_delta_rules() if shape.cuda else nullcontext():
        if shape.with_rollouts and not shape.on_policy:
            result["rollout"] = _count(config, shape, _roll_out)
        if shape.writes_in_update and shape.activation_checkpointing != "none":
            # S is read twice, and only the peak of each reading is linear
            read = {f"read, {moment}": peak for moment, peak in _count(config, shape, _roll_out).items()}
            result["update"] = read | _count(config, shape, _update)
        else:
            result["update"] = _count(config, shape, _fused if shape.writes_in_update else _update)
    return result


def _count(config: PretrainedConfig, shape: Shape, run: Any) -> dict[str, dict[str, int]]:
    counter = HollowRun()
    actor = _actor(config, shape, counter)
    head: Any = actor.get_output_embeddings()  # type: ignore[operator]
    forward = head.forward

    def labelled(*args: Any, **kwargs: Any) -> Any:
        with counter.labelled(LOGITS):
            return forward(*args, **kwargs)

    chosen = mock.patch.object(actor, "select", lambda *_: _positions(shape))  # there are no entropies to choose by
    with mock.patch.object(head, "forward", labelled), chosen, counter:
        run(actor, shape)
    return counter.peaks


def reads_uncut(config: PretrainedConfig) -> bool:
    """Whether the model's states can be had after one uncut pass."""
    return isinstance(adapter_for(config), TracingAdapter)


class _OnGpu(DeltaRuleAdapter):
    def cuts_operators(self) -> bool:
        return True


class _HybridOnGpu(HybridAdapter):
    def cuts_operators(self) -> bool:
        return True


class _DeltaRuleHybridOnGpu(DeltaRuleHybridAdapter):
    def cuts_operators(self) -> bool:
        return True


def _actor(config: PretrainedConfig, shape: Shape, counter: HollowRun) -> FastWeightActor:
    inner = adapter_for(config)
    if shape.cuda and type(inner) in (FlaAdapter, DeltaRuleAdapter):
        inner = _OnGpu()
    elif shape.cuda and isinstance(inner, HybridAdapter):
        inner = _DeltaRuleHybridOnGpu() if isinstance(inner, DeltaRuleHybridAdapter) else _HybridOnGpu()
    watched = _WatchedTracing if isinstance(inner, TracingAdapter) else _Watched
    with counter.fake:
        model = AutoModelForCausalLM.from_config(config)
    if shape.lora.lora_rank:
        add_adapters(model, shape.lora, seed=0, empty=True)
    with counter.fake:
        for module in model.modules():
            for name, own in module._parameters.items():
                if own is not None and own.is_meta:
                    module._parameters[name] = nn.Parameter(torch.zeros(own.shape))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    actor = make_actor(
        model,
        adapter=(_WatchedRouting if isinstance(inner, RoutingAdapter) else watched)(inner, counter),
        autocast_dtype=torch.bfloat16 if shape.cuda else None,
        activation_checkpointing=shape.activation_checkpointing,
        reading=shape.reading,
        balance_coef=shape.balance_coef,
    )
    actor.sentence_ends = (0,)  # which tokens these are costs nothing
    return actor


def _positions(shape: Shape) -> Tensor:
    """Positions of one document, [c], where they cost most: the longest segment between two spans two chunks."""
    valid = shape.length - shape.nsp.longest_rollout
    borders = [border[0] for border in Documents(torch.zeros(1, valid), (valid,)).even_cuts(shape.nsp.chunks)]
    chunks = zip(borders, borders[1:], strict=False)
    return torch.tensor([stop - 1 if i % 2 else start for i, (start, stop) in enumerate(chunks)])


def _documents(rows: int, shape: Shape) -> Documents:
    return Documents(torch.zeros(rows, shape.length, dtype=torch.int64), (shape.length,) * rows)


def _how_to_write(shape: Shape, rows: int) -> dict[str, Any]:
    nsp = shape.nsp
    draws = RolloutDraws(
        torch.zeros(rows, nsp.chunks, dtype=torch.float64),
        torch.zeros(rows, nsp.chunks, nsp.rollouts_per_position, nsp.longest_rollout, dtype=torch.float64),
    )
    return {
        "documents": _documents(rows, shape),
        "nsp": nsp,
        "draws": draws,
        "snapshots": snapshot_count(nsp.chunks, shape.longest or shape.length),
    }


def _roll_out(actor: FastWeightActor, shape: Shape) -> None:
    actor(mode="rollout", **_how_to_write(shape, shape.rollouts_of), read_together=shape.rollout_rows)


def _fused(actor: FastWeightActor, shape: Shape) -> None:
    _, output = actor(mode="on_policy", **_how_to_write(shape, shape.update_rows))
    _loss(output).backward()


def _update(actor: FastWeightActor, shape: Shape) -> None:
    nsp, rows = shape.nsp, shape.update_rows
    branches = None
    if shape.with_rollouts:
        tokens = torch.zeros(rows, nsp.chunks, nsp.rollouts_per_position, nsp.longest_rollout, dtype=torch.int64)
        branches = Branches(_positions(shape).expand(rows, -1), tokens)
    output = actor(mode="update", documents=_documents(rows, shape), branches=branches, nsp=nsp)
    _loss(output).backward()


def _loss(output: dict[str, Tensor]) -> Tensor:
    return sum((output[name].sum() for name in _TERMS if name in output), torch.zeros(()))


def _state_parts(config: PretrainedConfig, shape: Shape) -> tuple[int, int]:
    """Bytes of the state of one document: of fixed size, and keys and values, which grow with it, at its length."""
    lengths = [length for length in (TOKENS_PER_SEGMENT // 2, TOKENS_PER_SEGMENT) if length <= shape.length]
    sizes = {length: _state_after(config, shape, length) for length in lengths or [shape.length]}
    if not isinstance(adapter_for(config), HybridAdapter):
        return sizes[max(sizes)], 0
    grows = {length: float(size) for length, size in sizes.items()}
    fixed = round(_linear(grows, 0)) if len(grows) > 1 else 0
    return fixed, round(_linear(grows, shape.length)) - fixed


def _state_after(config: PretrainedConfig, shape: Shape, length: int) -> int:
    counter = HollowRun()
    with fused_kernels(), cpu_kernels(), gpu_delta_rules() if shape.cuda else nullcontext():
        actor = _actor(config, shape, counter)
        packed = Packed.of_rows(torch.zeros(1, length, dtype=torch.int64))
        with counter, torch.no_grad(), actor.autocast(trains=False):
            _, state = actor.run(packed, None, keep_state=True)
    assert state is not None
    return state.num_bytes
