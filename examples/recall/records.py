"""Results as the page asks for them: scores by model, state, arm and step, one value per seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from examples.miniature.statistics import Estimate, estimate, paired

Scores = dict[str, float]
"""A value for each seed."""


class Records:
    """The jobs of a ``results.json``; what is not there (yet) is empty."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.results = results
        self.jobs: dict[tuple[str, str, str, str], dict[str, Any]] = {}
        for record in results["jobs"]:
            key = (record["kind"], record["model"], record["state"], record["what"])
            self.jobs.setdefault(key, {})[str(record["seed"])] = record["result"]

    def of(self, kind: str, model: str, state: str = "", what: str = "") -> dict[str, Any]:
        """Results by seed."""
        return self.jobs.get((kind, model, state, what), {})

    def showing(self, kind: str) -> Records:
        """These records with the comparison ``kind`` as their headline."""
        jobs = [job for job in self.results["jobs"] if job["kind"] == kind]
        return Records({**self.results, "jobs": [{**job, "kind": "headline"} for job in jobs]})

    def arm(self, model: str, state: str, arm: str) -> dict[str, Any]:
        """What training an arm gave, by seed: of the headline where it is one of its methods."""
        runs = self.of("headline", model, state)
        found = {seed: result["arms"][arm] for seed, result in runs.items() if arm in result["arms"]}
        return found or self.of("ablation", model, state, arm)

    def scores(self, model: str, state: str, arm: str, step: int, metric: str) -> Scores:
        """A score of an arm after ``step`` steps."""
        runs = self.arm(model, state, arm)
        return {seed: run["scores"][str(step)][metric] for seed, run in runs.items() if str(step) in run["scores"]}

    def training(self, model: str, state: str, arm: str, step: int, metric: str) -> Scores:
        """The mean over an arm's first ``step`` steps of training."""
        runs = self.arm(model, state, arm)
        means = {seed: run["training"].get(str(step), {}) for seed, run in runs.items()}
        return {seed: found[metric] for seed, found in means.items() if metric in found}

    def equal_compute(self, model: str, state: str, arm: str, metric: str) -> Scores:
        """A score of SFT after as many steps as cost what the arm's headline run did."""
        found = {}
        for seed, run in self.of("headline", model, state).items():
            step = str(run["equal_compute"][arm])
            found[seed] = run["arms"]["sft"]["scores"][step][metric]
        return found

    def costs(self, model: str, state: str, arm: str, step: int, metric: str) -> Scores:
        """``token_passes`` or ``processor_seconds`` up to a step."""
        runs = self.arm(model, state, arm)
        return {seed: run["costs"][str(step)][metric] for seed, run in runs.items() if str(step) in run["costs"]}


def mean(values: Mapping[str, float], digits: int = 3) -> str:
    """For a table; empty where there is no value."""
    return estimate(list(values.values())).text(digits) if values else ""


def difference(first: Mapping[str, float], second: Mapping[str, float]) -> Estimate | None:
    """Paired over common seeds; None where there are none."""
    return paired(first, second) if first.keys() & second.keys() else None


def shown(one: Estimate | None, digits: int = 3) -> str:
    """A difference for a table, in bold where its interval leaves zero out."""
    if one is None:
        return ""
    text = one.text(digits, signed=True).replace("-", "\u2212")
    return f"**{text}**" if one.sign else text
