"""The pieces of `benchmarks.gpu_check`, each run as `python -m benchmarks.gpu_pieces PIECE DEVICE SIZE FILE`.

Figures go into FILE as they come, so that a piece that is stopped leaves what it has.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import launches
from benchmarks.gpu_check import PIECE_SIZES
from benchmarks.step_cost import LACT, LIMITS, MEASURED_MEMORY, PRESETS, Bench, Preset, compare, precise_updates
from refine_verl.config import LossSettings, NSPSettings
from refine_verl.doctor.findings import FAIL
from refine_verl.doctor.kernels import check_kernels, check_triton
from refine_verl.models import Branches, Documents, FastWeightActor, adapters
from refine_verl.models.answers import answer_draws
from refine_verl.models.reward_manager import HiddenStateRewardManager
from refine_verl.models.step import Step
from refine_verl.nsp import group_standardise, ppo_clip_loss

NSP = NSPSettings(chunks=4, rollout_length=5)
Sizes = dict[str, dict[str, Any]]
FAMILIES: Sizes = {
    "delta_net": {"num_heads": 2},
    "gated_deltanet": {"num_heads": 2, "head_dim": 64, "expand_v": 1.0},
    "lact_swiglu": {
        **LACT, "num_attn_heads": 4, "num_lact_heads": 2, "lact_chunk_size": 64, "window_size": 96, "w0_w2_low_rank": 4,
    },
}  # fmt: skip
"""Each in a size at which a comparison takes a second."""
_MIXED = {
    "layer_types": ["linear_attention", "full_attention"], "num_attention_heads": 4, "num_key_value_heads": 2,
    "linear_num_key_heads": 2, "linear_key_head_dim": 64, "intermediate_size": 256, "pad_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
HYBRIDS: Sizes = {
    "olmo_hybrid": {**_MIXED, "linear_num_value_heads": 2, "linear_value_head_dim": 128},
    "qwen3_5_text": {**_MIXED, "head_dim": 64, "linear_num_value_heads": 4, "linear_value_head_dim": 64},
    "gated_deltanet": {**FAMILIES["gated_deltanet"], "attn": {"layers": [1], "num_heads": 2}},
}
"""The same; one layer of each kind."""
SMALL = {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
LENGTHS = {"full": (512, 300), "tiny": (96, 60)}
LONGEST = {"full": [16384 << doubled for doubled in range(7)], "tiny": [64, 128]}
ROUNDS = 3


class CheckFailed(Exception):
    """A figure is not what it has to be."""


@dataclass
class Sheet:
    """Where a piece runs, and what it has found."""

    device: str
    size: str
    target: Path
    figures: dict[str, Any]

    @property
    def bf16(self) -> bool:
        """Under autocast on a GPU; the CPU's kernels are for float32."""
        return self.device == "cuda"

    def note(self, name: str, value: Any) -> None:
        """Write one more figure down."""
        self.figures[name] = value
        self.target.write_text(json.dumps(self.figures))

    def small(
        self, family: str, checkpointing: str = "none", bf16: bool = False, families: Sizes | None = None
    ) -> Bench:
        """A small model of one of ``families`` (`FAMILIES`), and two documents."""
        model = {**SMALL, **(families or FAMILIES)[family]}
        preset = Preset(
            model, LENGTHS[self.size][0], 2, 2, device=self.device, activation_checkpointing=checkpointing, rounds=1,
            prefix_rounds=1, model_type=family, bf16=bf16,
        )  # fmt: skip
        return Bench(preset, NSP)

    def real(self, name: str, **changes: Any) -> Bench:
        """The model and the batch of one of `PRESETS`; a tiny one for a try."""
        name = name if self.size == "full" else name.replace("gpu", "tiny")
        return Bench(replace(PRESETS[name], device=self.device, bf16=self.bf16, **changes), NSPSettings())


