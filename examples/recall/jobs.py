"""The pieces of work: each trains from one base with one seed, or measures something of it, and returns numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

import refine_verl
from examples.miniature.training import Loop
from examples.recall import noise
from examples.recall.arms import ABLATIONS, BATCH, HEADLINE, MANY_WEIGHTS, SIGNAL, Arm, many
from examples.recall.bases import MODELS, STATES, BaseSpec, train_base
from examples.recall.scores import batches, held_out, score

Weights = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Amount:
    """How much is trained and tested.

    Attributes:
        seeds: each with a base, data and rollouts of its own.
        steps: of the headline.
        ablation_steps: of all other arms; the headline is scored there too.
        held_out: sequences that are scored.
        draws, noise_batch: repetitions from which the noise of gradients is measured, and sequences in each.
        bound_rollouts: n of the upper bound.
        prompts, passes: of test-time training.
        shrink: base models are trained for one step where this one is trained for ``shrink``.
    """

    seeds: int = 5
    steps: int = 60
    ablation_steps: int = 30
    held_out: int = 384
    draws: int = 8
    noise_batch: int = BATCH
    bound_rollouts: int = 64
    prompts: int = 64
    passes: int = 4
    shrink: int = 1


def train(
    spec: BaseSpec, weights: Weights, state: str, arm: Arm, seed: int, marks: Sequence[int], count: int
) -> dict[str, Any]:
    """Train from a base: scores, costs and means of the training's metrics so far at ``marks`` (steps; 0: the base)."""
    actor = spec.actor(weights)
    loop = Loop(actor, arm.settings(state, seed))
    tokens = held_out(spec.task, seed, count)
    result: dict[str, Any] = {"scores": {}, "costs": {}, "training": {}}
    totals: dict[str, float] = {}
    for step, batch in enumerate([None, *batches(spec.task, seed, BATCH, max(marks))]):
        if batch is not None:
            ids = range(step * BATCH, (step + 1) * BATCH)
            for name, value in loop.train(step, spec.task.documents(batch), ids).items():
                totals[name] = totals.get(name, 0.0) + value
        if step in marks:
            result["scores"][str(step)] = score(actor, spec.task, tokens)
            result["costs"][str(step)] = {
                "token_passes": loop.compute.token_passes,
                "processor_seconds": loop.compute.processor_seconds,
            }
            result["training"][str(step)] = {name: value / step for name, value in totals.items()}
    return result


def compare(
    spec: BaseSpec, weights: dict[str, Weights], state: str, seed: int, amount: Amount, arms: Sequence[Arm]
) -> dict[str, Any]:
    """SFT, the first of ``arms``, and others; SFT goes on until it has cost what each of the others did."""
    start, marks = weights[state], [0, amount.ablation_steps, amount.steps]
    sft, *others = arms
    results = {arm.name: train(spec, start, state, arm, seed, marks, amount.held_out) for arm in others}
    per_step = 3.0 * BATCH * spec.task.length
    equal = {
        name: math.ceil(result["costs"][str(amount.steps)]["token_passes"] / per_step)
        for name, result in results.items()
    }
    results["sft"] = train(spec, start, state, sft, seed, sorted({*marks, *equal.values()}), amount.held_out)
    return {"arms": results, "equal_compute": equal}


def ablation(
    spec: BaseSpec, weights: dict[str, Weights], state: str, arm: Arm, seed: int, amount: Amount
) -> dict[str, Any]:
    """One arm, scored after as many steps as all ablations."""
    return train(spec, weights[state], state, arm, seed, [amount.ablation_steps], amount.held_out)


TEST_TIME_LR = 1e-3


def test_time(
    spec: BaseSpec, weights: dict[str, Weights], state: str, method: str, seed: int, amount: Amount
) -> dict[str, Any]:
    """Adapt to prompts in batches of 8 (mini-batches of 4), as in ``examples/test_time``, and write the last value."""
    model = spec.actor(weights[state])
    tokens = held_out(spec.task, seed, amount.prompts)
    length = spec.task.value_length
    config = {
        "method": method,
        "nsp": {"rollout_length": length},
        "steps": amount.passes,
        "lr": TEST_TIME_LR,
        "micro_batch_size": 4,
    }
    right = []
    for start in range(0, len(tokens), 8):
        part = tokens[start : start + 8]
        with refine_verl.adapt(model, part[:, :-length], config) as adapted:
            right.append(torch.stack(adapted.generate(max_new_tokens=length)) == part[:, -length:])
    found = torch.cat(right)
    return {"exact": found.all(dim=1).float().mean().item(), "tokens": found.float().mean().item()}


