"""From ``results.json`` to a section of the results page and its figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.miniature.figures import Row, Series, curves, forest
from examples.miniature.reading import reading_of
from examples.miniature.results import table
from examples.miniature.statistics import Estimate, estimate, paired
from examples.text.arms import ESTIMATORS, MANY_METHODS, METHODS, Method

# Name, heading, whether less is better (None: neither is).
SCORES: tuple[tuple[str, str, bool | None], ...] = (
    ("ntp_loss", "next-token loss", True),
    ("ntp_accuracy", "next-token accuracy", False),
    ("greedy_match", "{k} tokens right, greedy", False),
    ("sampled_match", "{k} tokens right, sampled", False),
    ("reward_cosine", "cosine reward", False),
    ("reward_binary", "binary reward", False),
    ("entropy", "entropy of predictions", None),
)
DIGITS = {"sampled_match": 5}
"""Behind the point; 4 for all others."""
LABELS = {method.name: method.label for method in METHODS}
READING = Path(__file__).with_name("reading.md")
SIGNAL = ("signal", "norm", "along_sft", "with_signal")
BASE_FIGURE, DIFFERENCE_FIGURE = "text_base.svg", "text_differences.svg"

Values = dict[str, float]
Results = Mapping[str, Any]


def section(results: Results, figures_in: str = ".") -> str:
    """Markdown; figures are linked in the directory ``figures_in``."""
    parts = [
        "## Real text",
        _about(results),
        reading_of(READING, read_runs(results)),
        f"![Validation loss of the base models]({figures_in}/{BASE_FIGURE})",
    ]
    for lr in results["plan"]["lrs"]:
        if pairs := _pairs(results, lr):
            heading = f"### Learning rate {lr:g}, {len(pairs)} pairs of base and seed"
            parts += [heading, _means(results, lr), _differences(results, lr)]
    if results["runs"]:
        parts.append(f"![Differences from SFT]({figures_in}/{DIFFERENCE_FIGURE})")
    parts += _many(results)
    if results["sharpened"]:
        parts += ["### Sharper predictions alone", _sharpened(results)]
    if results["sweep"]:
        parts += ["### Sweeps", _sweeps(results)]
    if results["signal"]:
        parts += ["### Gradients", _signal(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def figures(results: Results) -> dict[str, str]:
    """SVG by file name."""
    series = [
        Series(f"base {base['base']}", [(step, estimate([loss])) for step, loss in base["curve"]], 1 + index)
        for index, base in enumerate(results["bases"])
    ]
    drawn = {BASE_FIGURE: curves("Validation loss of the base models", "optimiser steps", "nats per token", series)}
    rows: list[Row] = []
    for name, heading in [(name, heading) for name, heading, less in SCORES[1:] if less is not None]:
        rows.append(Row(_named(heading, results)))
        for lr in results["plan"]["lrs"]:
            for index, method in enumerate(METHODS[1:]):
                one = difference(results, lr, method.name, name) if _pairs(results, lr) else None
                if one is not None:
                    scaled = Estimate(100 * one.mean, 100 * one.half_width, one.count)
                    rows.append(Row(f"{method.name}, lr {lr:g}", scaled, 1 + index))
    if any(row.estimate for row in rows):
        drawn[DIFFERENCE_FIGURE] = forest(
            "REFINE minus SFT after as many optimiser steps, test text", "points (1/100)", rows
        )
    return drawn


def difference(results: Results, lr: float, method: str, score: str, equal_compute: bool = False) -> Estimate:
    """A method minus SFT on the test text, paired by base and seed.

    ``equal_compute``: minus SFT after as many more steps as cost what the method cost.
    """
    steps = results["plan"]["training"]["steps"]
    ours = _values(results, lr, method, score, steps)
    return paired(ours, _values(results, lr, "sft", score, _steps(results, lr, method) if equal_compute else steps))


def _values(results: Results, lr: float, method: str, score: str, steps: int) -> Values:
    """By base and seed, of the pairs that all methods have."""
    pairs = _pairs(results, lr)
    return {
        f"{run['base']}.{run['seed']}": run["scores"][str(steps)][score]
        for run in results["runs"]
        if (run["method"], run["lr"]) == (method, lr)
        and (run["base"], run["seed"]) in pairs
        and str(steps) in run["scores"]
    }


def _steps(results: Results, lr: float, method: str) -> int:
    """Optimiser steps of SFT at the cost of a method's run."""
    steps: int = results["plan"]["training"]["steps"]
    return round(_runs(results, lr, method)[0]["passes"] * steps)


