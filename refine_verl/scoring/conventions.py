"""Which score a task has, in three published conventions that give different numbers for the same answers.

`paper` is what the authors of REFINE compute: the first line of an answer counts for questions, any reference may
match. `lm_eval` is what lm-evaluation-harness computes for its tasks `longbench_*` and `ruler_*`. `official` is what
the benchmarks' own scripts compute, LongBench's `eval.py` and RULER's `scripts/eval`. Metrics that differ have
different names, so that a number always says where it belongs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from refine_verl.config import CONVENTIONS, Refusal, did_you_mean
from refine_verl.scoring.metrics import MEASURES, TREC_CLASSES, class_match, is_code, printable

CLASS_MATCH = "class_match"

Cut = Callable[[str], str]


class MetricError(Refusal):
    """A task, metric or reference that cannot be scored; the message says what can."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one task is scored in one convention.

    Attributes:
        name: of the metric, as in reports.
        measure: a key of `metrics.MEASURES`, or `class_match`.
        cut: what of a generated answer is measured.
    """

    name: str
    measure: str
    cut: Cut


def whole(text: str) -> str:
    """All of the answer."""
    return text.strip()


def everything(text: str) -> str:
    """All of the answer, white space at its ends included: ROUGE counts what follows a last full stop as a sentence."""
    return text


def first_full_line_as_it_is(text: str) -> str:
    """The first line that is not empty, white space at its ends included."""
    return text.lstrip("\n").split("\n", 1)[0]


def first_line(text: str) -> str:
    """Up to the first line end; nothing where the answer begins with one."""
    return text.split("\n", 1)[0].strip()


def first_full_line(text: str) -> str:
    """The first line that is not empty."""
    return first_line(text.lstrip("\n"))


def printable_line(text: str) -> str:
    """The first line, control characters removed."""
    return printable(text.split("\n", 1)[0])


def code_line_or_all(text: str) -> str:
    """The first line of code, blank ones included once text has begun; all of the text where there is none."""
    return next((line for line in text.lstrip("\n").split("\n") if is_code(line)), text)


def code_line_or_nothing(text: str) -> str:
    """As `code_line_or_all`, and nothing where there is none."""
    return next((line for line in text.lstrip("\n").split("\n") if is_code(line)), "")


def code_line(text: str) -> str:
    """The first line of code that is not blank; nothing where there is none."""
    return next((line for line in text.split("\n") if line.strip() and is_code(line)), "")


def _rules(paper: Rule, lm_eval: Rule, official: Rule) -> dict[str, Rule]:
    return {"paper": paper, "lm_eval": lm_eval, "official": official}


_QUESTIONS = _rules(
    Rule("token_f1", "token_f1", first_line),
    Rule("qa_f1_score", "token_f1", whole),
    Rule("longbench_f1", "token_f1", whole),
)
_TRIVIA = _rules(
    Rule("token_f1", "token_f1", first_full_line),
    Rule("qa_f1_score", "token_f1", first_line),
    Rule("longbench_f1", "token_f1", first_full_line),
)
_CLASSES = _rules(
    Rule("class_match", CLASS_MATCH, first_full_line),
    Rule("classification_score", CLASS_MATCH, first_line),
    Rule("longbench_class_match", CLASS_MATCH, first_full_line),
)
_DIALOGUES = _rules(
    Rule("rouge_l", "rouge_l", first_full_line),
    Rule("rouge_score", "rouge_l", first_line),
    Rule("longbench_rouge_l", "rouge_l", first_full_line_as_it_is),
)
_SUMMARIES = _rules(
    Rule("rouge_l", "rouge_l", whole),
    Rule("rouge_score", "rouge_l", whole),
    Rule("longbench_rouge_l", "rouge_l", everything),
)
_CODE = _rules(
    Rule("code_similarity", "code_similarity", code_line_or_all),
    Rule("code_sim_score", "code_similarity", code_line),
    Rule("longbench_code_similarity", "code_similarity", code_line_or_nothing),
)
_RULER_QA = _rules(
    Rule("substring_match", "substring_match", printable_line),
    Rule("string_match_part", "substring_fraction", printable),
    Rule("ruler_any_match", "substring_match", printable),
)
_NEEDLES = dict.fromkeys(CONVENTIONS, Rule("string_match_all", "substring_fraction", printable))

TASKS: dict[str, dict[str, Rule]] = {
    **dict.fromkeys(("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"), _QUESTIONS),
    "triviaqa": _TRIVIA,
    "trec": _CLASSES,
    "samsum": _DIALOGUES,
    **dict.fromkeys(("qmsum", "multi_news", "gov_report"), _SUMMARIES),
    **dict.fromkeys(("lcc", "repobench-p"), _CODE),
    **dict.fromkeys(("ruler_squadqa", "ruler_hotpotqa"), _RULER_QA),
    **dict.fromkeys((f"niah_{kind}_{number}" for kind in ("single", "multikey") for number in (1, 2, 3)), _NEEDLES),
    **dict.fromkeys(("niah_multivalue", "niah_multiquery"), _NEEDLES),
    # A task named after a measure is scored with it: the way to score data of one's own.
    **{measure: dict.fromkeys(CONVENTIONS, Rule(measure, measure, whole)) for measure in (*MEASURES, CLASS_MATCH)},
}
"""Every task that can be scored, and how. Add one with `register_task`."""


def register_task(name: str, measure: str, cut: Cut = whole) -> None:
    """Make a task of one's own known; all conventions then score it alike.

    Args:
        name: what the data's `task` column says.
        measure: `class_match` or a key of `metrics.MEASURES`.
        cut: what of a generated answer is measured.

    Raises:
        MetricError: the name is taken, or there is no such measure.
    """
    if name in TASKS:
        raise MetricError(f"task {name!r} is scored already; choose another name.")
    known = (*MEASURES, CLASS_MATCH)
    if measure not in known:
        raise MetricError(f"unknown metric {measure!r}; metrics are: {', '.join(known)}.{did_you_mean(measure, known)}")
    TASKS[name] = dict.fromkeys(CONVENTIONS, Rule(measure, measure, cut))


def rule_of(task: str, convention: str = "paper") -> Rule:
    """How `task` is scored.

    Raises:
        MetricError: an unknown convention, a row without a task, or an unknown task; the message lists those known.
    """
    if convention not in CONVENTIONS:
        hint = did_you_mean(convention, CONVENTIONS)
        raise MetricError(f"unknown convention {convention!r}; conventions are: {', '.join(CONVENTIONS)}.{hint}")
    if task not in TASKS:
        what = (
            f"unknown task {task!r}" if task else "a row names no task (column `task`, or data.task=NAME for all rows)"
        )
        raise MetricError(
            f"{what}, so there is no metric to score it with; tasks are: {', '.join(TASKS)}."
            f"{did_you_mean(task, TASKS)} Data of your own can name a metric as its task, or be registered with "
            "refine_verl.scoring.register_task."
        )
    return TASKS[task][convention]


def main_metric(task: str, convention: str = "paper") -> str:
    """Name of the metric a task is judged by.

    Raises:
        MetricError: as `rule_of`.
    """
    return rule_of(task, convention).name


def score(
    task: str,
    prediction: str,
    references: Sequence[str],
    convention: str = "paper",
    *,
    classes: Sequence[str] = (),
) -> dict[str, float]:
    """Score one generated answer.

    Args:
        task: what the data's `task` column says; a key of `TASKS`.
        prediction: the generated text, as decoded: neither cut nor stripped.
        references: right answers, at least one.
        convention: `paper`, `lm_eval` or `official`.
        classes: for class match, all classes there are (the data's `all_classes`); trec's own by default.

    Returns:
        `{main_metric(task, convention): number in 0 ... 1}`.

    Raises:
        MetricError: an unknown task or convention, no references, or classes missing where they are needed.
    """
    rule = rule_of(task, convention)
    if isinstance(references, str) or not references or not all(isinstance(text, str) for text in references):
        raise MetricError(f"task {task!r}: references must be a list of at least one text, not {references!r}.")
    answer = rule.cut(prediction)
    if rule.measure != CLASS_MATCH:
        return {rule.name: MEASURES[rule.measure](answer, references)}
    known = list(classes) or (list(TREC_CLASSES) if task == "trec" else [])
    if not known:
        raise MetricError(f"task {task!r} is scored by class: the data needs a column `all_classes` (list of names).")
    return {rule.name: class_match(answer, references, known)}
