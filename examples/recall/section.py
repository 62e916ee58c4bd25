"""The section on recall of the results page: tables and figures from ``results.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.miniature.figures import Row, forest
from examples.miniature.reading import reading_of, runs_digest
from examples.miniature.results import table
from examples.miniature.statistics import Estimate
from examples.recall.arms import ABLATIONS, GROUPED_LAMBDA, HEADLINE, QUESTION, Arm
from examples.recall.bases import RECALL, STATES
from examples.recall.comparison import (
    STATE_NAMES,
    comparison,
    costs,
    many_weights,
    noise,
    noise_rows,
    with_a_signal,
)
from examples.recall.records import Records, difference, mean, shown

NAMES = {"deltanet": "DeltaNet", "lact": "LaCT"}
READING = Path(__file__).with_name("reading.md")
STATE_PHRASES = {"under": "that is under-trained", "plateau": "at its plateau"}
HEADLINE_FIGURE, COMPUTE_FIGURE, NOISE_FIGURE = "recall_headline.svg", "recall_compute.svg", "recall_noise.svg"
ABLATION_FIGURES = {state: f"recall_ablations_{state}.svg" for state in STATES}
GAINS = ("exact", "reward_cosine", "ntp_loss")
SHOWN_REWARDS, SHOWN_TRAINING = ("cosine", "binary"), ("nsp/reward/mean", "nsp/group_zero_std")
ABLATION_COLUMNS = [
    "",
    "exact",
    "exact, minus SFT",
    *SHOWN_REWARDS,
    "training reward",
    "groups without a difference",
]


def section(results: Mapping[str, Any], figures_in: str = ".") -> str:
    """Markdown; figures are linked in the directory ``figures_in``. Parts without data are left out."""
    records = Records(results)
    parts = [
        _setup(results),
        reading_of(READING, results["jobs"]),
        _bases(records),
        _headline(records, figures_in),
        _ablations(records, figures_in),
        noise(records, RECALL[0], f"{figures_in}/{NOISE_FIGURE}"),
        with_a_signal(records, RECALL[0], "### Training with a gradient that has a signal"),
        many_weights(records, RECALL[0]),
        _test_time(records),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def figures(results: Mapping[str, Any]) -> dict[str, str]:
    """SVG by file name."""
    records, amount = Records(results), results["amount"]
    found = {
        HEADLINE_FIGURE: (
            f"Exact match after {amount['steps']} steps: REFINE minus SFT",
            "difference of exact match, mean over seeds",
            [row for model in RECALL for state in STATES for row in _difference_rows(records, model, state, False)],
        ),
        COMPUTE_FIGURE: (
            "Exact match: REFINE minus the longer SFT that costs as much",
            "difference of exact match, mean over seeds",
            [row for model in RECALL for state in STATES for row in _difference_rows(records, model, state, True)],
        ),
        **{
            ABLATION_FIGURES[state]: (
                f"Exact match after {amount['ablation_steps']} steps, minus SFT (DeltaNet, {STATE_NAMES[state]})",
                "difference (blue: the paper's settings, orange: grouped by position)",
                [row for name, (title, _) in TABLES.items() for row in _ablation_figure(records, state, name, title)],
            )
            for state in STATES
        },
        NOISE_FIGURE: (
            "One draw of the policy gradient and the gradient of the expected reward",
            "cosine between them, mean over seeds",
            [row for state in STATES for row in noise_rows(records, RECALL[0], state)],
        ),
    }
    return {
        name: forest(title, unit, rows) for name, (title, unit, rows) in found.items() if any(r.estimate for r in rows)
    }


def _setup(results: Mapping[str, Any]) -> str:
    amount, rates = results["amount"], results["learning_rates"]
    tasks = "; ".join(
        f"{NAMES[name]}: {task['entries']} entries, values of {task['value_length']} tokens, {task['rounds']} rounds, "
        f"T = {task['entries'] * (1 + task['value_length']) * (1 + task['rounds'])}"
        for name, task in ((name, spec["task"]) for name, spec in results["models"].items())
    )
    return f"""## Recall of multi-token values

