"""What a REFINE step costs beside a plain fine-tuning step on the same model and batch.

    python -m benchmarks.step_cost --preset cpu --json step_cost.json
    python -m benchmarks.step_cost --preset cpu_lact

Runs five kinds of step interleaved in one process: next-token loss only (``sft``), REFINE by forking states in two
phases (``fork``), the same with 32 positions and 8 rollouts from each (``many``), REFINE in the pass that is trained
(``fused``), and REFINE by recomputing every prefix (``prefix``). Each is one optimiser step over the same documents,
forward and backward one document at a time; the rollouts of two phases keep no activations and read several documents
at once. Forking is first checked against recomputing; if they differ nothing is timed. Needs torch, transformers and
fla only, so it runs on a bare GPU machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig

from refine_verl.config import LossSettings, NSPSettings
from refine_verl.models import Branches, Documents, FastWeightActor, load_model, make_actor
from refine_verl.models.reward_manager import HiddenStateRewardManager
from refine_verl.models.step import Rollouts, Step, in_parts
from refine_verl.nsp import group_standardise, ppo_clip_loss

KINDS = ("sft", "fork", "many", "fused", "prefix")
MEASURED_MEMORY = ("sft", "fork", "fused")
MANY = {"chunks": 32, "rollouts_per_position": 8}
"""What ``many`` is: 256 rollouts of a document, in pieces of `refine.nsp.rollouts_together`."""
LIMITS = {False: 1e-3, True: 5e-2}
"""Largest relative difference of forking and recomputing: float32 sums in another order; bf16 rounds every product."""


@dataclass(frozen=True)
class Preset:
    """A model and a batch. ``model`` goes into the Hugging Face configuration of a ``model_type``.

    Activations are kept or recomputed layer by layer: a plain step that is cut into segments is nothing to divide by.
    """

    model: dict[str, Any]
    length: int
    documents: int
    rollout_micro_batch: int
    device: str
    activation_checkpointing: str
    rounds: int
    prefix_rounds: int
    model_type: str = "delta_net"
    bf16: bool = False


# The published 760M configuration without its size.
LACT = {
    "w0_w2_low_rank": 32,
    "use_muon": True,
    "use_momentum": True,
    "rope_theta": 1e6,
}

PRESETS = {
    # Head size as in DeltaNet-1.3B. A small vocabulary: at width 256 an LM head for 32,000 tokens would be 72% of the
    # arithmetic (5% in the 1.3B model), and the benchmark would time softmaxes.
    "cpu": Preset(
        model={"hidden_size": 256, "num_hidden_layers": 4, "num_heads": 2, "vocab_size": 2048},
        length=4096,
        documents=8,
        rollout_micro_batch=1,
        device="cpu",
        activation_checkpointing="none",
        rounds=5,
        prefix_rounds=1,
    ),
    "gpu": Preset(
        model={"hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 16, "vocab_size": 32000},
        length=16384,
        documents=4,
        rollout_micro_batch=4,
        device="cuda",
        bf16=True,
        activation_checkpointing="layer",
        rounds=7,
        prefix_rounds=1,
    ),
    # Attention heads of 64 as in LaCT-760M, and as many updates in a document.
    "cpu_lact": Preset(
        model={
            **LACT,
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attn_heads": 4,
            "num_lact_heads": 2,
            "lact_chunk_size": 512,
            "window_size": 512,
            "vocab_size": 2048,
        },
        length=4096,
        documents=4,
        rollout_micro_batch=2,
        device="cpu",
        activation_checkpointing="none",
        rounds=5,
        prefix_rounds=1,
        model_type="lact_swiglu",
    ),
    "gpu_lact": Preset(
        model={
            **LACT,
            "hidden_size": 1536,
            "num_hidden_layers": 24,
            "num_attn_heads": 24,
            "num_lact_heads": 4,
            "lact_chunk_size": 2048,
            "window_size": 2048,
            "vocab_size": 32000,
        },
        length=16384,
        documents=4,
        rollout_micro_batch=4,
        device="cuda",
        bf16=True,
        activation_checkpointing="layer",
        rounds=7,
        prefix_rounds=1,
        model_type="lact_swiglu",
    ),
    # seconds instead of minutes: for the tests of the scripts
    "tiny": Preset(
        model={"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "vocab_size": 128},
        length=256,
        documents=2,
        rollout_micro_batch=1,
        device="cpu",
        activation_checkpointing="none",
        rounds=2,
        prefix_rounds=1,
    ),
    "tiny_lact": Preset(
        model={
            **LACT,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attn_heads": 4,
            "num_lact_heads": 2,
            "lact_chunk_size": 32,
            "window_size": 48,
            "w0_w2_low_rank": 4,
            "vocab_size": 128,
        },
        length=256,
        documents=2,
        rollout_micro_batch=1,
        device="cpu",
        activation_checkpointing="none",
        rounds=2,
        prefix_rounds=1,
        model_type="lact_swiglu",
    ),
}


class Bench:
    """One model, its optimiser and one batch, and the kinds of step over them."""

    def __init__(self, preset: Preset, nsp: NSPSettings, seed: int = 0) -> None:
        self.preset, self.nsp = preset, nsp
        config = AutoConfig.for_model(preset.model_type, fuse_cross_entropy=False, **preset.model)
        with torch.device(preset.device):
            model = load_model(None, config=config, seed=seed).to(preset.device)
        self.actor: FastWeightActor = make_actor(
            model,
            autocast_dtype=torch.bfloat16 if preset.bf16 else None,
            activation_checkpointing=preset.activation_checkpointing,
        )
        self.reward = HiddenStateRewardManager(nsp.reward)
        self.optimizer = torch.optim.AdamW(self.actor.parameters(), lr=1e-6)
        self.use_documents(preset.documents, preset.length, seed)

    def use_documents(self, documents: int, length: int, seed: int = 0) -> None:
        """From now on the batch is this number of documents of so many tokens."""
        generator = torch.Generator().manual_seed(seed)
        vocabulary = self.preset.model["vocab_size"]
        tokens = torch.randint(0, vocabulary, (documents, length), generator=generator)
        self.documents = Documents.from_tensors(tokens.to(self.preset.device), [length] * documents)

    def step(self, kind: str) -> None:
        """One optimiser step."""
        self.optimizer.zero_grad()
        self.backward(kind, self.write(kind) if kind in ("fork", "many", "prefix") else None)
        self.optimizer.step()

    def write(self, kind: str) -> dict[str, Tensor]:
        """Rollouts of the whole batch, rewarded and compared."""
        rollouts = self.model_step(kind).write_and_reward(1, self.documents, range(len(self.documents)), self.reward)
        return {**rollouts, "advantages": group_standardise(rollouts["rewards"])}

    def model_step(self, kind: str) -> Step:
        """How the model makes a step of this kind."""
        nsp = replace(self.nsp, rollout="prefix" if kind == "prefix" else "fork", **(MANY if kind == "many" else {}))
        return Step(self.actor, nsp, seed=0, read_together=self.preset.rollout_micro_batch)

    def backward(self, kind: str, written: Rollouts | None) -> float:
        """Gradients of the batch, document by document. Returns the loss."""
        total, nsp = 0.0, self.model_step(kind).nsp
        for index, (document, rollouts) in enumerate(in_parts(self.documents, written, 1)):
            step, output = self.model_step(kind), None
            if kind == "fused":
                numbers, output = step.on_policy(1, document, [index], self.reward)
                rollouts = {**numbers, "advantages": group_standardise(numbers["rewards"])}
            loss, _ = step.loss(
                document,
                rollouts,
                LossSettings(rl_coef=0.2, sft_coef=1.0),
                policy_loss=ppo_clip_loss,
                global_tokens=self.documents.predicted,
                global_rollouts=len(self.documents) * nsp.chunks * nsp.rollouts_per_position,
                output=output,
            )
            loss.backward()
            total += loss.item()
        return total


def compare(bench: Bench) -> dict[str, float]:
    """Relative differences between forking and recomputing: log-probabilities, loss and gradient of a whole step.

    Both take the rollouts that forking wrote, so a sampled token that flips at the edge of its interval in low
    precision does not hide the comparison. LaCT's Newton-Schulz steps are taken in float32 for it: in bf16 they
    amplify the last bit of every sum, forward and backward, by several per cent of the gradient.
    """
    with precise_updates(bench.actor.config):
        return _compare(bench)


@contextmanager
def precise_updates(config: Any) -> Iterator[None]:
    """LaCT's Newton-Schulz steps in float32."""
    published = getattr(config, "muon_dtype", None)
    if published is not None:
        config.muon_dtype = "float32"
    yield
    if published is not None:
        config.muon_dtype = published


