"""What is run, in the order of its importance; every finished piece is a file, so that a cut run resumes."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from examples.miniature.pieces import Pieces, digest, rounded, write_json
from examples.text.arms import ESTIMATORS, MANY_METHODS, METHODS, PAPER, POSITION, SFT, Method, Training, run
from examples.text.base import Base, BaseSettings, load_base, save_base, train_base
from examples.text.corpus import Corpus, load_corpus
from examples.text.scores import all_scores
from examples.text.signal import gradient_signal

VERSIONS = ("torch", "transformers", "flash-linear-attention")


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        base, training: settings of every base and of every mid-training run.
        length: T.
        held_out: windows of the test text, and of the validation text for the sweeps.
        bases: base models.
        seeds: mid-training runs from each of them; a seed is an order of the windows and all random draws.
        lrs: learning rates at which all methods are compared.
        sweep_lr, sweep: learning rate and lambda_RL of the sweeps, on the validation text, one seed per base.
        lr_sweep: learning rates of SFT and of REFINE with the paper's other settings, the same way.
        temperatures: at which base models are scored on the test text: what sharper predictions alone are worth.
        signal_batches: mini-batches from which the signal in gradients is measured.
        many_steps: optimiser steps of the runs with many rollouts and of SFT beside them.
        many_seeds: of these runs from each base.
    """

    base: BaseSettings
    training: Training
    length: int = 256
    held_out: int = 96
    bases: int = 1
    seeds: int = 5
    lrs: tuple[float, ...] = (2e-4,)
    sweep_lr: float = 2e-4
    sweep: tuple[float, ...] = (0.2, 1.0, 5.0)
    lr_sweep: tuple[float, ...] = (1e-3,)
    temperatures: tuple[float, ...] = (0.99, 0.98, 0.97)
    signal_batches: int = 16
    many_steps: int = 48
    many_seeds: int = 5


PLANS = {
    "full": Plan(BaseSettings(steps=2400), Training()),
    "fast": Plan(
        BaseSettings(hidden=64, steps=300, validate_every=100, validate_on=16),
        Training(steps=16, batch=16, mini_batch=4),
        held_out=24,
        bases=1,
        seeds=2,
        lrs=(2e-4,),
        sweep_lr=2e-4,
        sweep=(0.2, 1.0),
        lr_sweep=(),
        signal_batches=4,
        many_steps=8,
        many_seeds=2,
    ),
}


def collect(plan: Plan, out: Path, corpus: Corpus | None = None, only_many: bool = False) -> dict[str, Any]:
    """Run what is not there yet and write ``results.json`` anew after every piece.

    Args:
        plan: what to run.
        out: directory for tokens, weights, records and results.
        corpus: the text; default: the standard library's sources.
        only_many: leave out all but the runs with many rollouts and the gradients.

    Returns:
        ``plan``, ``versions``, ``corpus``, ``bases``, ``runs``, ``sweep``, ``sharpened``, ``signal``, ``many`` (runs),
        as in ``results.json``.
    """
    out.mkdir(parents=True, exist_ok=True)
    corpus = corpus or load_corpus(out, plan.base.vocabulary, plan.length, plan.held_out)
    results: dict[str, Any] = {
        "plan": asdict(plan),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}},
        "corpus": {
            "fingerprint": corpus.fingerprint,
            **{part: len(getattr(corpus, part)) for part in ("train", "validation", "test")},
        },
        "bases": [],
        "runs": [],
        "sweep": [],
        "sharpened": [],
        "signal": [],
        "many": [],
    }
    work = _Work(plan, corpus, out, results)
    for index in range(plan.bases):
        work.base(index)
    if only_many:
        work.many()
        work.signals()
        return results
    for place, lr in enumerate(plan.lrs):
        for seed in range(plan.seeds):
            for index in range(plan.bases):
                work.compare(index, seed, lr)
        if not place:
            work.signals()
            work.sharpen()
            work.sweeps()
            work.many()
    return results


