"""A long run watched from inside: does memory grow, do steps slow down?

    python -m benchmarks.load --steps 300 --json load.json

One run of `python -m refine_verl.main` with two CPU workers, validation and checkpoints; after every step a thread of
the driver looks at the memory of the driver, of the workers and of Ray's object store. The slope of each over the steps
is printed with its 95% interval. Exit status 1 if anything grows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.trend import GROWS, Trend, find_trend

MB = 1e6
WORKER = "ray::WorkerDict"
SKIPPED_SHARE = 0.2
"""Of the steps, at the start: allocators fill, pages are touched and threads start once."""
ALLOWED_GROWTH = {"driver": 0.03, "worker": 0.03, "ray": 0.05, "step": 0.10, "processor": 0.10}
"""Growth over the steps looked at that counts as none, as a share of the level."""
LEAST_STEPS = 24
OBJECT_STORE_ALLOWED = 1.0
"""MB over the steps looked at, since the level is near zero."""
RUN = (
    "recipe=quickstart",
    "data.max_length=128",
    "data.train_batch_size=8",
    "data.val_max_samples=16",
    "refine.ppo_mini_batch_size=4",
    "refine.warmup_steps=0",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
)


@dataclass
class Watch(threading.Thread):
    """Looks at this process, its workers and the object store whenever the run has written another step.

    Attributes:
        metrics: the run's metrics.jsonl.
        samples: one per look: ``step``, MB of ``driver``, ``worker/PID``, ``raylet``, ``gcs`` and ``store``, the number
            of ``objects`` in the store and of ``references`` to any, MB ``created`` there so far.
    """

    metrics: Path
    samples: list[dict[str, float]] = field(default_factory=list)
    failure: Exception | None = None

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self.over = threading.Event()
        self.store: Any = None

    def __hash__(self) -> int:
        return id(self)

    def run(self) -> None:
        """Until `stop`."""
        lines = read = 0
        try:
            while not self.over.wait(0.05):
                new = self._read_on(read)
                read += len(new)
                if more := new.count(b"\n"):  # several if looking took longer than a step
                    lines += more
                    self.samples.append({"step": float(lines - 1), **self.look()})
        except Exception as error:  # told by the main thread: a thread's exception would be lost
            self.failure = error

    def _read_on(self, start: int) -> bytes:
        if not self.metrics.is_file():
            return b""
        with self.metrics.open("rb") as file:
            file.seek(start)
            return file.read()

    def stop(self) -> None:
        """End the thread; raises what went wrong in it."""
        self.over.set()
        self.join()
        if self.failure is not None:
            raise self.failure

    def look(self) -> dict[str, float]:
        """Memory now, in MB."""
        this = psutil.Process()
        # what watching itself costs is no part of the run
        found = {"driver": private_mb(this), "processor": processor_seconds(this) - time.thread_time()}
        for process in this.children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if name := role_of(process.cmdline()):
                    if name == "worker":
                        found["processor"] += processor_seconds(process)
                    found[f"worker/{process.pid}" if name == "worker" else name] = private_mb(process)
        return {**found, **self._object_store()}

    def _object_store(self) -> dict[str, float]:
        """What Ray itself counts; the shared memory it has mapped says nothing of what is in use."""
        import ray

        if self.store is None:
            from ray._private.grpc_utils import init_grpc_channel
            from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

            node = next(node for node in ray.nodes() if node["Alive"])
            channel = init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
            self.store = NodeManagerServiceStub(channel)
        from ray.core.generated.node_manager_pb2 import GetNodeStatsRequest

        stats = self.store.GetNodeStats(GetNodeStatsRequest(include_memory_info=True), timeout=30)
        return {
            "store": stats.store_stats.object_store_bytes_used / MB,
            "objects": float(stats.store_stats.num_local_objects),
            "references": float(sum(worker.num_object_refs_in_scope for worker in stats.core_workers_stats)),
            "created": stats.store_stats.cumulative_created_bytes / MB,
        }


def role_of(command: Sequence[str]) -> str | None:
    """`worker`, `raylet` or `gcs` for a process below the driver, None for another one."""
    if not command:
        return None
    if "NSPRolloutWorker" in command[0] or command[0].startswith(WORKER):
        return "worker"
    name = Path(command[0]).name
    return {"raylet": "raylet", "gcs_server": "gcs"}.get(name)


def private_mb(process: psutil.Process) -> float:
    """Memory that this process alone holds; shared pages (libraries, the object store) do not count."""
    info = process.memory_full_info()
    return float(info.uss) / MB


def processor_seconds(process: psutil.Process) -> float:
    """Processor time so far: what a step costs however much else runs on the machine."""
    times = process.cpu_times()
    return times.user + times.system


def tidy(samples: Sequence[dict[str, float]], metrics: Sequence[dict[str, Any]]) -> dict[str, tuple[list, list]]:
    """Series by name, (steps, values): workers in the order of their process ids, ``step`` and ``processor`` in s.

    The processor time of a step is that of driver and workers together; steps with validation or a checkpoint are left
    out.
    """
    workers = sorted({name for sample in samples for name in sample if name.startswith("worker/")})
    names = {"driver": "driver", **{name: f"worker {rank}" for rank, name in enumerate(workers)}}
    names |= {name: name for name in ("raylet", "gcs", "store", "objects", "references")}
    series = {
        shown: (
            [sample["step"] for sample in samples if name in sample],
            [sample[name] for sample in samples if name in sample],
        )
        for name, shown in names.items()
    }
    timed = [record for record in metrics if "timing_s/step" in record]
    series["step"] = ([record["step"] for record in timed], [record["timing_s/step"] for record in timed])
    more = {record["step"] for record in metrics if {"timing_s/validate", "timing_s/save_checkpoint"} & record.keys()}
    pairs = [
        (after["step"], after["processor"] - before["processor"])
        for before, after in itertools.pairwise(samples)
        if after["step"] == before["step"] + 1 and after["step"] not in more
    ]
    series["processor"] = ([step for step, _ in pairs], [seconds for _, seconds in pairs])
    return series


def judge(series: dict[str, tuple[list, list]], skipped: float = SKIPPED_SHARE) -> dict[str, Trend]:
    """The trend of each series without a share of the steps at the start."""
    trends = {}
    for name, (steps, values) in series.items():
        first = int(len(steps) * skipped)
        x, y = steps[first:], values[first:]
        span = max(x) - min(x)
        if name == "store":
            total = OBJECT_STORE_ALLOWED
        elif name in ("objects", "references"):
            total = 10.0
        else:
            kind = re.split(r"\W", name)[0] if re.split(r"\W", name)[0] in ALLOWED_GROWTH else "ray"
            total = ALLOWED_GROWTH[kind] * sorted(y)[len(y) // 2]
        trends[name] = find_trend(x, y, allowed=total / span)
    return trends


def _slope(trend: Trend) -> str:
    slope, low, high = (1000 * value for value in (trend.slope, trend.low, trend.high))
    return f"{slope:+.3g} ({low:+.3g} to {high:+.3g})"


UNITS = {"step": "s", "processor": "s", "objects": "", "references": ""}


def show(trends: dict[str, Trend], late: dict[str, Trend], console: Console) -> None:
    """One row per series; slopes per 1000 steps, without the first fifth and of the second half."""
    table = Table("", "level", "slope per 1000 steps", "allowed", "verdict", "second half")
    for name, trend in trends.items():
        level = f"{trend.level:.4g} {UNITS.get(name, 'MB')}"
        table.add_row(name, level, _slope(trend), f"{1000 * trend.allowed:.3g}", trend.verdict, _slope(late[name]))
    console.print(table)


def hardware() -> dict[str, str]:
    """Where and with what this was measured."""
    import importlib.metadata as metadata

    versions = {name: metadata.version(name) for name in ("refine_verl", "verl", "ray", "torch", "transformers")}
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "python": platform.python_version(),
        **versions,
    }


def run(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Train, watching. Returns ``samples`` of `Watch`, ``metrics`` and ``seconds`` of the run."""
    from refine_verl.main import main as train

    run_dir = directory / "run"
    watch = Watch(run_dir / "metrics.jsonl")
    watch.start()
    started = time.monotonic()
    code = train(
        [
            *RUN,
            f"trainer.total_training_steps={arguments.steps}",
            f"trainer.n_gpus_per_node={arguments.workers}",
            f"trainer.save_freq={arguments.save_every}",
            f"trainer.test_freq={arguments.validate_every}",
            "trainer.max_actor_ckpt_to_keep=2",
            f"trainer.default_local_dir={run_dir}",
            f"data.cache_dir={directory / 'cache'}",
            *arguments.overrides,
        ]
    )
    watch.stop()
    if code:
        raise SystemExit(f"the run ended with exit code {code}")
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {"samples": watch.samples, "metrics": metrics, "seconds": time.monotonic() - started}


