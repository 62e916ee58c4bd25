"""What generating from the state costs beside regenerating the whole sequence for every token.

    python -m benchmarks.generation --preset cpu_lact --json generation.json

Both write greedily after the same prompt, in one process, taking turns. ``state`` reads the prompt once and then one
token at a time. ``regenerate`` runs the model over everything again for each token and keeps nothing, as the authors'
code does. Its cost grows evenly with the length, so by default a sample of the tokens, spread over the whole range,
is timed and scaled up (``--sample 0`` times every token). Each sampled token must also be what the slow way would
have written, or nothing is reported. Needs torch, transformers and fla only.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig

from benchmarks.step_cost import PRESETS, Preset
from refine_verl.models import load_model

# How far below the largest logit a written token may lie: float32 sums in another order, or bf16 products.
LIMITS = {"cpu": 1e-3, "cuda": 0.1}


class Generation:
    """One model and one prompt.

    Args:
        preset: the model and the device.
        prompt: tokens before the first that is written.
        new: tokens to write.
    """

    def __init__(self, preset: Preset, prompt: int, new: int, seed: int = 0) -> None:
        self.device, self.new = preset.device, new
        config = AutoConfig.for_model(preset.model_type, fuse_cross_entropy=False, **preset.model)
        dtype = torch.bfloat16 if preset.device == "cuda" else torch.float32
        self.model: Any = load_model(None, config=config, dtype=dtype, seed=seed).to(preset.device).eval()
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, preset.model["vocab_size"], (1, prompt), generator=generator)
        self.prompt = tokens.to(preset.device)

    @torch.no_grad()
    def from_state(self) -> Tensor:
        """Prompt and all new tokens, [1, prompt + new]."""
        # no token ends the text: both ways write all of it
        return self.model.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            max_new_tokens=self.new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )

    @torch.no_grad()
    def regenerate(self, tokens: Tensor) -> Tensor:
        """Logits [vocabulary] of the token after ``tokens`` [1, L], from nothing."""
        return self.model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[0, -1]

    def seconds(self, work: Callable[[], Tensor]) -> tuple[float, Tensor]:
        if self.device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        result = work()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started, result


def sampled_steps(new: int, sample: int) -> list[int]:
    """``sample`` of the ``new`` tokens (0: all), in the middles of equal stretches of them."""
    if not 0 < sample < new:
        return list(range(new))
    return [int((i + 0.5) * new / sample) for i in range(sample)]


def run(name: str, prompt: int, new: int, sample: int, rounds: int) -> dict[str, Any]:
    """Time both ways.

    Raises:
        SystemExit: they do not write the same tokens.
    """
    bench = Generation(PRESETS[name], prompt, new)
    written = bench.from_state()  # also warms up
    if written.shape[1] != prompt + new:
        raise SystemExit(f"{written.shape[1] - prompt} of {new} tokens were written; nothing was timed")
    steps = sampled_steps(new, sample)
    bench.regenerate(written[:, :prompt])
    fast: list[float] = []
    slow: list[float] = []
    gap = 0.0
    for turn in range(rounds):
        fast.append(bench.seconds(bench.from_state)[0])
        for step in steps[turn::rounds]:
            before = written[:, : prompt + step]
            spent, logits = bench.seconds(lambda tokens=before: bench.regenerate(tokens))  # type: ignore[misc]
            slow.append(spent)
            gap = max(gap, (logits.max() - logits[written[0, prompt + step]]).item())
    if gap > LIMITS[bench.device]:
        raise SystemExit(f"a token written from the state has a logit {gap:.3g} below the largest; nothing is reported")
    state, regenerate = statistics.median(fast), new * statistics.fmean(slow)
    return {
        "regenerate_over_state": regenerate / state,
        "state_s": state,
        "state_min_s": min(fast),
        "state_max_s": max(fast),
        "regenerate_s": regenerate,
        "regenerate_timed_s": sum(slow),
        "tokens_per_second": new / state,
        "largest_logit_gap": gap,
        "regenerated_tokens_timed": len(slow),
        "settings": {"preset": name, "prompt": prompt, "new": new, "rounds": rounds, **PRESETS[name].model},
        "environment": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if bench.device == "cuda" else platform.processor() or "cpu",
        },
    }


def table(result: dict[str, Any]) -> str:
    """The figures as text, with what was timed and what was scaled."""
    new, timed = result["settings"]["new"], result["regenerated_tokens_timed"]
    scaled = f"every one of {new} tokens timed" if timed == new else f"scaled from {timed} of {new} tokens"
    lines = [f"{key:<26}{value:.4g}" for key, value in result.items() if isinstance(value, float)]
    return "\n".join([*lines, f"(regenerate_s: {scaled})"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = [name for name, preset in PRESETS.items() if preset.model_type == "lact_swiglu"]
    parser.add_argument("--preset", choices=presets, default="cpu_lact")
    parser.add_argument("--prompt", type=int, default=4096, help="tokens before the first new one (default 4096)")
    parser.add_argument("--new", type=int, default=256, help="tokens to write (default 256)")
    parser.add_argument("--sample", type=int, default=15, help="tokens to regenerate for (default 15; 0: all)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of both ways (default 3)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    if min(arguments.prompt, arguments.new, arguments.rounds) < 1 or arguments.sample < 0:
        parser.error("--prompt, --new and --rounds must be at least 1, --sample at least 0")
    if PRESETS[arguments.preset].device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--preset {arguments.preset} needs a CUDA device and none is available")
    result = run(arguments.preset, arguments.prompt, arguments.new, arguments.sample, arguments.rounds)
    print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