class _Work:
    """The pieces, with what they share."""

    def __init__(self, plan: Plan, corpus: Corpus, out: Path, results: dict[str, Any]) -> None:
        self.plan, self.corpus, self.out, self.results = plan, corpus, out, results
        self.bases: list[Base] = []
        self.pieces = Pieces(out / "pieces")

    def base(self, index: int) -> None:
        """Train a base model, or read it, and score it on both held-out texts."""
        key = self._key(index)
        path = self.out / f"base{index}-{key}.pt"
        if not path.is_file():
            save_base(train_base(self.plan.base, self.corpus, index), path)
        base = load_base(path)
        self.bases.append(base)
        actor = self.plan.base.actor(base.weights)
        k = self.plan.training.rollout_length

        def score() -> dict[str, Any]:
            return {
                "test": all_scores(actor, self.corpus.test, k),
                "validation": all_scores(actor, self.corpus.validation, k),
            }

        scores = self.pieces.get(f"scores-base{index}", key, score)
        self.add("bases", {"base": index, **base.record(), "scores": scores})

    def compare(self, index: int, seed: int, lr: float) -> None:
        """All methods from one base with one seed; SFT goes on until it has cost what each of the others did."""
        self._compare(METHODS, self.plan.training, "runs", index, seed, lr)

    def many(self) -> None:
        """The same with many rollouts, for fewer steps, at the first learning rate."""
        training = replace(self.plan.training, steps=self.plan.many_steps)
        for seed in range(self.plan.many_seeds):
            for index in range(self.plan.bases):
                self._compare(MANY_METHODS, training, "many", index, seed, self.plan.lrs[0])

    def _compare(
        self, methods: tuple[Method, ...], training: Training, kind: str, index: int, seed: int, lr: float
    ) -> None:
        marks: set[int] = set()
        for method in (*(one for one in methods if one.rl_coef), SFT):
            score_at = () if method.rl_coef else sorted(marks)
            record = self.run(method, index, seed, lr, "test", score_at, training)
            marks.add(round(record["passes"] * training.steps))
            self.add(kind, record)

    def sweeps(self) -> None:
        """lambda_RL for both kinds of REFINE, and learning rates, on the validation text."""
        wanted = [(SFT, self.plan.sweep_lr)]
        for kind in (PAPER, POSITION):
            wanted += [(replace(kind, rl_coef=value), self.plan.sweep_lr) for value in self.plan.sweep]
        wanted += [(method, lr) for lr in self.plan.lr_sweep for method in (SFT, PAPER)]
        for method, lr in wanted:
            for index in range(self.plan.bases):
                self.add("sweep", self.run(method, index, 0, lr, "validation"))

    def sharpen(self) -> None:
        """The base models at lower temperatures, which no training was needed for."""
        k = self.plan.training.rollout_length
        for index, base in enumerate(self.bases):
            for temperature in self.plan.temperatures:

                def score(base: Base = base, temperature: float = temperature) -> dict[str, Any]:
                    return all_scores(self.plan.base.actor(base.weights), self.corpus.test, k, temperature)

                settings = (self._key(index), temperature, k)
                found = self.pieces.get(f"sharpened-base{index}-t{temperature:g}", settings, score)
                self.add("sharpened", {"base": index, "temperature": temperature, "scores": found})

    def signals(self) -> None:
        """The gradients of all estimators at every base."""
        for index, base in enumerate(self.bases):
            for method in ESTIMATORS:
                settings = (self._key(index), repr(method), self.plan.training, self.plan.signal_batches)

                def measure(method: Method = method, base: Base = base) -> dict[str, Any]:
                    args = (method, self.plan.training, self.plan.base, base.weights, self.corpus)
                    return gradient_signal(*args, self.plan.signal_batches)

                found = self.pieces.get(f"signal-base{index}-{method.name}", settings, measure)
                self.add("signal", {"base": index, "method": method.name, **found})

    def run(
        self,
        method: Method,
        index: int,
        seed: int,
        lr: float,
        part: str,
        score_at: list[int] | tuple[int, ...] = (),
        training: Training | None = None,
    ) -> dict[str, Any]:
        """One mid-training run, scored on ``part`` of the corpus; ``training``: None for the plan's."""
        training = training or self.plan.training

        def train() -> dict[str, Any]:
            held_out = getattr(self.corpus, part)
            args = (self.plan.base, self.bases[index].weights, self.corpus, held_out, score_at)
            return run(method, training, lr, seed, *args)

        shorter = "" if training == self.plan.training else f"-steps{training.steps}"
        name = f"{part}-{method.name}-lambda{method.rl_coef:g}-lr{lr:g}{shorter}-base{index}-seed{seed}"
        settings = (self._key(index), repr(method), training, lr, seed, part, sorted(score_at))
        about = {"method": method.name, "rl_coef": method.rl_coef, "lr": lr, "base": index, "seed": seed}
        return {**about, **self.pieces.get(name, settings, train)}

    def add(self, kind: str, record: dict[str, Any]) -> None:
        """Into the results, which are written at once."""
        self.results[kind].append(rounded(record))
        write_json(self.out / "results.json", self.results)

    def _key(self, index: int) -> str:
        return digest((self.plan.base, self.corpus.fingerprint, index, torch.__version__))
