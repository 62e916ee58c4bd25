"""What the plan takes besides the run's own settings."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import ClassVar

from refine_verl.command.keys import OutputSettings
from refine_verl.config import ConfigError, option
from refine_verl.record.metrics import merge_steps, read_metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanSettings(OutputSettings):
    """Keys of `python -m refine_verl.plan` besides those of the run."""

    SECTION: ClassVar[str] = "plan"

    throughput: float | None = option(None, "document tokens per second of the whole run, for times", above=0)
    measured: str | None = option(
        None, "the same from the JSON of `python -m benchmarks.step_cost`, or from a run's metrics.jsonl"
    )
    memory: float | None = option(
        None, "GiB of one GPU, where the run's GPUs are not in this machine (with trainer.device=cuda)", above=0
    )
    sample: int | None = option(None, "documents to tokenise of each file; the rest is estimated", at_least=1)
    all: bool = option(False, "every key of the configuration (--all)")

    def _check_rules(self) -> None:
        if self.measured and self.throughput:
            raise ConfigError("throughput", "given beside measured=; leave one of them out.")

    def speed(self, workers: int, *, rollouts: bool) -> tuple[float | None, str]:
        """Document tokens per second, None if unknown, and where the number comes from.

        Raises:
            ConfigError: see `measured_throughput`.
        """
        if self.measured:
            return measured_throughput(self.measured, workers, rollouts=rollouts)
        return self.throughput, "as given" if self.throughput else ""


def measured_throughput(file: str, workers: int, *, rollouts: bool) -> tuple[float, str]:
    """Document tokens per second of ``workers`` from a file of measurements.

    Args:
        file: what `python -m benchmarks.step_cost --json FILE` wrote (one process), or the metrics.jsonl of a run.
        workers: of the run that is planned; a benchmark's number is multiplied by it.
        rollouts: whether steps with or without rollouts are planned.

    Raises:
        ConfigError: not such a file.
    """
    path = Path(file).expanduser()
    try:
        if path.suffix == ".jsonl":
            found = [line.get("perf/tokens_per_second") for line in merge_steps(read_metrics(path))]
            speeds = [float(speed) for speed in found if speed]
            return statistics.median(speeds), f"median of {len(speeds)} steps in {file}"
        content = json.loads(path.read_text())
        settings = content["settings"]
        seconds = statistics.median(content["seconds"]["fork" if rollouts else "sft"])
        speed = settings["length"] * settings["documents"] / seconds
        return speed * workers, f"{file}, one process, times {workers} workers"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "measured",
            f"{file} is neither a metrics.jsonl with perf/tokens_per_second nor the JSON of benchmarks.step_cost "
            f"({type(error).__name__}: {error}).",
        ) from error
