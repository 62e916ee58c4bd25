"""Every phase on a few rows of files of yours, with a small random model: throughput and cost.

    python -m benchmarks.phases --files FILE [FILE ...] [--rows 8] [--phase posttrain ...]

Files are in the format of LongBench or RULER as published with REFINE: columns `prompt`, `answers` or `answer`, `task`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

PHASES = {
    "posttrain": ["recipe=posttrain"],
    "posttrain_nested_sft": ["recipe=posttrain_nested_sft"],
    "posttrain_sft": ["recipe=posttrain_sft"],
    "posttrain_grpo": ["recipe=posttrain", "refine.outer=grpo", "refine.answers.samples=4"],
    "ttt": ["recipe=ttt"],
    "ttt_sft": ["recipe=ttt_sft"],
}
MODEL = ["model=tiny_deltanet", "model.tokenizer=bytes", "model.config.vocab_size=257"]


def take_rows(files: Sequence[Path], rows: int, longest: int, directory: Path) -> Path:
    """The first rows of each file, `rows` in all, whose prompts have at most `longest` bytes."""
    import datasets

    taken: list[dict[str, object]] = []
    share = -(-rows // len(files))
    for file in files:
        kind = "json" if file.suffix == ".jsonl" else "parquet"
        table = datasets.load_dataset(kind, data_files=str(file), split="train")
        short = (row for row in table if len(row["prompt"].encode()) <= longest)
        taken += [
            {"prompt": row["prompt"], "answer": row.get("answers") or row["answer"], "task": row["task"]}
            for _, row in zip(range(share), short, strict=False)
        ]
    if len(taken) < rows:
        raise SystemExit(
            f"only {len(taken)} rows have prompts of at most {longest} bytes; raise --longest or lower --rows"
        )
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in taken[:rows]))
    return path


def measure(phase: str, file: Path, rows: int, longest: int, directory: Path) -> dict[str, float]:
    """Metrics of the last step of a short run."""
    run = directory / phase
    test_time = phase.startswith("ttt")
    files = [f"data.val_files={file}"] if test_time else [f"data.train_files={file}", "trainer.total_training_steps=2"]
    command = [
        *PHASES[phase],
        *MODEL,
        *files,
        f"data.max_length={longest + 1}",
        f"data.train_batch_size={rows}",
        f"refine.ppo_mini_batch_size={max(1, rows // 2)}",
        f"data.cache_dir={directory / 'cache'}",
        f"trainer.default_local_dir={run}",
        "trainer.logger=[]",
        *([] if test_time else ["trainer.save_freq=-1", "trainer.test_freq=-1"]),
    ]
    finished = subprocess.run(
        [sys.executable, "-m", "refine_verl.main", *command], capture_output=True, text=True, check=False
    )
    if finished.returncode:
        raise SystemExit(f"{phase} failed:\n{finished.stdout[-3000:]}{finished.stderr[-3000:]}")
    last = (run / "metrics.jsonl").read_text().splitlines()[-1]
    return {name: value for name, value in json.loads(last).items() if isinstance(value, float)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.phases", description=__doc__)
    parser.add_argument("--files", nargs="+", type=Path, required=True, help="parquet or jsonl files")
    parser.add_argument("--rows", type=int, default=4, help="rows in all, an even number")
    parser.add_argument("--longest", type=int, default=16384, help="longest prompt, in bytes (one token each)")
    parser.add_argument("--phase", nargs="+", choices=PHASES, default=list(PHASES))
    arguments = parser.parse_args(argv)
    directory = Path(tempfile.mkdtemp(prefix="refine-phases-"))
    console = Console()
    table = Table("phase", "tokens/s", "forward tokens per token", "step, s")
    try:
        file = take_rows(arguments.files, arguments.rows, arguments.longest, directory)
        for phase in arguments.phase:
            console.print(f"{phase} ...")  # a run takes minutes where there is no GPU
            found = measure(phase, file, arguments.rows, arguments.longest, directory)
            names = ("perf/tokens_per_second", "perf/forward_tokens_per_token", "timing_s/step")
            table.add_row(phase, *(f"{found[name]:.4g}" for name in names))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
