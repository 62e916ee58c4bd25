"""Made-up prompts with answers, and runs on them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from reference.runs import TOY, TOY_DELTANET

TRAIN, TEST = 24, 7


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Keys with values in a row, then a key: the answer is its value. No two prompts have equally many tokens."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        keys = rng.sample("abcdefghijklmnopqrstuvwxyz", 5 + index % 4)
        pairs = [(key, "".join(rng.choices("0123456789", k=2 + index % 2))) for key in keys]
        key, value = rng.choice(pairs)
        prompt = " ".join(f"{k}={v}" for k, v in pairs) + "." * index + f" {key}="
        rows.append(
            {
                "name": f"{seed}-{index}",
                "prompt": prompt,
                "answer": [value, "x"],
                "task": "ruler_squadqa",
                "max_gen_tokens": 2 + index % 3,
            }
        )
    return rows


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_prompts(directory: Path) -> tuple[Path, Path]:
    """A training and a test file; the test set has 7 rows, which no number of workers divides."""
    return (
        write_rows(directory / "prompts.jsonl", make_rows(TRAIN, 1)),
        write_rows(directory / "test_prompts.jsonl", make_rows(TEST, 2)),
    )


def prompt_overrides(recipe: str, directory: Path, run_dir: Path, *more: str) -> list[str]:
    """Arguments of a toy run on prompts; the files lie in ``directory``."""
    dropped = ("refine.warmup_steps", "trainer.test_freq", "data.max_length")
    toy = [item for item in (*TOY_DELTANET, *TOY) if not item.startswith(dropped)]
    files = [f"data.val_files={directory / 'test_prompts.jsonl'}"]
    if not recipe.startswith("ttt"):
        files += [f"data.train_files={directory / 'prompts.jsonl'}", "trainer.test_freq=2", "trainer.save_freq=-1"]
    return [
        f"recipe={recipe}",
        "model=tiny_deltanet",
        *files,
        f"data.cache_dir={directory / 'cache'}",
        f"trainer.default_local_dir={run_dir}",
        "model.activation_checkpointing=none",
        "data.max_length=96",
        "trainer.logger=[]",
        *toy,
        *more,
    ]