A sequence stores a few entries, each a key and a value of several tokens, then asks for every key again in each of
several rounds, with the value behind it ({tasks}).
Keys and the store are random, the values of rounds can be known. The score is **exact**: the share of held-out values
that are right as a whole, which is what greedy generation would write after the key; **tokens** is the share of their
tokens, **cosine** and **binary** the mean rewards of rollouts at places that are the same for all models. Base models
are trained with the next-token loss on the same kind of sequences until they begin to recall (*under-trained*), and on
until a falling learning rate has reached zero (*plateau*).

Mid-training: {amount["steps"]} steps of AdamW on {results["batch"]} fresh sequences each ({amount["ablation_steps"]} in
ablations), with a constant learning rate of {rates["under"]:g} (under-trained) or {rates["plateau"]:g} (plateau), the
same for all methods. {amount["seeds"]} seeds, each with a base model, data and draws of its own; {amount["held_out"]}
held-out sequences per seed.

*The paper's settings* are those of the `midtrain` recipe: c = 8, k = 5, n = 1, cosine reward, one group per sequence,
advantages divided by the group's standard deviation, λ = 0.2. *Grouped by position*: n = 8, one group per position, no
division, λ = {GROUPED_LAMBDA:g}.

Run {runs_digest(results["jobs"])} of {results["date"]}, {results["processor_minutes"]:.0f} processor minutes on
{results["environment"]["machine"]} with torch {results["environment"]["torch"]}. Bold differences are those whose
interval leaves zero out.{_later(results)}"""


def _later(results: Mapping[str, Any]) -> str:
    """What was measured at another time than the rest."""
    return "".join(
        f" {len(run['jobs'])} jobs ({', '.join(sorted({name.split('-')[0] for name in run['jobs']}))}) are of "
        f"{run['date']}, {run['processor_minutes']:.0f} processor minutes with torch {run['torch']}."
        for run in results.get("later", [])
    )


def _bases(records: Records) -> str:
    rows = []
    for model in RECALL:
        base = records.of("base", model)
        if not base:
            continue
        steps = {seed: float(run["steps"]) for seed, run in base.items()}
        kept = {seed: float(run["kept_at"]) for seed, run in base.items()}
        parameters = next(iter(base.values()))["parameters"]
        attempts = sum(run["attempts"] - 1 for run in base.values() if "attempts" in run)
        exact = [records.scores(model, state, "sft", 0, "exact") for state in STATES]
        tokens = [records.scores(model, state, "sft", 0, "tokens") for state in STATES]
        rows.append(
            [NAMES[model], f"{parameters:,}", f"{attempts}", mean(kept, 0), mean(steps, 0)]
            + [mean(values) for pair in zip(exact, tokens, strict=True) for values in pair]
        )
    header = [
        "model",
        "parameters",
        "given up",
        "under-trained at step",
        "steps in all",
        "exact, under-trained",
        "tokens",
    ]
    note = "*Given up*: initialisations, of all seeds together, that never left the uniform distribution."
    return f"### Base models\n\n{note}\n\n" + table([*header, "exact, plateau", "tokens"], rows)


def _headline(records: Records, figures_in: str) -> str:
    parts = []
    for model in RECALL:
        for state in STATES:
            if not records.of("headline", model, state):
                continue
            text = comparison(records, model, state, HEADLINE, GAINS)
            parts.append(f"#### {NAMES[model]}, {STATE_NAMES[state]}\n\n{text}")
    if not parts:
        return ""
    cost = costs(records, RECALL, HEADLINE)
    return "\n\n".join(
        [
            "### REFINE against SFT",
            "Columns: scores after training, then REFINE minus SFT on the same seed. *SFT, cost of …* is the same SFT "
            "run after as many steps as put as many tokens through the model as that arm did (a backward pass counting "
            f"as two forward ones; {cost}).",
            f"![Exact match, REFINE minus SFT]({figures_in}/{HEADLINE_FIGURE})",
            f"![Exact match, REFINE minus longer SFT]({figures_in}/{COMPUTE_FIGURE})",
            *parts,
        ]
    )


def _difference_rows(records: Records, model: str, state: str, equal_compute: bool) -> list[Row]:
    steps = records.results["amount"]["steps"]
    if not records.of("headline", model, state):
        return []
    rows = [Row(f"{NAMES[model]}, {STATE_NAMES[state]}")]
    for arm in HEADLINE[1:]:
        found = records.scores(model, state, arm.name, steps, "exact")
        baseline = records.scores(model, state, "sft", steps, "exact")
        if equal_compute:
            baseline = records.equal_compute(model, state, arm.name, "exact")
        rows.append(Row(arm.label, difference(found, baseline), COLORS[arm.name]))
    return rows


# Those of the first figure; all other arms are grey.
COLORS = {arm.name: color for color, arm in enumerate(HEADLINE[1:], start=1)}
TABLES: dict[str, tuple[str, str]] = {
    "reward": ("Reward", "cosine is the paper's in mid-training."),
    "selection": (
        "Where rollouts start",
        "entropy is the paper's. *surprise*: where the fast weights are rewritten most; *query*: where the text "
        f"resembles its last {QUESTION} tokens, the last round, which asks for every key.",
    ),
    "k": (
        "Length of rollouts, k",
        "5 is the paper's. *1 to 5*, *3 to 7*: a rollout ends where the next token is predicted with less entropy than "
        "the sequence's mean.",
    ),
    "c": ("Places per sequence, c", "8 is the paper's."),
    "n": (
        "Rollouts per position, groups, and the division by the standard deviation",
        "c = 4 and λ = 1 in all of them. What is not divided is smaller, so that equal λ do not weigh equally.",
    ),
    "lambda": ("Weight of the policy loss", "0.2 is the paper's; the policy loss alone has no next-token loss."),
    "lr": ("Learning rate", "Differences are to SFT at the common rate."),
}
PAPERS = {"reward": "cosine", "selection": "entropy", "k": "5", "c": "8", "lambda": "λ=0.2"}


def _ablations(records: Records, figures_in: str) -> str:
    parts = [_ablations_from(records, state, figures_in) for state in STATES]
    if not any(parts):
        return ""
    steps = records.results["amount"]["ablation_steps"]
    introduction = (
        f"DeltaNet, {steps} steps, differences to SFT after as many. One setting is changed at a time; everything else "
        "is the paper's unless a table says otherwise. *Training reward* is the mean over the rollouts of the training "
        "(of the arm's own kind, at places of its own choice), *groups without a difference* the share of groups in "
        "which all rewards are equal and nothing is learned."
    )
    return "\n\n".join(["### Ablations", introduction, *(part for part in parts if part)])


def _ablations_from(records: Records, state: str, figures_in: str) -> str:
    """Tables of one state, those that have more than what the headline shows."""
    tables = []
    for name, (title, note) in TABLES.items():
        arms = _with_headline(name)
        if any(records.of("ablation", RECALL[0], state, arm.name) for _, arm in arms):
            tables.append(f"##### {title}\n\n{note}\n\n{table(ABLATION_COLUMNS, _ablation_rows(records, state, arms))}")
    if not tables:
        return ""
    figure = f"![Exact match of all arms, REFINE minus SFT]({figures_in}/{ABLATION_FIGURES[state]})"
    return "\n\n".join([f"#### From the base {STATE_PHRASES[state]}", figure, *tables])


def _named(name: str) -> list[tuple[str, Arm]]:
    return [(arm.label, arm) for arm in ABLATIONS[name]]


def _with_headline(name: str) -> list[tuple[str, Arm]]:
    """The arms of a table with their labels, the headline's arm among them where it belongs."""
    if name == "n":
        return [
            (f"{arm.label}, {arm.nsp['group']}{'' if arm.divide_by_std else ', not divided'}", arm)
            for arm in ABLATIONS[name]
        ]
    if name == "lambda":
        arms = [(f"the paper's, {PAPERS[name]}", HEADLINE[1]), (f"grouped, λ={GROUPED_LAMBDA:g}", HEADLINE[2])]
        for arm in ABLATIONS[name]:
            estimator = "grouped" if arm.name.startswith("grouped") else "the paper's"
            arms.append((f"{estimator}, {arm.label}", arm))
        return sorted(arms, key=lambda pair: (pair[0].startswith("grouped"), "alone" in pair[0], pair[0]))
    if name == "lr":
        return [("SFT", HEADLINE[0]), (HEADLINE[1].label, HEADLINE[1]), *_named(name)]
    arms = [(PAPERS[name], HEADLINE[1]), *_named(name)]
    return sorted(arms, key=lambda pair: (len(pair[0]), pair[0])) if name in ("k", "c") else arms


