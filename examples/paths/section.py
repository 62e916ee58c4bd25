"""The section on ways through a graph of the results page: tables from ``results.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.miniature.figures import Row, forest
from examples.miniature.reading import reading_of, runs_digest
from examples.miniature.results import table
from examples.recall.arms import SIGNAL
from examples.recall.comparison import with_a_signal
from examples.recall.records import Records, difference, mean

MODEL = "paths"
SCORES = ("exact", "first", "tokens", "reward_binary")
FIGURE = "paths_first.svg"
READING = Path(__file__).with_name("reading.md")


def section(results: Mapping[str, Any], figures_in: str = ".") -> str:
    """Markdown; figures are linked in the directory ``figures_in``."""
    records = Records(results)
    parts = [_setup(results), reading_of(READING, results["jobs"]), _bases(records)]
    trained = with_a_signal(records, MODEL, "### Training from the plateau", SCORES)
    if trained:
        parts += [f"![First step of a way, REFINE minus SFT]({figures_in}/{FIGURE})", trained]
    return "\n\n".join(part for part in parts if part) + "\n"


def figures(results: Mapping[str, Any]) -> dict[str, str]:
    """SVG by file name."""
    seen, steps = Records(results).showing("signal"), results["amount"]["steps"]
    rows = []
    for arm in SIGNAL[1:]:
        pair = (seen.scores(MODEL, "plateau", name, steps, "first") for name in (arm.name, "sft"))
        rows.append(Row(arm.label, difference(*pair), 1 if arm.name == "paper" else 2))
    title, unit = f"First step of a way after {steps} steps: REFINE minus SFT", "difference of the share that is right"
    return {FIGURE: forest(title, unit, rows)} if any(row.estimate for row in rows) else {}


def _setup(results: Mapping[str, Any]) -> str:
    task, amount = results["models"][MODEL]["task"], results["amount"]
    return f"""## Ways through a graph

A task that teacher forcing is known not to teach (Bachmann and Nagarajan, 2024). A sequence holds {task["rounds"]}
graphs; each is a star of {task["entries"]} arms of {task["value_length"]} nodes, given as its edges in random order,
then the end of one arm, the centre, and the way from the centre to that end. With the way so far in sight the next node
is one look-up among the edges; only the *first* step needs a plan, the way back from the goal, and guessing it is right
once in {task["entries"]} times. **first** is the share of first steps that are right, **exact** that of whole ways,
**tokens** that of their tokens. All else is as in the recall task, in the same code (`examples/recall`): DeltaNet,
{amount["seeds"]} seeds, {amount["steps"]} steps of {results["batch"]} sequences, {amount["held_out"]} held-out
sequences.

Run {runs_digest(results["jobs"])} of {results["date"]}, {results["processor_minutes"]:.0f} processor minutes on
{results["environment"]["machine"]} with torch {results["environment"]["torch"]}."""


def _bases(records: Records) -> str:
    base = records.of("base", MODEL)
    parameters = next(iter(base.values()))["parameters"]
    seen = records.showing("signal")
    scores = [mean(seen.scores(MODEL, "plateau", "sft", 0, score)) for score in SCORES[:3]]
    steps = mean({seed: float(run["steps"]) for seed, run in base.items()}, 0)
    header = ["parameters", "steps", "exact, plateau", "first", "tokens"]
    return "### Base models\n\n" + table(header, [[f"{parameters:,}", steps, *scores]])
