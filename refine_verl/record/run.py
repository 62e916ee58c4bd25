"""A run directory, read for a report: its metrics by step, its settings, its environment."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from refine_verl.config import Refusal
from refine_verl.record.metrics import METRICS_FILE, merge_steps, read_metrics

CONFIG_FILE, ENVIRONMENT_FILE = "config.yaml", "environment.json"
OVERRIDES_FILE = "overrides.yaml"
"""Which keys the command gave, with their values: the recipe too, and nothing that the recipe says."""

logger = logging.getLogger(__name__)


class ReportError(Refusal):
    """There is nothing to report on: the message says what is missing and where it was looked for."""


class NoMetricsError(ReportError):
    """The run has not finished a step."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run directory holds.

    Attributes:
        directory: where it is.
        records: one per step, ordered.
        config, environment, overrides: empty where they are missing or damaged.
        written: when its metrics were last written.
    """

    directory: Path
    records: list[dict[str, Any]]
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    overrides: Mapping[str, Any]
    written: datetime

    @property
    def name(self) -> str:
        """The experiment's, or the directory's."""
        return str(lookup(self.config, "trainer.experiment_name") or self.directory.resolve().name)

    @property
    def progress(self) -> str:
        """`30 of 60 steps` where steps are missing, else `60 steps`."""
        last = self.records[-1]["step"]
        total = lookup(self.config, "trainer.total_training_steps")
        if isinstance(total, int) and last < total:
            return f"{last} of {total} steps"
        return f"{last} steps" if last != 1 else "1 step"


def read_run(directory: Path) -> Run:
    """Read a run, finished, interrupted or still running.

    Raises:
        NoMetricsError: the directory has no metrics.
        MetricsError: its metrics file is damaged.
    """
    metrics_path = directory / METRICS_FILE
    if not metrics_path.is_file():
        raise NoMetricsError(f"{directory}: no {METRICS_FILE} there; give the directory of a run that has started")
    records = merge_steps(read_metrics(metrics_path))
    if not records:
        raise NoMetricsError(f"{metrics_path}: no complete line yet; wait for the first step")
    return Run(
        directory=directory,
        records=records,
        config=_load(directory / CONFIG_FILE, yaml.safe_load, "settings"),
        environment=_load(directory / ENVIRONMENT_FILE, json.loads, "environment"),
        overrides=_load(directory / OVERRIDES_FILE, yaml.safe_load, "overrides"),
        written=datetime.fromtimestamp(metrics_path.stat().st_mtime, tz=timezone.utc),
    )


def _load(path: Path, parse: Callable[[str], Any], what: str) -> dict[str, Any]:
    """What a side file holds; a damaged one costs the report a section, not the page."""
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, ValueError) as error:
        logger.warning("%s: not read, the report shows no %s: %s", path, what, error)
        return {}
    return content if isinstance(content, dict) else {}


def lookup(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, None where there is none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