def _compare(bench: Bench) -> dict[str, float]:
    written = bench.write("fork")
    gradients, losses, log_probs = [], [], []
    for kind in ("fork", "prefix"):
        bench.optimizer.zero_grad()
        losses.append(bench.backward(kind, written))
        gradients.append([parameter.grad.double().cpu() for parameter in bench.actor.parameters()])
        with torch.no_grad():
            output = bench.actor(
                mode="update",
                documents=bench.documents.split(1)[0],
                branches=Branches(written["positions"][:1], written["rollout_tokens"][:1]),
                nsp=replace(bench.nsp, rollout=kind),
            )
        log_probs.append(output["log_probs"].double().cpu())
    bench.optimizer.zero_grad()
    difference = sum((a - b).square().sum() for a, b in zip(*gradients, strict=True)).sqrt()
    norm = sum(b.square().sum() for b in gradients[1]).sqrt()
    return {
        "gradient": (difference / norm).item(),
        "loss": abs(losses[0] - losses[1]) / abs(losses[1]),
        "log_probs": (log_probs[0] - log_probs[1]).abs().mean().item(),
    }


def measure_time(
    bench: Bench, rounds: int, prefix_rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and processor seconds (all threads) per step.

    Kinds are interleaved, so that a change of the machine's speed meets all of them; processor time does not count
    what other processes take.
    """
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    processor: dict[str, list[float]] = {kind: [] for kind in KINDS}
    bench.step("sft"), bench.step("fork"), bench.step("many"), bench.step("fused")  # warm up
    for index in range(rounds):
        for kind in KINDS:
            if kind == "prefix" and index >= prefix_rounds:
                continue
            _synchronise(bench.preset.device)
            started, used = time.perf_counter(), time.process_time()
            bench.step(kind)
            _synchronise(bench.preset.device)
            seconds[kind].append(time.perf_counter() - started)
            processor[kind].append(time.process_time() - used)
    return seconds, processor


def count_tokens(bench: Bench, kind: str) -> float:
    """Tokens put through the model per document token in one step."""
    bench.actor.forward_tokens = 0
    bench.step(kind)
    return bench.actor.forward_tokens / bench.documents.total


def measure_memory(preset: Preset, nsp: NSPSettings, kind: str) -> dict[str, int]:
    """Bytes: peak of this process (or device) after three steps, and what was in use before the first."""
    bench = Bench(preset, nsp)
    for parameter in bench.actor.parameters():
        parameter.grad = torch.zeros_like(parameter)
    bench.optimizer.step()  # its state belongs to the model, not to the step
    before = _memory(preset.device, peak=False)
    for _ in range(3):
        bench.step(kind)
    return {"peak": _memory(preset.device, peak=True), "before": before}


def _memory(device: str, peak: bool) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    status = Path("/proc/self/status").read_text()
    field = "VmHWM" if peak else "VmRSS"
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _memory_in_a_process(preset: str, kind: str) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.step_cost", "--preset", preset, "--memory-of", kind]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def run(name: str, rounds: int | None) -> dict[str, Any]:
    """Everything: check, time, count, measure memory.

    Raises:
        SystemExit: forking and recomputing differ by more than rounding.
    """
    preset, nsp = PRESETS[name], NSPSettings()
    bench = Bench(preset, nsp)
    differences = compare(bench)
    limit = LIMITS[preset.bf16]
    if max(differences.values()) > limit:
        raise SystemExit(f"fork and prefix differ by more than {limit}: {differences}; nothing was timed")
    seconds, processor = measure_time(bench, rounds or preset.rounds, preset.prefix_rounds)
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    on_cpu = {kind: statistics.median(values) for kind, values in processor.items()}
    memory = {kind: _memory_in_a_process(name, kind) for kind in (*MEASURED_MEMORY, "many")}
    return {
        "fork_over_sft": medians["fork"] / medians["sft"],
        "fused_over_sft": medians["fused"] / medians["sft"],
        "many_more_over_sft": (medians["many"] - medians["fork"]) / medians["sft"],
        "prefix_over_fork": medians["prefix"] / medians["fork"],
        **(
            {f"{kind}_over_sft_processor_time": on_cpu[kind] / on_cpu["sft"] for kind in ("fork", "many", "fused")}
            if preset.device == "cpu"
            else {}
        ),
        "memory_ratio": memory["fork"]["peak"] / memory["sft"]["peak"],
        "memory_ratio_above_model": _above(memory["fork"]) / _above(memory["sft"]),
        "memory_ratio_many": memory["many"]["peak"] / memory["sft"]["peak"],
        "memory_ratio_fused": memory["fused"]["peak"] / memory["sft"]["peak"],
        "forward_tokens_per_token": count_tokens(bench, "fork"),
        "forward_tokens_per_token_many": count_tokens(bench, "many"),
        "forward_tokens_per_token_fused": count_tokens(bench, "fused"),
        "forward_tokens_per_token_prefix": count_tokens(bench, "prefix"),
        "difference_fork_prefix": differences,
        "seconds": seconds,
        "processor_seconds": processor,
        "memory_bytes": memory,
        "settings": {"preset": name, **asdict(preset), "nsp": asdict(nsp)},
        "environment": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if preset.device == "cuda" else platform.processor() or "cpu",
        },
    }


def _above(memory: dict[str, int]) -> int:
    return max(1, memory["peak"] - memory["before"])


def table(result: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [f"{'step':<8}{'median s':>10}{'min s':>10}{'max s':>10}{'over sft':>10}"]
    base = statistics.median(result["seconds"]["sft"])
    for kind, values in result["seconds"].items():
        middle = statistics.median(values)
        lines.append(f"{kind:<8}{middle:>10.3f}{min(values):>10.3f}{max(values):>10.3f}{middle / base:>10.2f}")
    lines.append("")
    for key, value in result.items():
        if isinstance(value, float):
            lines.append(f"{key:<34}{value:.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default: the preset's)")
    parser.add_argument("--memory-of", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if PRESETS[arguments.preset].device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--preset {arguments.preset} needs a CUDA device and none is available")
    if arguments.memory_of:
        print(json.dumps(measure_memory(PRESETS[arguments.preset], NSPSettings(), arguments.memory_of)))
        return
    result = run(arguments.preset, arguments.rounds)
    print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
