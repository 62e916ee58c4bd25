"""The section on what is kept of a document of the results page: tables from ``results.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.keep.arms import LABELS, TRAINED
from examples.keep.plan import score_of
from examples.keep.records import means
from examples.keep.tables import costs, figure
from examples.miniature.figures import Series, curves
from examples.miniature.reading import reading_of, runs_digest
from examples.miniature.results import table
from examples.miniature.statistics import estimate, paired

FIGURE = "keep_exact.svg"
READING = Path(__file__).with_name("reading.md")

Results = Mapping[str, Any]
METHODS = {"sft": "SFT", "refine": "REFINE"}


def section(results: Results, figures_in: str = ".") -> str:
    """Markdown; figures are linked in the directory ``figures_in``."""
    parts = [
        "## What is kept of a document",
        _about(results),
        reading_of(READING, results["runs"]),
        f"![Exact match by number of facts]({figures_in}/{FIGURE})",
        "### Exact match",
        _scores(results),
    ]
    for facts in _lengths(results):
        parts += [f"### Costs, documents of {facts} facts", _costs(results, facts)]
    if results["tuning"]:
        parts += ["### Settings of adapters", _tuning(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def figures(results: Results) -> dict[str, str]:
    """SVG by file name."""
    series = []
    for number, (arm, label) in enumerate((arm, label) for arm, label in LABELS.items() if arm != "nothing"):
        points = [(float(facts), estimate(list(scores(results, arm, facts).values()))) for facts in _lengths(results)]
        series.append(Series(label, points, 1 + number, 1 + number % 4))
    return {FIGURE: curves("Exact match of answers", "facts of a document", "exact", series)}


def scores(results: Results, arm: str, facts: int) -> dict[str, float]:
    """Exact match by seed."""
    return {str(run["seed"]): run["arms"][arm]["score"] for run in results["runs"] if run["facts"] == facts}


def _lengths(results: Results) -> list[int]:
    return sorted({run["facts"] for run in results["runs"]})


def _about(results: Results) -> str:
    plan, reader, base = results["plan"], results["plan"]["reader"], results["bases"][0]
    torch = results["versions"]["torch"]
    training = "; ".join(
        f"{METHODS[method]}: rank {one['rank']}, learning rate {one['lr']:g}, {one['steps']} passes"
        for method, one in results["chosen"].items()
    )
    spent = sum(run["seconds"] for run in results["bases"]) / 60
    length = reader["value_length"]
    return f"""A document is a list of facts, each a key and {length} random tokens; a question is a key, and its answer
is right if all {length} tokens are (**exact**). DeltaNets of {base["parameters"]:,} parameters learn on sequences of
{reader["facts"]} facts and questions about them; documents of {_listed(_lengths(results))} facts are then asked for all
of theirs. {len(results["bases"])} seeds, each with a base of its own and {plan["documents"]} documents of each length.

- *Read again*: document and question go through the model for each question.
- *Kept state*: `refine_verl.remember`; the state is asked.
- *Into LoRA*: the document is trained into an adapter by the next-token loss (SFT) or by REFINE (`refine_verl.adapt`,
  the paper's settings for test time, rollouts of {length} tokens); the model is asked without document and state.
- *State and adapter*: the model with that adapter reads the document, and its state is asked with the adapter in place.
- *The question alone* says what can be guessed.

Adapters are trained on passages of {results["passage"]} facts: each fact begins one, with others in random order behind
it, and {results["batch"]} passages make an optimiser step. {training}.

Run {runs_digest(results["runs"])} of {results["date"]} on {results["machine"]} with torch {torch}, one
thread; the bases took {spent:.0f} processor minutes. Token passes: a backward pass counts as two forward ones. Bold
differences are those whose interval leaves zero out."""


def _listed(numbers: list[int]) -> str:
    return " and ".join(
        [", ".join(map(str, numbers[:-1])), str(numbers[-1])] if len(numbers) > 1 else [str(numbers[0])]
    )


def _scores(results: Results) -> str:
    lengths, rows = _lengths(results), []
    for arm, label in LABELS.items():
        found = [scores(results, arm, facts) for facts in lengths]
        cells = [figure(estimate(list(each.values()))) for each in found]
        for facts, each in zip(lengths, found, strict=True):
            one = paired(each, scores(results, "reading", facts))
            cells.append("" if arm == "reading" else figure(one, signed=True))
        rows.append([label, *cells])
    header = ["", *(f"{facts} facts" for facts in lengths), *(f"{facts} facts, minus reading" for facts in lengths)]
    return f"{table(header, rows)}\n\nREFINE minus SFT on the same seeds: {_methods(results)}."


def _methods(results: Results) -> str:
    parts = []
    for suffix, what in (("", "alone"), ("_state", "with the state")):
        for facts in _lengths(results):
            refine, sft = (scores(results, method + suffix, facts) for method in ("refine", "sft"))
            parts.append(f"{figure(paired(refine, sft), signed=True)} ({facts} facts, {what})")
    return ", ".join(parts)


def _costs(results: Results, facts: int) -> str:
    mean = means([run["arms"] for run in results["runs"] if run["facts"] == facts])
    rows = [[label, *costs(mean[arm])] for arm, label in LABELS.items()]
    return table(["", *costs(None)], rows)


def _tuning(results: Results) -> str:
    plan, rows = results["plan"], []
    seen: list[Any] = []
    for record in results["tuning"]:
        if record["training"] not in seen:
            seen.append(record["training"])
    for training in seen:
        mine = [record for record in results["tuning"] if record["training"] == training]
        cells = []
        for method in TRAINED:
            mean = means([record["arms"] for record in mine])
            chosen = results["chosen"][method] == training
            text = f"{mean[method]['score']:.3f}, {mean[f'{method}_state']['score']:.3f}"
            cells += [text, ("**{:.3f}**" if chosen else "{:.3f}").format(score_of(method, mine))]
        rows.append([f"{training['rank']}", f"{training['lr']:g}", f"{training['steps']}", *cells])
    header = ["rank", "learning rate", "passes"]
    for method in METHODS.values():
        header += [f"{method}: alone, with the state", "mean"]
    text = (
        f"Tried on {plan['tuning_seeds']} bases and {plan['tuning_documents']} documents of "
        f"{_listed(list(plan['tuning_facts']))} facts for each of them, none of which is in the tables above. For each "
        "method the settings with the best mean are taken (bold), the cheapest of equals. Alpha is the rank; there is "
        "no weight decay."
    )
    return text + "\n\n" + table(header, rows)