def _pairs(results: Results, lr: float) -> set[tuple[int, int]]:
    """Base and seed of what all methods have finished: a run that was cut has more of some."""
    done = [{(run["base"], run["seed"]) for run in _runs(results, lr, one.name)} for one in _compared(results)]
    return set.intersection(*done)


def _compared(results: Results) -> tuple[Method, ...]:
    """The methods that the runs are of, SFT first."""
    methods: tuple[Method, ...] = results.get("compared", METHODS)
    return methods


def _runs(results: Results, lr: float, method: str) -> list[dict[str, Any]]:
    return [run for run in results["runs"] if (run["method"], run["lr"]) == (method, lr)]


def _about(results: Results) -> str:
    plan, corpus, bases = results["plan"], results["corpus"], results["bases"]
    training, base = plan["training"], plan["base"]
    known = [*bases, *results.get("many_bases", ())]
    known += [run for kind in ("runs", "sweep", "many") for run in results.get(kind, ())]
    seconds = sum(one["processor_seconds"] for one in known)
    scope = ", over orders of the windows and random draws, not over base models" if len(bases) == 1 else ""
    return (
        f"The Python standard library as text: {corpus['train']:,} training windows of {plan['length']} tokens (a BPE "
        f"of {base['vocabulary']:,} pieces), {corpus['validation']} and {corpus['test']} windows of other files for "
        f"validation and test. Base models: {len(bases)}, DeltaNet of {bases[0]['parameters']:,} parameters, "
        f"{base['steps']:,} steps of {base['batch']} windows with a learning rate that falls to zero. From them: "
        f"{training['steps']} optimiser steps of {training['mini_batch']} windows with a constant learning rate, "
        f"c={training['chunks']}, k={training['rollout_length']}. A method and SFT that share a base and a seed see "
        f"the same windows. ± is half the 95% interval of the mean over pairs of base and seed{scope}. "
        f"Written by `python -m examples.text`, {seconds / 60:.0f} minutes of one core's time in training steps."
    )


def read_runs(results: Results) -> list[Any]:
    """All mid-training runs: ``reading.md`` is of these."""
    return [*results["runs"], *results.get("many", [])]


def _means(results: Results, lr: float) -> str:
    steps = results["plan"]["training"]["steps"]
    rows = [
        [
            "base",
            "",
            *(_mean([base["scores"]["test"][name] for base in results["bases"]], name) for name, _, _ in SCORES),
        ]
    ]
    marks = [("sft", "SFT", steps)]
    marks += [(method.name, method.label, steps) for method in _compared(results)[1:]]
    cost: dict[int, list[str]] = {}
    for method in _compared(results)[1:]:
        cost.setdefault(_steps(results, lr, method.name), []).append(method.name)
    marks += [("sft", f"SFT, at the cost of {' and '.join(names)}", count) for count, names in cost.items()]
    for arm, label, count in marks:
        values = {name: list(_values(results, lr, arm, name, count).values()) for name, _, _ in SCORES}
        rows.append([label, str(count), *(_mean(found, name) for name, found in values.items())])
    return table(["test text", "steps", *_headings(results)], rows)


def _differences(results: Results, lr: float) -> str:
    steps, rows = results["plan"]["training"]["steps"], []
    base = {str(one["base"]): one["scores"]["test"] for one in results["bases"]}
    cells = []
    for name, _, less in SCORES:
        values = _values(results, lr, "sft", name, steps)
        gains = estimate([value - base[key.split(".")[0]][name] for key, value in values.items()])
        cells.append(_signed(gains, name, less))
    rows.append(["SFT minus base", *cells])
    for method in _compared(results)[1:]:
        for equal, words in ((False, "same steps"), (True, "same compute")):
            found = [_signed(difference(results, lr, method.name, name, equal), name, less) for name, _, less in SCORES]
            rows.append([f"{method.name} minus SFT, {words}", *found])
    note = "Paired differences; **bold** where the interval leaves out 0 in favour of the first, *italic* against it."
    return f"{table(['difference', *_headings(results)], rows)}\n\n{note}"


def _many(results: Results) -> list[str]:
    """The runs with many rollouts, which are shorter and may have a base model of their own."""
    plan, lr = results["plan"], results["plan"]["lrs"][0]
    seen = {
        **results,
        "runs": results.get("many", []),
        "bases": results.get("many_bases", results["bases"]),
        "plan": {**plan, "training": {**plan["training"], "steps": plan.get("many_steps", 0)}},
        "compared": MANY_METHODS,
    }
    pairs = _pairs(seen, lr)
    if not pairs:
        return []
    anew = "a base model trained anew with the same settings" if "many_bases" in results else "the same base model"
    cost = _runs(seen, lr, MANY_METHODS[1].name)[0]["passes"]
    about = (
        f"{plan['many_steps']} optimiser steps at learning rate {lr:g} from {anew}, {len(pairs)} pairs of base and "
        f"seed; a step costs {cost:.1f} times one of SFT here, which is why these runs are shorter."
    )
    return ["### Many rollouts", about, _means(seen, lr), _differences(seen, lr)]


