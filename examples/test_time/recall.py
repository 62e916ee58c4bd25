"""Test-time training on a small recall task: REFINE against the next-token loss and against no training at all.

    python examples/test_time/recall.py --fast

A prompt is a store of entries (a key and a value of four tokens each), then the same entries asked for and answered in
another order, three times over. It ends with a key, and the model has to write that key's value. A small DeltaNet is
trained on such prompts, but not for long enough; then ``refine_verl.adapt`` trains it on each batch of test prompts
before it answers them, and takes its weights back. Every figure is a mean over seeds with its 95% interval; a seed
decides about the base model and the test prompts.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig

import refine_verl
from refine_verl.models import load_model

ENTRIES, VALUE_LENGTH, ROUNDS = 8, 4, 3
KEYS, VALUES = 32, 64
VOCABULARY = KEYS + VALUES
# Two-sided 95% quantiles of Student's t for 1, 2, ... degrees of freedom.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


@dataclass(frozen=True)
class Preset:
    """How much is trained and tested. ``lr`` is that of test-time training, far above the paper's 1e-6."""

    # (entries of a prompt, share of right tokens at which training stops): easy prompts first, then the real ones,
    # but only until half of what could be known is right.
    curriculum: tuple[tuple[int, float], ...] = ((2, 0.9), (ENTRIES, 0.5))
    most_base_steps: int = 800
    base_batch: int = 16
    base_lr: float = 5e-3
    test_prompts: int = 256
    seeds: int = 5
    passes: int = 8
    lr: float = 1e-3


PRESETS = {"full": Preset(), "fast": Preset(test_prompts=64)}


def sample(generator: torch.Generator, rows: int, entries: int = ENTRIES) -> tuple[Tensor, Tensor]:
    """Prompts [rows, T] and the values to be written [rows, 4]."""
    keys = torch.stack([torch.randperm(KEYS, generator=generator)[:entries] for _ in range(rows)])
    values = KEYS + torch.randint(0, VALUES, (rows, entries, VALUE_LENGTH), generator=generator)
    store = torch.cat([keys[..., None], values], dim=-1)
    parts = [store]
    for _ in range(ROUNDS):
        order = torch.stack([torch.randperm(entries, generator=generator) for _ in range(rows)])
        parts.append(store.gather(1, order[..., None].expand_as(store)))
    text = torch.cat(parts, dim=1).flatten(1)
    return text[:, :-VALUE_LENGTH], text[:, -VALUE_LENGTH:]


def train_base(preset: Preset, seed: int) -> Any:
    """An under-trained model: the next-token loss, mostly on the values that are asked for."""
    config = AutoConfig.for_model(
        "delta_net",
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_heads=2,
        fuse_cross_entropy=False,
        eos_token_id=None,
        bos_token_id=None,
    )
    model: Any = load_model(None, config=config, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=preset.base_lr, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    step = 0
    for entries, enough in preset.curriculum:
        recent: list[float] = []
        while step < preset.most_base_steps and statistics.fmean(recent[-5:] or [0.0]) < enough:
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = preset.base_lr * min(1.0, step / 50)
            text = torch.cat(sample(generator, preset.base_batch, entries), dim=1)
            loss, right = _next_tokens(model, text, entries)
            recent.append(right)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return model.eval()


def _next_tokens(model: Any, text: Tensor, entries: int) -> tuple[Tensor, float]:
    """Loss, and the share of right tokens among those that can be known.

    The store is random and so is which key comes next: nothing can predict these tokens, and they weigh a tenth.
    """
    place = torch.arange(1, text.shape[1])
    known = place.ge(entries * (1 + VALUE_LENGTH)) & (place % (1 + VALUE_LENGTH) != 0)
    weight = torch.where(known, 1.0, 0.1)
    logits = model(input_ids=text, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), text[:, 1:], reduction="none")
    right = (logits.argmax(dim=-1) == text[:, 1:])[:, known].float().mean().item()
    return (losses * weight).sum() / (weight.sum() * len(text)), right


def settings(method: str, preset: Preset) -> dict[str, Any]:
    """The paper's test-time settings, with rollouts as long as a value and a learning rate for so small a model."""
    return {
        "method": method,
        "nsp": {"rollout_length": VALUE_LENGTH},
        "steps": preset.passes,
        "lr": preset.lr,
        "micro_batch_size": 4,
    }


def evaluate(model: Any, config: dict[str, Any], preset: Preset, seed: int) -> dict[str, float]:
    """Share of values written without a mistake, and of single tokens; batches of 8 prompts, as in the paper."""
    prompts, wanted = sample(torch.Generator().manual_seed(10_000 + seed), preset.test_prompts)
    exact = tokens = 0.0
    for start in range(0, len(prompts), 8):
        rows = slice(start, start + 8)
        with refine_verl.adapt(model, prompts[rows], config) as adapted:
            written = torch.stack(adapted.generate(max_new_tokens=VALUE_LENGTH))
        right = written == wanted[rows]
        exact += right.all(dim=1).sum().item()
        tokens += right.float().mean(dim=1).sum().item()
    return {"exact": exact / len(prompts), "tokens": tokens / len(prompts)}


def interval(values: list[float]) -> str:
    """Mean and half the width of its 95% interval (Student's t)."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = STUDENT[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.3f} ± {half:.3f}"


METHODS = {"no test-time training": "none", "TTT with SFT": "sft", "TTT with REFINE": "refine"}


def run(preset: Preset) -> dict[str, dict[str, list[float]]]:
    """Scores of every method, one per seed; all methods answer the same prompts with the same base model."""
    scores: dict[str, dict[str, list[float]]] = {name: {"exact": [], "tokens": []} for name in METHODS}
    for seed in range(preset.seeds):
        model = train_base(preset, seed)
        for name, method in METHODS.items():
            for key, value in evaluate(model, settings(method, preset), preset, seed).items():
                scores[name][key].append(value)
        print(f"seed {seed}: " + ", ".join(f"{name} {values['exact'][-1]:.3f}" for name, values in scores.items()))
    return scores


def table(scores: dict[str, dict[str, list[float]]]) -> str:
    """Means and, because all methods meet the same prompts, the interval of the paired difference to REFINE."""
    lines = ["| | exact value | single tokens | exact, REFINE minus this |", "| --- | --- | --- | --- |"]
    refined = scores["TTT with REFINE"]["exact"]
    for name, values in scores.items():
        gain = [a - b for a, b in zip(refined, values["exact"], strict=True)]
        difference = "" if values["exact"] is refined else interval(gain)
        lines.append(f"| {name} | {interval(values['exact'])} | {interval(values['tokens'])} | {difference} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="64 test prompts per seed instead of 256")
    parser.add_argument("--seeds", type=int, choices=range(1, len(STUDENT) + 2), help="default: 5")
    parser.add_argument("--passes", type=int, help=f"over each batch of prompts; default: {Preset.passes}")
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # random weights are the point here
    preset = PRESETS["fast" if arguments.fast else "full"]
    preset = replace(preset, seeds=arguments.seeds or preset.seeds, passes=arguments.passes or preset.passes)
    started = time.perf_counter()
    scores = run(preset)
    print(f"\n{table(scores)}\n\n{time.perf_counter() - started:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    main()