def environment(device: str) -> dict[str, Any]:
    """Hardware and versions."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "transformers", "flash-linear-attention"):
        found[package] = importlib.metadata.version(package)
    if device == "cpu":
        return {**found, "device": platform.processor() or "cpu", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(0)
    return {
        **found,
        "device": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


def doctor(sheet: Sheet) -> None:
    """What `refine_verl.doctor` says of the kernels."""
    findings = [*check_triton(), *check_kernels()]
    sheet.note("findings", [[finding.name, finding.status, finding.detail] for finding in findings])
    failed = [f"{finding.name}: {finding.detail} -> {finding.fix}" for finding in findings if finding.status == FAIL]
    if failed:
        raise CheckFailed("; ".join(failed))


def bf16(sheet: Sheet) -> None:
    """Forked equals recomputed under autocast."""
    _compare(sheet, sheet.bf16)


def float32(sheet: Sheet) -> None:
    """Forked equals recomputed without autocast."""
    _compare(sheet, False)


def hybrids(sheet: Sheet) -> None:
    """Both under autocast, for `HYBRIDS`."""
    _compare(sheet, sheet.bf16, HYBRIDS)
    _compare_modes(sheet, HYBRIDS)


def _compare(sheet: Sheet, autocast: bool, families: Sizes = FAMILIES) -> None:
    sheet.note("tolerance", LIMITS[autocast])
    wrong = []
    for family in families:
        differences = compare(sheet.small(family, bf16=autocast, families=families))
        sheet.note(family, differences)
        if not all(value <= LIMITS[autocast] for value in differences.values()):
            wrong.append(f"{family}: {differences}")
    if wrong:
        raise CheckFailed(f"forked and recomputed differ by more than {LIMITS[autocast]}: {'; '.join(wrong)}")


def modes(sheet: Sheet) -> None:
    """Every mode runs, gives numbers, and agrees with those that compute the same."""
    _compare_modes(sheet, FAMILIES)


def _compare_modes(sheet: Sheet, families: Sizes) -> None:
    limit, wrong = LIMITS[sheet.bf16], []
    sheet.note("tolerance", limit)
    for family in families:
        for checkpointing in ("none", "layer"):
            actor = sheet.small(family, checkpointing, sheet.bf16, families).actor
            with precise_updates(actor.config):
                found = dict(_modes_of(actor, _unequal(sheet)))
            sheet.note(f"{family}, {checkpointing}", found)
            if not all(value <= limit for value in found.values()):
                wrong.append(f"{family}, activation checkpointing {checkpointing}: {found}")
    if wrong:
        raise CheckFailed(f"modes disagree by more than {limit}: {'; '.join(wrong)}")


def _unequal(sheet: Sheet) -> Documents:
    lengths = LENGTHS[sheet.size]
    tokens = torch.randint(0, SMALL["vocab_size"], (2, max(lengths)), generator=torch.Generator().manual_seed(0))
    return Documents.from_tensors(tokens.to(sheet.device), lengths)


def _modes_of(actor: FastWeightActor, documents: Documents) -> Iterator[tuple[str, float]]:
    """Relative differences by mode: to a mode that computes the same, or infinity where something is not finite."""
    step, ids, reward = Step(actor, NSP, seed=0), range(len(documents)), HiddenStateRewardManager(NSP.reward)
    loss, correct = actor(mode="score", documents=documents)
    yield "score", _finite(loss, correct.double())
    written = step.write_and_reward(1, documents, ids, reward)
    written["advantages"] = group_standardise(written["rewards"])
    yield "rollout", _finite(*written.values())
    branches = Branches(written["positions"], written["rollout_tokens"])
    trained = actor(mode="update", documents=documents, branches=branches, nsp=NSP)
    difference = relative(trained["log_probs"], written["old_log_probs"].flatten(0, 2))
    yield "update", difference + _trained(actor, step, documents, written, trained)
    written, trained = step.on_policy(1, documents, ids, reward)
    written["advantages"] = group_standardise(written["rewards"])
    again = actor(
        mode="update", documents=documents, branches=Branches(written["positions"], written["rollout_tokens"]), nsp=NSP
    )
    difference = relative(trained["log_probs"], again["log_probs"])
    yield "on_policy", difference + _trained(actor, step, documents, written, trained)
    answers = actor(
        mode="generate", prompts=documents, limits=[20, 7], length=20, copies=3, temperature=1.0,
        draws=answer_draws(0, 1, ids, 3, 20), stop_tokens=[1, 2, 3],
    )  # fmt: skip
    yield "generate", _finite(answers.log_probs)
    scored = actor(
        mode="answer_log_probs", prompts=documents, tokens=answers.tokens, lengths=answers.lengths, temperature=1.0,
        segments=3,
    )["log_probs"]  # fmt: skip
    actor.zero_grad()
    scored.sum().backward()
    yield "answer_log_probs", relative(scored, answers.log_probs.flatten(0, 1)) + _gradients(actor)


def _trained(
    actor: FastWeightActor, step: Step, documents: Documents, rollouts: dict[str, Tensor], output: dict[str, Tensor]
) -> float:
    """0 if the loss and all its gradients are finite."""
    actor.zero_grad()
    loss, _ = step.loss(
        documents, rollouts, LossSettings(), policy_loss=ppo_clip_loss, global_tokens=documents.predicted,
        global_rollouts=rollouts["advantages"].numel(), output=output,
    )  # fmt: skip
    loss.backward()
    return _finite(loss) + _gradients(actor)


def _gradients(actor: FastWeightActor) -> float:
    return _finite(*(torch.tensor(torch.inf) if p.grad is None else p.grad for p in actor.parameters()))


def _finite(*tensors: Tensor) -> float:
    return 0.0 if all(bool(tensor.isfinite().all()) for tensor in tensors) else float("inf")


def relative(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm."""
    got, wanted = got.detach().double(), wanted.detach().double()
    return ((got - wanted).norm() / wanted.norm()).item()


