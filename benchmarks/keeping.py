"""What questions about a document cost from its state, beside reading the document again for each of them.

    python -m benchmarks.keeping --json keeping.json

Both answer the same questions greedily in one process, taking turns, `--together` of them at a time. ``state`` reads
the document once (its time counts), ``reading`` reads document and question for every question. Needs torch,
transformers and fla only.
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

import refine_verl
from benchmarks.step_cost import PRESETS, Preset
from refine_verl.models import load_model

Settings = dict[str, int]


def make(preset: Preset, settings: Settings) -> tuple[Any, Tensor, list[Tensor]]:
    """A model with random weights, a document and questions."""
    config = AutoConfig.for_model(preset.model_type, fuse_cross_entropy=False, **preset.model)
    generator = torch.Generator().manual_seed(0)
    lengths = [settings["document"], *[settings["question"]] * settings["questions"]]
    rows = [torch.randint(0, preset.model["vocab_size"], (length,), generator=generator) for length in lengths]
    return load_model(None, config=config).to(preset.device).eval(), rows[0], rows[1:]


def run(name: str, settings: Settings, rounds: int) -> dict[str, Any]:
    """Time both ways.

    Raises:
        SystemExit: they do not write the same answers.
    """
    model, document, questions = make(PRESETS[name], settings)
    how: dict[str, Any] = {"max_new_tokens": settings["answer"], "stop_tokens": (), "batch_size": settings["together"]}

    def from_state() -> list[Tensor]:
        return [answer.tokens for answer in refine_verl.remember(model, [document]).ask(questions, **how)]

    def reading() -> list[Tensor]:
        joined = [torch.cat([document, question]) for question in questions]
        with refine_verl.adapt(model, joined, {"method": "none"}) as adapted:
            return list(adapted.generate(**how))

    times: dict[str, list[float]] = {"state": [], "reading": []}
    for turn in range(rounds + 1):  # the first warms up
        written = []
        for which, work in (("state", from_state), ("reading", reading)):
            spent, answers = _timed(work)
            written.append(torch.cat(answers))
            times[which] += [spent] * bool(turn)
        if not torch.equal(*written):
            raise SystemExit("the two ways do not write the same answers; nothing is reported")
    state, again = (statistics.median(times[which]) for which in ("state", "reading"))
    return {
        "reading_over_state": again / state,
        "state_s": state,
        "reading_s": again,
        "settings": {"preset": name, "rounds": rounds, **settings, **PRESETS[name].model},
        "environment": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
    }


def _timed(work: Callable[[], list[Tensor]]) -> tuple[float, list[Tensor]]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, [row.cpu() for row in result]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = [name for name, preset in PRESETS.items() if preset.device == "cpu"]
    parser.add_argument("--preset", choices=presets, default="cpu")
    sizes = {"document": 4096, "questions": 16, "question": 16, "answer": 8, "together": 8}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--rounds", type=int, default=3, help="turns of both ways (default 3)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    settings = {name: getattr(arguments, name) for name in sizes}
    if min(arguments.rounds, *settings.values()) < 1:
        parser.error("all numbers must be at least 1")
    result = run(arguments.preset, settings, arguments.rounds)
    for key in ("reading_over_state", "state_s", "reading_s"):
        print(f"{key:<20}{result[key]:.4g}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
