"""What the miniature runs, in the order of its importance."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from examples.keep.arms import TRAINED, answer_all
from examples.keep.facts import PASSAGE, Reader, make_case
from examples.keep.records import means, record_of
from examples.miniature.pieces import Pieces, Record, digest, write_json
from refine_verl.adaptation import AdaptSettings
from refine_verl.adaptation.settings import read_settings
from refine_verl.record.files import replacing

VERSIONS = ("torch", "transformers", "flash-linear-attention", "peft")
TUNING_SEED = 1000
"""Of the first base on which settings of adapters are chosen; those that are reported begin at 0."""
BATCH = 8
"""Passages of an optimiser step."""
DOCUMENTS_SEED = 3_000_003


@dataclass(frozen=True)
class Training:
    """How a document is put into an adapter.

    Attributes:
        rank, lr: of the adapter; its alpha is its rank.
        steps: passes over the passages of the document, of which there are as many as facts.
    """

    rank: int = 4
    lr: float = 3e-2
    steps: int = 60

    def settings(self, method: str, reader: Reader, seed: int) -> AdaptSettings:
        """For `refine_verl.adapt`: the paper's at test time, with rollouts as long as an answer."""
        nsp = {"rollout_length": reader.value_length}
        return read_settings(
            {
                "method": method,
                "steps": self.steps,
                "lr": self.lr,
                "weight_decay": 0.0,
                "lora_rank": self.rank,
                "lora_alpha": self.rank,
                "mini_batch_size": BATCH,
                "micro_batch_size": BATCH,
                "seed": seed,
                **({"nsp": nsp} if method == "refine" else {}),
            }
        )


