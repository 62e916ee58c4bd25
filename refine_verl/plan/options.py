"""What the plan takes besides the run's own settings."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from refine_verl.config import ConfigError
from refine_verl.record.metrics import merge_steps, read_metrics

NUMBERS = ("throughput", "memory", "sample")
WORDS = (*NUMBERS, "measured")
FLAGS = ("--json", "--all")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of `python -m refine_verl.plan`.

    Attributes:
        throughput: document tokens per second of the whole run, None if unknown.
        throughput_from: where that number comes from.
        memory: bytes of one GPU to plan for; None: those of this machine, if it has one.
        sample: read this many documents of each file instead of all.
        json: print JSON instead of tables.
        all: show every key of the configuration, defaults too.
    """

    throughput: float | None = None
    throughput_from: str = ""
    memory: int | None = None
    sample: int | None = None
    json: bool = False
    all: bool = False


def read_options(arguments: Sequence[str]) -> tuple[PlanOptions, list[str], str]:
    """Take the plan's own words out of a command line.

    Returns:
        The options without a measured throughput, the other arguments, and the file of ``measured=`` (or ``""``).

    Raises:
        ConfigError: a value that is no positive number, or both ``throughput=`` and ``measured=``.
    """
    values: dict[str, str] = {}
    rest = []
    for word in arguments:
        name, separator, value = word.partition("=")
        if separator and name in WORDS:
            values[name] = value
        elif word not in FLAGS:
            rest.append(word)
    measured = values.pop("measured", "")
    numbers = {name: _positive(name, value) for name, value in values.items()}
    if measured and "throughput" in numbers:
        raise ConfigError("throughput", "given beside measured=; leave one of them out.")
    options = PlanOptions(
        throughput=numbers.get("throughput"),
        throughput_from="as given" if "throughput" in numbers else "",
        memory=round(numbers["memory"] * 2**30) if "memory" in numbers else None,
        sample=round(numbers["sample"]) if "sample" in numbers else None,
        json="--json" in arguments,
        all="--all" in arguments,
    )
    return options, rest, measured


def _positive(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf") or (name == "sample" and not number.is_integer()):
        unit = {"throughput": "tokens per second", "memory": "GiB", "sample": "a whole number of documents"}[name]
        raise ConfigError(name, f"must be a number greater than 0 ({unit}), got {value!r}.")
    return number


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