def _sweeps(results: Results) -> str:
    """Differences from SFT at the same learning rate and from the base, on the validation text."""
    bases = {base["base"]: base["scores"]["validation"] for base in results["bases"]}
    steps = str(results["plan"]["training"]["steps"])
    grouped: dict[tuple[str, float, float], list[dict[str, Any]]] = {}
    for run in results["sweep"]:
        grouped.setdefault((run["method"], run["rl_coef"], run["lr"]), []).append(run)
    rows = []
    for (method, rl_coef, lr), runs in sorted(grouped.items(), key=lambda item: (item[0][2], item[0])):
        cells = []
        for name, _, _ in SCORES:
            gains = [run["scores"][steps][name] - bases[run["base"]][name] for run in runs]
            cells.append(f"{estimate(gains).mean:+.{_digits(name)}f}")
        rows.append([method, f"{rl_coef:g}" if rl_coef else "", f"{lr:g}", *cells])
    note = f"Change from the base on the validation text, one seed for each base ({len(bases)}); no intervals."
    return f"{note}\n\n{table(['method', 'λ', 'learning rate', *_headings(results)], rows)}"


def _sharpened(results: Results) -> str:
    bases = {base["base"]: base["scores"]["test"] for base in results["bases"]}
    rows = []
    for temperature in results["plan"]["temperatures"]:
        found = [one for one in results["sharpened"] if one["temperature"] == temperature]
        cells = []
        for name, _, _ in SCORES:
            gains = [one["scores"][name] - bases[one["base"]][name] for one in found]
            cells.append(f"{estimate(gains).mean:+.{_digits(name)}f}")
        rows.append([f"{temperature:g}", *cells])
    note = "Change of the base on the test text when its predictions are divided by a temperature, without training."
    return f"{note}\n\n{table(['temperature', *_headings(results)], rows)}"


def _signal(results: Results) -> str:
    batches, rows = results["plan"]["signal_batches"], []
    means = {
        method.name: {key: sum(one[key] for one in found) / len(found) for key in SIGNAL}
        for method in ESTIMATORS
        if (found := [one for one in results["signal"] if one["method"] == method.name])
    }
    for method in ESTIMATORS:
        if method.name in means:
            one, plain = means[method.name], means.get("sft", {}).get("signal", 0.0)
            most = "" if method.name == "sft" else f"{attenuation(one['signal'], plain, batches):.2g}"
            share = f"{one['with_signal']:.0%}" if method.rl_coef else ""
            rows.append([method.name, *(f"{one[key]:.3g}" for key in SIGNAL[:3]), most, share])
    which = " of the runs with many rollouts" if "many_bases" in results else ""
    note = (
        f"At the base models{which}, over {batches} mini-batches, of the policy loss alone (for SFT of the next-token "
        "loss): "
        "squared length of the mean gradient over the variance of one, mean length of one, cosine between the mean and "
        "SFT's mean on the same windows, about what that cosine would be if the expected gradients pointed the same "
        "way (both means are noisy), share of groups whose rewards differ."
    )
    headings = ["method", "signal / noise", "norm", "cosine with SFT", "at most about", "groups with signal"]
    return f"{note}\n\n{table(headings, rows)}"


def attenuation(first: float, second: float, draws: int) -> float:
    """Cosine that means of ``draws`` gradients show where their expectations are parallel, from their signal-to-noise.

    A mean's share of signal in its squared length is R s / (1 + R s); no signal, no cosine.
    """
    shares = [draws * max(one, 0.0) / (1.0 + draws * max(one, 0.0)) for one in (first, second)]
    return math.sqrt(shares[0] * shares[1])


def _headings(results: Results) -> list[str]:
    return [_named(heading, results) + (" (less is better)" if less else "") for _, heading, less in SCORES]


def _named(heading: str, results: Results) -> str:
    return heading.format(k=results["plan"]["training"]["rollout_length"])


def _digits(score: str) -> int:
    return DIGITS.get(score, 4)


def _mean(values: Sequence[float], score: str) -> str:
    return f"{sum(values) / len(values):.{_digits(score)}f}"


def _signed(one: Estimate, score: str, less: bool | None) -> str:
    mark = "" if less is None else {1: "**", -1: "*", 0: ""}[-one.sign if less else one.sign]
    return f"{mark}{one.text(_digits(score), signed=True)}{mark}"