def tried(ranks: Iterable[int], rates: Iterable[float], steps: Iterable[int]) -> tuple[Training, ...]:
    """Every combination, the cheaper ones first."""
    return tuple(Training(rank, lr, count) for rank in ranks for count in steps for lr in rates)


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        reader: every seed has a base of its own.
        facts: lengths of documents.
        seeds, documents: bases, and documents of each length for each of them.
        tuning: settings of adapters that are tried for both methods, on bases and documents that no other figure is of;
            each method then has its best one. A single one is taken untried.
        tuning_seeds, tuning_documents, tuning_facts: how many bases and documents, and how long these are.
    """

    reader: Reader = field(default_factory=Reader)
    facts: tuple[int, ...] = (8, 16, 32)
    seeds: int = 5
    documents: int = 3
    tuning: tuple[Training, ...] = tried((1, 4), (1e-2, 3e-2), (30, 60))
    tuning_seeds: int = 2
    tuning_documents: int = 2
    tuning_facts: tuple[int, ...] = (16,)


PLANS = {
    "full": Plan(),
    "fast": Plan(Reader(steps=300, decay_steps=200), facts=(8, 32), seeds=2, documents=1, tuning=(Training(),)),
}


def collect(plan: Plan, out: Path) -> dict[str, Any]:
    """Run what is not there yet and write ``results.json`` anew after every piece.

    Args:
        plan: what to run.
        out: directory for weights, records and results.

    Returns:
        ``plan``, ``versions``, ``bases``, ``tuning``, ``chosen``, ``runs`` and others, as in ``results.json``.
    """
    results: dict[str, Any] = {
        "plan": asdict(plan),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}},
        "machine": platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
        "passage": PASSAGE,
        "batch": BATCH,
        "bases": [],
        "tuning": [],
        "chosen": {},
        "runs": [],
    }
    work = _Work(plan, out, results)
    training = work.tune()
    for seed in range(plan.seeds):
        work.base(seed)
        for facts in plan.facts:
            work.compare(seed, facts, training)
    return results


def score_of(method: str, tuned: Iterable[Mapping[str, Any]]) -> float:
    """By which settings are chosen: exact match, the mean of asking without the document and from its state."""
    arms = [record["arms"] for record in tuned]
    return sum(each[method]["score"] + each[f"{method}_state"]["score"] for each in arms) / (2 * len(arms))


class _Work:
    """The pieces, with what they share."""

    def __init__(self, plan: Plan, out: Path, results: dict[str, Any]) -> None:
        self.plan, self.out, self.results = plan, out, results
        self.pieces = Pieces(out / "pieces")

    def base(self, seed: int) -> None:
        """Train a base, if it is not there yet."""
        self.add("bases", self._base(seed)[0])

    def _base(self, seed: int) -> tuple[Record, dict[str, torch.Tensor]]:
        """What is known of a base, and its weights."""
        key = (self.plan.reader, seed, torch.__version__)
        path = self.out / f"base{seed}-{digest(key)}.safetensors"

        def train() -> Record:
            started = time.process_time()
            trained = self.plan.reader.train(seed)
            with replacing(path) as place:
                save_file(trained.weights["plateau"], place)
            about = {"seed": seed, "parameters": trained.parameters, "steps": trained.steps}
            return {**about, "attempts": trained.attempts, "seconds": time.process_time() - started}

        self.out.mkdir(parents=True, exist_ok=True)
        record = self.pieces.get(f"base{seed}", key, train, anew=not path.is_file())
        return record, load_file(path)

    def compare(self, seed: int, facts: int, training: Mapping[str, Training]) -> None:
        """All arms on the documents of one length."""
        record = self._asked(f"facts{facts}-seed{seed}", seed, facts, self.plan.documents, training)
        self.add("runs", {"seed": seed, "facts": facts, "arms": record})

    def tune(self) -> dict[str, Training]:
        """Try all settings; returns the best of each method, the first of equals."""
        plan, scores = self.plan, dict[str, list[float]]((method, []) for method in TRAINED)
        for number, training in enumerate(plan.tuning if len(plan.tuning) > 1 else ()):
            mine = []
            for seed in range(TUNING_SEED, TUNING_SEED + plan.tuning_seeds):
                for facts in plan.tuning_facts:
                    name = f"tuning{number}-facts{facts}-seed{seed}"
                    arms = self._asked(name, seed, facts, plan.tuning_documents, dict.fromkeys(TRAINED, training))
                    mine.append({"seed": seed, "facts": facts, "training": asdict(training), "arms": arms})
                    self.add("tuning", mine[-1])
            for method in TRAINED:
                scores[method].append(score_of(method, mine))
        chosen = {method: plan.tuning[each.index(max(each)) if each else 0] for method, each in scores.items()}
        self.results["chosen"] = {method: asdict(each) for method, each in chosen.items()}
        return chosen

    def _asked(
        self, name: str, seed: int, facts: int, documents: int, training: Mapping[str, Training]
    ) -> dict[str, Record]:
        def ask() -> dict[str, Record]:
            reader, model = self.plan.reader, self.plan.reader.model(self._base(seed)[1]).eval()
            generator = torch.Generator().manual_seed(DOCUMENTS_SEED + 1000 * seed + facts)
            found = []
            for number in range(documents):
                case, wanted = make_case(reader, facts, generator)
                settings = {method: each.settings(method, reader, number) for method, each in training.items()}
                outcomes = answer_all(model, case, settings, stop_tokens=(), batch_size=facts)
                found.append(
                    {
                        arm: record_of(each, facts, _right(torch.stack(each.answers), wanted))
                        for arm, each in outcomes.items()
                    }
                )
            return means(found)

        settings = (self.plan.reader, seed, facts, documents, sorted(training.items()), torch.__version__)
        return self.pieces.get(name, settings, ask)

    def add(self, kind: str, record: Record) -> None:
        """Into the results, which are written at once."""
        self.results[kind].append(record)
        write_json(self.out / "results.json", self.results)


def _right(answers: torch.Tensor, wanted: torch.Tensor) -> float:
    """Share of answers that are right as a whole."""
    return (answers == wanted).all(dim=-1).float().mean().item()