def cost(sheet: Sheet) -> None:
    """Steps of DeltaNet-1.3B, layers recomputed."""
    _cost(sheet, sheet.real("gpu"))


def cost_kept(sheet: Sheet) -> None:
    """Steps of DeltaNet-1.3B, activations kept."""
    _cost(sheet, sheet.real("gpu", activation_checkpointing="none"))


def cost_lact(sheet: Sheet) -> None:
    """Steps of LaCT-760M."""
    _cost(sheet, sheet.real("gpu_lact"))


def piece_sizes(sheet: Sheet) -> None:
    """By how many tokens the operators are cut (`models.adapters.TOKENS_PER_PIECE`): one document to a step."""
    bench = sheet.real("gpu", documents=1, rollout_micro_batch=1)
    steps = {
        f"{kind}_{size}": partial(_in_pieces, size, bench, kind)
        for size in PIECE_SIZES[sheet.size]
        for kind in MEASURED_MEMORY
        if kind != "sft"  # is never cut
    }
    medians = _measure(sheet, steps)
    for kind in MEASURED_MEMORY:
        of_kind = {name: median for name, median in medians.items() if name.startswith(f"{kind}_")}
        if of_kind:
            sheet.note(f"{kind}_fastest", int(min(of_kind, key=of_kind.__getitem__).rpartition("_")[2]))


def _in_pieces(size: int, bench: Bench, kind: str) -> None:
    with mock.patch.object(adapters, "TOKENS_PER_PIECE", size):
        bench.step(kind)


def _cost(sheet: Sheet, bench: Bench) -> None:
    medians = _measure(sheet, {kind: partial(bench.step, kind) for kind in MEASURED_MEMORY})
    for kind, median in medians.items():
        sheet.note(f"{kind}_tokens_per_second", bench.documents.total / median)
        if "sft" in medians and kind != "sft":
            sheet.note(f"{kind}_over_sft", median / medians["sft"])


