"""How alike a generated answer and its references are: one number in 0 ... 1 per pair, the best reference counts.

These are the bare measures. What is cut off an answer before it is measured, and which measure a task has,
differs between two published conventions; see `conventions`.
"""

from __future__ import annotations

import difflib
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from rouge import Rouge

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CONTROL = re.compile(r"[\x00-\x1f]")
# The rouge package recurses once per word of a sentence pair; a degenerate answer is one sentence of 512 words.
_ROUGE_RECURSION = 20_000

TREC_CLASSES = tuple(Path(__file__).with_name("trec_classes.txt").read_text(encoding="utf-8").splitlines())
"""The 50 question types of LongBench's trec, spelt as in its data (one is cut off there)."""


def substring_match(prediction: str, references: Sequence[str]) -> float:
    """1 if any reference occurs in the prediction, whatever the case (the authors' score of RULER QA)."""
    return max(_contains(prediction, reference) for reference in references)


def substring_fraction(prediction: str, references: Sequence[str]) -> float:
    """The share of references that occur in the prediction, whatever the case (RULER in lm-eval)."""
    return sum(_contains(prediction, reference) for reference in references) / len(references)


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of the bags of words, lower case and without punctuation and articles (SQuAD's; LongBench QA)."""
    return max(_f1(_words(prediction), _words(reference)) for reference in references)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F as the `rouge` package counts it: case matters, sentences end at full stops.

    An answer (or reference) without a single word scores 0.
    """
    return max(_rouge(prediction, reference) for reference in references)


def class_match(prediction: str, references: Sequence[str], classes: Sequence[str]) -> float:
    """1/n for a prediction that names n classes, the right one among them; else 0 (LongBench's trec).

    Args:
        prediction: the answer.
        references: the right class.
        classes: all classes there are. Those whose name is part of the right one's do not count.
    """
    return max(_classified(prediction, reference, classes) for reference in references)


def line_similarity(prediction: str, references: Sequence[str]) -> float:
    """Share of matching characters (`difflib`, Ratcliff and Obershelp), rounded to a hundredth as fuzzywuzzy does."""
    return max(
        round(100 * difflib.SequenceMatcher(None, prediction, reference).ratio()) / 100 for reference in references
    )


def is_code(line: str) -> bool:
    """Whether LongBench takes a line for code: it has neither a comment sign nor a backtick."""
    return not any(sign in line for sign in ("`", "#", "//"))


def printable(text: str) -> str:
    """Without surrounding white space, control characters as line ends (RULER)."""
    return _CONTROL.sub("\n", text.strip()).strip()


MEASURES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "substring_match": substring_match,
    "substring_fraction": substring_fraction,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
    "code_similarity": line_similarity,
}
"""Measures of an answer and its references. `class_match` is not among them: it needs the classes."""


def _contains(prediction: str, reference: str) -> float:
    return float(reference.lower() in prediction.lower())


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _f1(prediction: list[str], reference: list[str]) -> float:
    common = (Counter(prediction) & Counter(reference)).total()
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def _rouge(prediction: str, reference: str) -> float:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(_ROUGE_RECURSION, before))
    try:
        scores = Rouge(metrics=["rouge-l"]).get_scores([prediction], [reference])
    except ValueError:  # its way to say that one of the two holds no word
        return 0.0
    finally:
        sys.setrecursionlimit(before)
    return float(scores[0]["rouge-l"]["f"])


def _classified(prediction: str, reference: str, classes: Sequence[str]) -> float:
    named = [name for name in classes if name in prediction]
    # Removing while iterating skips the entry behind a removed one. The published scores have it so.
    for name in named:
        if name in reference and name != reference:
            named.remove(name)
    return 1.0 / len(named) if reference in named else 0.0