TEST_TIME = ("none", "sft", "refine")


@dataclasses.dataclass(frozen=True)
class Job:
    """One piece of work; ``kind``: base, headline, signal, bound, ablation, noise or test_time.

    ``what``: an arm, reward or method.
    """

    kind: str
    model: str
    seed: int
    state: str = ""
    what: str = ""

    @property
    def name(self) -> str:
        """Unique; the name of its file."""
        return "-".join(part for part in (self.kind, self.model, self.state, self.what, f"seed{self.seed}") if part)


def all_jobs(models: Sequence[str], amount: Amount) -> list[Job]:
    """Everything, in the order of its importance: a run that is cut short has the headline."""
    seeds = range(amount.seeds)
    jobs = []
    for model in models:
        jobs += [Job("base", model, seed) for seed in seeds]
        jobs += [Job("headline", model, seed, state) for state in STATES for seed in seeds]
    first = models[0]
    jobs += [Job("noise", first, seed, "under", reward) for seed in seeds for reward in NOISE]
    jobs += signal_jobs(first, seeds)
    arms = [(state, arm.name) for table, states in TABLE_STATES.items() for state in states for arm in ABLATIONS[table]]
    # seed by seed, so that what a run that is cut short has are whole tables of fewer seeds
    for seed in seeds:
        jobs += [Job("ablation", first, seed, state, arm) for state, arm in arms]
        jobs += [Job("test_time", first, seed, "under", method) for method in TEST_TIME]
    return jobs


def signal_jobs(model: str, seeds: range) -> list[Job]:
    """Training with less noise, the upper bound, and other weights of the policy loss."""
    jobs = [Job("signal", model, seed, state) for state in STATES for seed in seeds]
    jobs += [Job("bound", model, seed, "under", "binary") for seed in seeds]
    jobs += [Job("bound", model, seed, "plateau", "binary") for seed in seeds[:BOUND_SEEDS]]
    return jobs + [Job("ablation", model, seed, "under", arm.name) for seed in seeds for arm in MANY_WEIGHTS]


BOUND_SEEDS = 2
"""Of the upper bound from the plateau, where arms that cost an eighth of it show no difference with five."""

TABLE_STATES = {
    "n": ("under",),
    "lambda": STATES,
    "reward": STATES,
    "selection": ("under",),
    "k": ("under",),
    "c": ("under",),
    "lr": STATES,
}
NOISE = ("cosine", "binary")
COMPARED = {"headline": HEADLINE, "signal": SIGNAL}
ARMS = {arm.name: arm for arm in [*HEADLINE, *(arm for table in ABLATIONS.values() for arm in table), *MANY_WEIGHTS]}


def run_job(job: Job, amount: Amount, weights: dict[str, Weights]) -> dict[str, Any]:
    """Do it. ``weights``: by state, of the base of this model and seed (empty for the base itself).

    Returns:
        Numbers for JSON; of a base also ``weights``, which are not.
    """
    spec = MODELS[job.model]
    if job.kind == "base":
        return _base(spec, job.seed, amount)
    if job.kind in COMPARED:
        return compare(spec, weights, job.state, job.seed, amount, COMPARED[job.kind])
    if job.kind == "bound":
        arm = many(job.what, amount.bound_rollouts)
        return ablation(spec, weights, job.state, arm, job.seed, amount)
    if job.kind == "noise":
        return noise.measure(spec, weights[job.state], job.what, job.seed, amount.draws, amount.noise_batch)
    if job.kind == "test_time":
        return test_time(spec, weights, job.state, job.what, job.seed, amount)
    return ablation(spec, weights, job.state, ARMS[job.what], job.seed, amount)


def _base(spec: BaseSpec, seed: int, amount: Amount) -> dict[str, Any]:
    short = {name: -(-getattr(spec, name) // amount.shrink) for name in ("easy_steps", "steps", "decay_steps")}
    trained = train_base(dataclasses.replace(spec, **short), seed)
    return {
        "weights": trained.weights,
        "parameters": trained.parameters,
        "steps": trained.steps,
        "attempts": trained.attempts,
        "kept_at": trained.kept_at,
        "curve": trained.curve,
    }