def _measure(sheet: Sheet, steps: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Peak memory of each step, and the median of its seconds where it fits."""
    fits = []
    for name, step in steps.items():  # warms up, too
        peak = _peak(sheet, step)
        sheet.note(f"{name}_peak_gib", peak)
        if peak != OUT_OF_MEMORY:
            fits.append(name)
    seconds: dict[str, list[float]] = {name: [] for name in fits}
    for _ in range(ROUNDS):
        for name in fits:  # interleaved: a change of the clock meets all of them
            started = _now(sheet)
            steps[name]()
            seconds[name].append(_now(sheet) - started)
            sheet.note(f"{name}_seconds", seconds[name])
    return {name: statistics.median(values) for name, values in seconds.items()}


OUT_OF_MEMORY = "out of memory"


def _peak(sheet: Sheet, body: Callable[[], object]) -> float | str | None:
    """GiB at most in use on the GPU while something ran, or that it did not fit; None on a CPU."""
    if sheet.device == "cpu":
        body()
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        body()
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


def _now(sheet: Sheet) -> float:
    if sheet.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def count_launches(sheet: Sheet) -> None:
    """Launches of one document: seen by the profiler on a GPU, counted (`benchmarks.launches`) on a CPU."""
    layers, length, vocabulary = (24, 16384, 32000) if sheet.size == "full" else (2, 256, 64)
    bench = launches.narrow("delta_net", layers, length, vocabulary, "none", sheet.device)
    if sheet.device == "cpu":
        for kind, counts in launches.measure(bench).items():
            sheet.note(kind, counts.launches)
        return
    written = bench.write("fork")
    kinds: dict[str, Callable[[], object]] = {
        "sft": lambda: bench.backward("sft", None),
        "rollout": lambda: bench.write("fork"),
        "update": lambda: bench.backward("fork", written),
        "fused": lambda: bench.backward("fused", None),
    }
    for kind, body in kinds.items():
        body()  # what is tuned, is tuned here
        bench.optimizer.zero_grad()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            body()
            torch.cuda.synchronize()
        bench.optimizer.zero_grad()
        sheet.note(kind, count_kernels(seen.events()))
    sheet.note("two-phase", sheet.figures["rollout"] + sheet.figures["update"])


def count_kernels(events: Any) -> int:
    """Kernels among what a profiler saw; copies and fills of memory are none."""
    on_gpu = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_gpu)


def longest(sheet: Sheet) -> None:
    """Ever longer documents, one to a step, until they do not fit."""
    bench, going = sheet.real("gpu", documents=1), list(MEASURED_MEMORY)
    for length in LONGEST[sheet.size]:
        bench.use_documents(1, length)
        for kind in list(going):
            peak = _peak(sheet, partial(bench.step, kind))
            if peak == OUT_OF_MEMORY:
                going.remove(kind)
                bench.optimizer.zero_grad()
                continue
            sheet.note(f"{kind}_longest", length)
            sheet.note(f"{kind}_peak_gib_at_{length}", peak)
    sheet.note("longer_were_not_tried", going)
    if "sft_longest" not in sheet.figures:
        raise CheckFailed(f"not even {LONGEST[sheet.size][0]} tokens fit")


RUN: dict[str, Callable[[Sheet], None]] = {
    "doctor": doctor,
    "bf16": bf16,
    "modes": modes,
    "hybrids": hybrids,
    "cost": cost,
    "float32": float32,
    "longest": longest,
    "piece_sizes": piece_sizes,
    "cost_lact": cost_lact,
    "launches": count_launches,
    "cost_kept": cost_kept,
}


def main(piece: str, device: str, size: str, target: str) -> None:
    """Run one piece.

    Raises:
        SystemExit: there is no such device, or the piece failed, with the reason.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is visible to PyTorch: see nvidia-smi, and whether torch is a build for CPUs")
    sheet = Sheet(device, size, Path(target), {})
    sheet.note("environment", environment(device))
    # small documents, too, are cut into several pieces
    adapters.TOKENS_PER_PIECE = 128 if piece in ("bf16", "float32", "modes", "hybrids") else adapters.TOKENS_PER_PIECE
    try:
        RUN[piece](sheet)
    except CheckFailed as problem:
        raise SystemExit(str(problem)) from problem


if __name__ == "__main__":
    main(*sys.argv[1:])
