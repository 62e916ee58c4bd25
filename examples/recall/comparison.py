"""Parts of a results page that several examples share: arms beside SFT, and how noisy gradients are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from examples.miniature.figures import Row
from examples.miniature.results import table
from examples.miniature.statistics import estimate
from examples.recall.arms import MANY_LAMBDA, MANY_WEIGHTS, SIGNAL, Arm, many
from examples.recall.bases import STATES
from examples.recall.noise import ESTIMATORS, REFERENCE_DRAWS
from examples.recall.records import Records, difference, mean, shown

STATE_NAMES = {"under": "under-trained", "plateau": "at its plateau"}
SCORES = ("exact", "tokens", "reward_cosine", "reward_binary")
NAMES = {
    "exact": "exact",
    "first": "first token",
    "tokens": "tokens",
    "reward_cosine": "cosine",
    "reward_binary": "binary",
    "ntp_loss": "next-token loss",
}
LONG_NAMES = {**NAMES, "reward_cosine": "cosine reward", "reward_binary": "binary reward"}
SIGNAL_GAINS = ("exact", "ntp_loss", "reward_binary", "reward_cosine")


def comparison(
    records: Records, model: str, state: str, arms: Sequence[Arm], gains: Sequence[str], scores: Sequence[str] = SCORES
) -> str:
    """SFT, the first of ``arms``, the others after as many steps, and SFT at the others' cost."""
    amount = records.results["amount"]
    steps, blank = amount["steps"], [""] * len(gains)
    base = [mean(records.scores(model, state, "sft", 0, score)) for score in scores]
    baseline = {score: records.scores(model, state, "sft", steps, score) for score in {*scores, *gains}}
    rows = [["base", *base, *blank], ["SFT", *(mean(baseline[score]) for score in scores), *blank]]
    for arm in arms[1:]:
        found = {score: records.scores(model, state, arm.name, steps, score) for score in baseline}
        differences = [shown(difference(found[score], baseline[score]), 4) for score in gains]
        rows.append([arm.label, *(mean(found[score]) for score in scores), *differences])
    for arm in arms[1:]:
        longer = {score: records.equal_compute(model, state, arm.name, score) for score in baseline}
        runs = records.of("headline", model, state).values()
        equal = sorted({run["equal_compute"][arm.name] for run in runs})
        count = f"{equal[0]}" if len(equal) == 1 else f"{equal[0]}–{equal[-1]}"
        mine = records.scores(model, state, arm.name, steps, "exact")
        differences = [f"{shown(difference(mine, longer['exact']), 4)}†", *blank[1:]]
        label = f"SFT, cost of *{arm.name}* ({count} steps)"
        rows.append([label, *(mean(longer[score]) for score in scores), *differences])
    header = ["", *(NAMES[score] for score in scores), *(f"{LONG_NAMES[score]}, minus SFT" for score in gains)]
    return table(header, rows) + "\n\n† that arm of REFINE minus this longer SFT."


def costs(records: Records, models: Sequence[str], arms: Sequence[Arm], state: str = "under") -> str:
    """Token passes and processor time per step over those of SFT, from bases in this state."""
    steps, texts = records.results["amount"]["steps"], []
    for model in models:
        for arm in arms[1:]:
            ratios = []
            for metric in ("token_passes", "processor_seconds"):
                mine, base = (records.costs(model, state, name, steps, metric) for name in (arm.name, "sft"))
                shared = mine.keys() & base.keys()
                ratios.append(sum(mine[seed] / base[seed] for seed in shared) / len(shared) if shared else 0.0)
            if all(ratios):
                called = {"deltanet": "DeltaNet, ", "lact": "LaCT, "}.get(model, "")
                texts.append(f"{called}{arm.name}: {ratios[0]:.1f} × SFT, in processor time {ratios[1]:.1f} ×")
    return "; ".join(texts)


def with_a_signal(records: Records, model: str, heading: str, scores: Sequence[str] = SCORES) -> str:
    """Training with many rollouts at many positions, and with a nearly exact policy gradient."""
    seen = records.showing("signal")
    parts, found = [], [state for state in STATES if seen.of("headline", model, state)]
    for state in found:
        title = STATE_NAMES[state]
        text = comparison(seen, model, state, SIGNAL, SIGNAL_GAINS, scores)
        parts.append(f"#### {title[0].upper()}{title[1:]}\n\n{text}{_bound(records, seen, model, state)}")
    if not parts:
        return ""
    about = (
        f"c = 32, n = 8, k = 5, groups per position, credit per token, no division, λ = {MANY_LAMBDA:g}; *the paper's "
        "settings* are trained beside it, from the same bases (trained anew) and on the same batches. "
        f"Cost per step: {costs(seen, [model], SIGNAL, found[0])}."
    )
    return "\n\n".join([heading, about, *parts])


