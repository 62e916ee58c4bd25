"""Tokens per second of answers: this package beside vLLM, and from where on vLLM pays.

    python -m benchmarks.answers --batches 1,8,32 --lengths 128:64,1024:64 --json answers.json

Both write the same number of greedy tokens after the same prompts, in one process, taking turns; the time to read the
prompts counts. ``own`` keeps the model's state as evaluation and training do; ``vllm`` is the engine of ``engine=vllm``
without prefix caching, which would find every prompt of the turn before. Each ratio is of one run. The models have
random weights, large enough that tokens are predicted with some confidence; unless most first tokens of both are the
same, nothing is reported. Needs vLLM (docs/vllm.md), beside torch, transformers and fla.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig

import refine_verl
from benchmarks.step_cost import PRESETS
from refine_verl.command.front import say_error
from refine_verl.config import Refusal
from refine_verl.models import load_model
from refine_verl.models.loading import DTYPES, dtype_of
from refine_verl.serving.distribution import installed_vllm
from refine_verl.serving.engine import Engine, EngineSettings, require_vllm, served_dtype

HEAD = 128
INITIALIZER_RANGE = 0.15
ALIKE = 0.5
"""Least share of first tokens that must be the same. bfloat16 exchanges near ties; wrong weights agree on none."""


@dataclasses.dataclass(frozen=True)
class Size:
    """Tokens of a prompt, and of an answer."""

    prompt: int
    answer: int

    def __str__(self) -> str:
        return f"{self.prompt}:{self.answer}"


@dataclasses.dataclass(frozen=True)
class Timed:
    """One batch at one size.

    Attributes:
        batch, size: sequences at a time, and their tokens.
        own_s, vllm_s: seconds of each turn.
        alike: share of answers whose first tokens are the same.
    """

    batch: int
    size: Size
    own_s: list[float]
    vllm_s: list[float]
    alike: float

    def tokens_per_second(self, which: str) -> float:
        """Tokens of answers, by the median of the turns."""
        return self.batch * self.size.answer / statistics.median(getattr(self, f"{which}_s"))

    @property
    def ratio(self) -> float:
        """How many times as many vLLM writes."""
        return self.tokens_per_second("vllm") / self.tokens_per_second("own")


def pays_from(timed: Sequence[Timed], size: Size) -> int | None:
    """The smallest batch from which on vLLM is faster at every larger one, too; None where it is not at the largest."""
    found = None
    for one in sorted((one for one in timed if one.size == size), key=lambda one: -one.batch):
        if one.ratio <= 1:
            break
        found = one.batch
    return found


def tokens_until_start_is_paid(one: Timed, start_s: float) -> float | None:
    """How many tokens have to be written before vLLM has made up for its start; None: never."""
    saved = 1 / one.tokens_per_second("own") - 1 / one.tokens_per_second("vllm")
    return start_s / saved if saved > 0 else None


def run(
    model: dict[str, Any],
    device: str,
    *,
    batches: Sequence[int],
    sizes: Sequence[Size],
    rounds: int,
    dtype: str = "auto",
    eager: bool | None = None,
) -> dict[str, Any]:
    """Time both ways.

    Args:
        model: configuration of a DeltaNet.
        device: `cpu` or `cuda`.
        batches, sizes: all pairs of them are timed.
        rounds: turns of both ways.
        dtype: of this package's weights; vLLM's is `auto`.
        eager: see `EngineSettings`.

    Raises:
        SystemExit: they do not write the same first tokens.
    """
    require_vllm("benchmarks.answers")
    own_dtype = dtype_of(dtype, torch.device(device))
    with tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.for_model(
            "delta_net", fuse_cross_entropy=False, initializer_range=INITIALIZER_RANGE, **model
        )
        made = load_model(None, config=config)
        made.save_pretrained(folder)
        own = made.to(device, own_dtype).eval()
        settings = EngineSettings(
            model=folder,
            tokens=max(size.prompt + size.answer for size in sizes),
            sequences=max(batches),
            keep_states=False,
            eager=eager,
        )
        served = served_dtype(folder, "delta_net", "auto", key="model")
        started = time.perf_counter()
        engine = Engine(settings, "delta_net")
        start_s = time.perf_counter() - started
        try:
            timed = [
                _time(own, engine, batch, size, rounds, model["vocab_size"]) for size in sizes for batch in batches
            ]
        finally:
            engine.close()
    return {
        "start_s": start_s,
        "timed": [
            {**dataclasses.asdict(one), "ratio": one.ratio}
            | {f"{which}_tokens_per_s": one.tokens_per_second(which) for which in ("own", "vllm")}
            | {"tokens_until_start_is_paid": tokens_until_start_is_paid(one, start_s)}
            for one in timed
        ],
        "pays_from_batch": {str(size): pays_from(timed, size) for size in sizes},
        "settings": {
            "model": model,
            "rounds": rounds,
            "own_dtype": str(own_dtype).removeprefix("torch."),
            "vllm_dtype": served,
            "vllm_eager": eager if eager is not None else device == "cpu",
        },
        "environment": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "vllm": " ".join(installed_vllm() or ()),
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu",
            "load": os.getloadavg()[0],
        },
    }


def _time(own: torch.nn.Module, engine: Engine, batch: int, size: Size, rounds: int, vocabulary: int) -> Timed:
    generator = torch.Generator().manual_seed(batch)
    prompts = [torch.randint(2, vocabulary, (size.prompt,), generator=generator) for _ in range(batch)]
    rows = [prompt.tolist() for prompt in prompts]

    def by_state() -> list[list[int]]:
        with refine_verl.adapt(own, prompts, {"method": "none"}) as session:
            answers: list[Tensor] = session.generate(max_new_tokens=size.answer, stop_tokens=(), batch_size=batch)
            return [answer.tolist() for answer in answers]

    def by_vllm() -> list[list[int]]:
        written = {answer.row: answer.tokens for answer in engine.write(rows, [size.answer] * batch)}
        return [written[row] for row in range(batch)]

    times: dict[str, list[float]] = {"own": [], "vllm": []}
    for turn in range(rounds + 1):  # the first warms up
        found = {}
        for which, work in (("own", by_state), ("vllm", by_vllm)):
            spent, found[which] = _seconds(work)
            times[which] += [spent] * bool(turn)
    for which, answers in found.items():
        if any(len(answer) != size.answer for answer in answers):
            raise SystemExit(f"{which} did not write {size.answer} tokens after each prompt; nothing is reported")
    alike = statistics.fmean(one[0] == other[0] for one, other in zip(*found.values(), strict=True))
    if batch >= 8 and alike < ALIKE:
        raise SystemExit(f"only {alike:.0%} of the first tokens of both are the same; nothing is reported")
    return Timed(batch, size, times["own"], times["vllm"], alike)


def _seconds(work: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    started = time.perf_counter()
    found = work()  # tokens are Python's numbers by then: a GPU has finished
    return time.perf_counter() - started, found


def table(result: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [f"{'prompt:answer':<16}{'batch':>6}{'own tok/s':>12}{'vLLM tok/s':>12}{'ratio':>8}{'same first':>12}"]
    for one in result["timed"]:
        lines.append(
            f"{one['size']['prompt']}:{one['size']['answer']:<12}{one['batch']:>6}{one['own_tokens_per_s']:>12.1f}"
            f"{one['vllm_tokens_per_s']:>12.1f}{one['ratio']:>8.2f}{one['alike']:>12.0%}"
        )
    lines.append("")
    for size, batch in result["pays_from_batch"].items():
        lines.append(f"{size}: " + (f"vLLM pays from batch {batch} on" if batch else "vLLM does not pay"))
    paid = [one["tokens_until_start_is_paid"] for one in result["timed"] if one["tokens_until_start_is_paid"]]
    if paid:
        lines.append(
            f"Its start, {result['start_s']:.1f} s, is made up for by {min(paid):,.0f} tokens at the best of these."
        )
    own, served = result["settings"]["own_dtype"], result["settings"]["vllm_dtype"]
    lines.append(f"(own in {own}, vLLM in {served}, {result['environment']['threads']} threads)")
    return "\n".join(lines)


def _sizes(text: str) -> list[Size]:
    return [Size(*map(int, item.split(":"))) for item in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = [name for name, preset in PRESETS.items() if preset.model_type == "delta_net" and name != "tiny"]
    parser.add_argument("--preset", choices=presets, default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden", type=int, help=f"width of the model, heads of {HEAD} (default: the preset's)")
    parser.add_argument("--layers", type=int, help="layers of the model (default: the preset's)")
    parser.add_argument("--batches", default="1,4,16,64", help="sequences at a time (default 1,4,16,64)")
    parser.add_argument("--lengths", default="128:64,1024:64", help="PROMPT:ANSWER,... (default 128:64,1024:64)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of both ways (default 3)")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="of this package's weights")
    parser.add_argument("--compile", action="store_true", help="vLLM with torch.compile also on a CPU")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    try:
        batches, sizes = [int(item) for item in arguments.batches.split(",")], _sizes(arguments.lengths)
    except (TypeError, ValueError):
        parser.error("--batches is N,N,... and --lengths PROMPT:ANSWER,PROMPT:ANSWER,...")
    sections = [arguments.rounds, *batches, *(number for size in sizes for number in dataclasses.astuple(size))]
    if min(sections) < 1:
        parser.error("all numbers must be at least 1")
    preset = PRESETS[arguments.preset]
    model = dict(preset.model)
    if arguments.hidden:
        if arguments.hidden % HEAD:
            parser.error(f"--hidden must be a multiple of {HEAD}")
        model |= {"hidden_size": arguments.hidden, "num_heads": arguments.hidden // HEAD}
    if arguments.layers:
        model["num_hidden_layers"] = arguments.layers
    # one process: an engine's own would wait for work on the cores on which the other way is timed
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    eager = False if arguments.compile else None
    try:
        result = run(
            model,
            preset.device,
            batches=batches,
            sizes=sizes,
            rounds=arguments.rounds,
            dtype=arguments.dtype,
            eager=eager,
        )
    except Refusal as error:
        return say_error(str(error), 2)
    print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