def _ablation_rows(records: Records, state: str, arms: Sequence[tuple[str, Arm]]) -> list[list[str]]:
    steps, model = records.results["amount"]["ablation_steps"], RECALL[0]
    rows = []
    for label, arm in arms:
        exact = records.scores(model, state, arm.name, steps, "exact")
        if exact:
            scores = [mean(records.scores(model, state, arm.name, steps, f"reward_{kind}")) for kind in SHOWN_REWARDS]
            trained = [mean(records.training(model, state, arm.name, steps, metric)) for metric in SHOWN_TRAINING]
            rows.append([label, mean(exact), shown(_gain(records, state, arm), 4), *scores, *trained])
    return rows


def _gain(records: Records, state: str, arm: Arm) -> Estimate | None:
    """Exact match after the steps of an ablation, minus that of SFT."""
    steps, model = records.results["amount"]["ablation_steps"], RECALL[0]
    mine, baseline = (records.scores(model, state, name, steps, "exact") for name in (arm.name, "sft"))
    return None if arm.name == "sft" else difference(mine, baseline)


def _ablation_figure(records: Records, state: str, name: str, title: str) -> list[Row]:
    """Without learning rates and without arms that have no next-token loss: their scale is another one."""
    arms = [] if name == "lr" else _with_headline(name)
    if not any(records.of("ablation", RECALL[0], state, arm.name) for _, arm in arms):
        return []
    gains = [(label, arm, _gain(records, state, arm)) for label, arm in arms if arm.loss.get("sft_coef") != 0.0]
    return [Row(title), *(Row(label, gain, COLORS.get(arm.name, 5)) for label, arm, gain in gains if gain)]


def _test_time(records: Records) -> str:
    model = RECALL[0]
    found = {method: records.of("test_time", model, "under", method) for method in ("none", "sft", "refine")}
    if not all(found.values()):
        return ""
    names = {"none": "none", "sft": "SFT", "refine": "REFINE"}
    scores = {
        method: {key: {seed: run[key] for seed, run in runs.items()} for key in ("exact", "tokens")}
        for method, runs in found.items()
    }
    rows = [
        [
            names[method],
            mean(values["exact"]),
            mean(values["tokens"]),
            shown(difference(values["exact"], scores["sft"]["exact"])) if method != "sft" else "",
        ]
        for method, values in scores.items()
    ]
    amount = records.results["amount"]
    return "\n\n".join(
        [
            "### Test-time training (DeltaNet, under-trained)",
            f"{amount['prompts']} held-out prompts per seed in batches of 8, {amount['passes']} passes with the "
            "paper's test-time settings but for the learning rate (0.001) and k, the length of a value; the last value "
            "is written by greedy generation, and the weights go back to the start after every batch. "
            "[examples/test_time](../examples/test_time/README.md) has more.",
            table(["test-time training", "exact", "tokens", "exact, minus SFT"], rows),
        ]
    )