def _bound(records: Records, seen: Records, model: str, state: str) -> str:
    """The upper bound after as many steps as it has, beside the other arms, on the seeds it has."""
    runs = records.of("bound", model, state, "binary")
    if not runs:
        return ""
    amount = records.results["amount"]
    steps, n = amount["ablation_steps"], amount["bound_rollouts"]
    rows = []
    for arm in [*SIGNAL, many("binary", n)]:
        scores = []
        for score in SIGNAL_GAINS:
            values = seen.scores(model, state, arm.name, steps, score)
            if arm.name.startswith("bound"):
                values = {seed: run["scores"][str(steps)][score] for seed, run in runs.items()}
            baseline = seen.scores(model, state, "sft", steps, score)
            values, baseline = ({seed: one[seed] for seed in runs if seed in one} for one in (values, baseline))
            scores.append(mean(values, 4) if arm.name == "sft" else shown(difference(values, baseline), 4))
        rows.append([arm.label, *scores])
    header = ["", *(LONG_NAMES[score] for score in SIGNAL_GAINS)]
    return (
        f"\n\n*Upper bound*, a nearly exact policy gradient (n = {n}): after {steps} steps, {len(runs)} seeds; SFT's "
        f"scores, and the others minus SFT.\n\n{table(header, rows)}"
    )


def many_weights(records: Records, model: str) -> str:
    """Other weights of the policy loss with many rollouts, beside that of the comparison ``signal``."""
    seen, steps = records.showing("signal"), records.results["amount"]["ablation_steps"]
    runs = {arm.label: records.of("ablation", model, "under", arm.name) for arm in MANY_WEIGHTS}
    seeds = set.intersection(*(set(found) for found in runs.values()))
    if not seeds:
        return ""
    runs[f"λ = {MANY_LAMBDA:g}"] = seen.arm(model, "under", "many_binary")
    arms = {"SFT": seen.arm(model, "under", "sft"), **dict(sorted(runs.items(), key=lambda arm: float(arm[0][3:])))}
    rows = []
    for label, found in arms.items():
        cells = []
        for score in SIGNAL_GAINS:
            values, baseline = (
                {seed: run["scores"][str(steps)][score] for seed, run in one.items() if seed in seeds}
                for one in (found, arms["SFT"])
            )
            cells.append(mean(values, 4) if label == "SFT" else shown(difference(values, baseline), 4))
        rows.append([label, *cells])
    header = ["", *(LONG_NAMES[score] for score in SIGNAL_GAINS)]
    return (
        "### Weight of the policy loss with many rollouts\n\n"
        f"DeltaNet, under-trained, {steps} steps, {len(seeds)} seeds: c = 32, n = 8, credit per token, binary reward. "
        f"SFT's scores, and the others minus SFT.\n\n{table(header, rows)}"
    )


def noise(records: Records, model: str, figure: str) -> str:
    """Every estimator's signal-to-noise ratio and alignment."""
    parts = []
    for state in STATES:
        for reward in ("cosine", "binary"):
            runs = records.of("noise", model, state, reward)
            if runs:
                parts.append(_noise_table(runs, f"{STATE_NAMES[state]}, {reward} reward, {len(runs)} seeds"))
    if not parts:
        return ""
    amount = records.results["amount"]
    draws = amount["draws"]
    about = (
        f"DeltaNet; one batch of {amount['noise_batch']} sequences per seed, positions and rollouts drawn {draws} "
        "times, the gradient of the policy loss alone, k = 5. *Signal to noise* is |E g|² / tr Cov g, corrected for "
        "the number of draws. *Alignment* is the mean cosine of one draw with the gradient of the expected reward, "
        f"estimated from {REFERENCE_DRAWS * draws} other draws with c = 8, n = 32, groups per position and credit per "
        "token; that estimate has noise of its own (*halves*: the cosine between the means of its two halves), which "
        "makes all alignments smaller. In brackets, the difference to the paper's estimator on the same seed. *Length* "
        "is the mean of |g|. All estimators with c × n = 256 write as many tokens (1,280 per document)."
    )
    return "\n\n".join(
        ["### How noisy the policy gradient is", about, f"![Alignment of single draws]({figure})", *parts]
    )


def _noise_table(runs: Mapping[str, Mapping[str, Any]], title: str) -> str:
    rows = []
    for one in ESTIMATORS:
        values = {
            key: {seed: run["estimators"][one.name][key] for seed, run in runs.items()}
            for key in ("alignment", "signal_to_noise", "norm", "zero_std")
        }
        first = {seed: run["estimators"][ESTIMATORS[0].name]["alignment"] for seed, run in runs.items()}
        cells = {key: mean(values[key]) for key in values}
        if one is not ESTIMATORS[0]:
            cells["alignment"] += f" ({shown(difference(values['alignment'], first))})"
        rows.append([one.label, *cells.values()])
    header = ["estimator", "alignment of one draw", "signal to noise", "length", "groups without a difference"]
    halves, sft = (mean({seed: run[key] for seed, run in runs.items()}) for key in ("halves", "next_token_alignment"))
    return (
        f"#### {title[0].upper()}{title[1:]}\n\n{table(header, rows)}\n\n"
        f"The next-token gradient of the same batch has alignment {sft}; halves: {halves}."
    )


def noise_rows(records: Records, model: str, state: str) -> list[Row]:
    """For a figure: alignments, a heading for each reward."""
    rows = []
    for reward in ("cosine", "binary"):
        runs = records.of("noise", model, state, reward)
        if runs:
            rows.append(Row(f"{STATE_NAMES[state]}, {reward} reward"))
        for one in ESTIMATORS if runs else ():
            found = estimate([run["estimators"][one.name]["alignment"] for run in runs.values()])
            rows.append(Row(one.label, found, 2 if one.credit == "token" else 1))
    return rows