def main(argv: Sequence[str] | None = None) -> int:
    """Run, judge, print; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--validate-every", type=int, default=20, help="steps between validations")
    parser.add_argument("--json", type=Path, help="where to write everything that was seen")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="more settings of the run")
    arguments = parser.parse_args(argv)
    if arguments.steps < LEAST_STEPS:
        parser.error(f"--steps {arguments.steps}: a slope needs at least {LEAST_STEPS}")
    # sockets of Ray lie below and their paths are limited to about 100 characters
    directory = Path(tempfile.mkdtemp(prefix="load"))
    os.environ.setdefault("RAY_TMPDIR", str(directory))
    os.environ.pop("RAY_ADDRESS", None)
    try:
        seen = run(arguments, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    series = tidy(seen["samples"], seen["metrics"])
    trends, late = judge(series), judge(series, 0.5)
    console = Console()
    show(trends, late, console)
    if arguments.json:
        content = {
            "arguments": {name: value for name, value in vars(arguments).items() if name != "json"},
            "hardware": hardware(),
            "seconds": seen["seconds"],
            "created_mb_per_step": _created(seen["samples"]),
            "trends": {name: trend.to_json() for name, trend in trends.items()},
            "second_half": {name: trend.to_json() for name, trend in late.items()},
            "series": {name: {"step": x, "value": y} for name, (x, y) in series.items()},
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    growing = [name for name, trend in trends.items() if trend.verdict == GROWS]
    console.print(f"grows: {', '.join(growing)}" if growing else "nothing grows")
    return 1 if growing else 0


def _created(samples: Sequence[dict[str, float]]) -> float:
    """MB put into the object store per step."""
    first, last = samples[0], samples[-1]
    return (last["created"] - first["created"]) / (last["step"] - first["step"])


if __name__ == "__main__":
    sys.exit(main())
