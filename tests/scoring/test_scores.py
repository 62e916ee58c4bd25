"""Every measure against values worked out by hand, all conventions, and lm-eval's own functions where it is."""

import importlib.util
import sys
from pathlib import Path

import pytest

from refine_verl.scoring import CONVENTIONS, TASKS, MetricError, conventions, main_metric, register_task, score
from refine_verl.scoring.metrics import (
    TREC_CLASSES,
    class_match,
    line_similarity,
    rouge_l,
    substring_fraction,
    substring_match,
    token_f1,
)


def only(scores):
    (value,) = scores.values()
    return value


def test_substring_match_takes_any_reference():
    references = ["early 11th century", "11th century", "in the 11th"]
    assert substring_match("In the EARLY 11th century.", references) == 1.0
    assert substring_match("in the 11th hour", references) == 1.0
    assert substring_match("the 12th century", references) == 0.0


def test_substring_fraction_counts_references():
    assert substring_fraction("It was 1082.", ["1082", "February 1082", "Feb. 1082"]) == pytest.approx(1 / 3)
    assert substring_fraction("a b", ["a", "b"]) == 1.0


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("The Atlas Mountains!", ["the atlas mountains"], 1.0),  # articles, case and punctuation do not count
        ("atlas", ["The Atlas Mountains"], 2 * 1 * 0.5 / 1.5),  # precision 1, recall 1/2
        ("x x y", ["x z"], 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),  # one x of three words, one of two
        ("y", ["x", "y z"], 2 / 3),  # the best reference
        ("", ["x"], 0.0),
        ("the", ["the"], 0.0),  # nothing left of either
    ],
)
def test_token_f1(prediction, references, expected):
    assert token_f1(prediction, references) == pytest.approx(expected)


def test_rouge_l_by_hand():
    # Longest common subsequence "the cat on mat": 4 of 5 words there, 4 of 6 here.
    precision, recall = 4 / 6, 4 / 5
    expected = 2 * precision * recall / (precision + recall)
    # The package works on sets of words per sentence: none is repeated here.
    assert rouge_l("the cat sat on a mat", ["the cat lay on mat"]) == pytest.approx(expected, abs=1e-6)
    assert rouge_l("same words", ["same words"]) == pytest.approx(1.0, abs=1e-6)
    assert rouge_l("Same", ["same"]) == 0.0
    assert rouge_l("", ["x"]) == rouge_l(" . ", ["x"]) == 0.0


def test_rouge_l_of_one_endless_sentence():
    words = [f"w{number}" for number in range(1500)]
    limit = sys.getrecursionlimit()
    assert rouge_l(" ".join(words), [" ".join(words[::2])]) == pytest.approx(2 / 3, abs=1e-6)
    assert sys.getrecursionlimit() == limit


def test_class_match_divides_by_the_classes_named():
    classes = ["City", "Country", "Other location"]
    assert class_match("Other location", ["Other location"], classes) == 1.0
    assert class_match("City or Country", ["City"], classes) == 0.5
    assert class_match("Country", ["City"], classes) == 0.0
    assert class_match("city", ["City"], classes) == 0.0
    # "location" is part of the right name, and is not counted against it.
    assert class_match("Other location", ["Other location"], ["location", "x", "Other location"]) == 1.0


def test_line_similarity_by_hand():
    # "abcd" and "bcde" share "bcd": 2 * 3 / 8.
    assert line_similarity("abcd", ["bcde"]) == 0.75
    assert line_similarity("ab", ["abc"]) == 0.8
    # 2 * 1 / 3 = 0.666..., rounded to a hundredth.
    assert line_similarity("a", ["ab"]) == 0.67
    assert line_similarity("", ["x"]) == 0.0


@pytest.mark.parametrize(
    ("task", "answer", "references", "name", "expected"),
    [
        # everything counts: 1 of 3 words is right, all of the reference is found
        ("hotpotqa", " Paris\nand more", ["Paris"], "longbench_f1", 2 * (1 / 3) / (4 / 3)),
        ("musique", "", ["Paris"], "longbench_f1", 0.0),
        # of the few-shot tasks the first line that is not empty
        ("triviaqa", "\n\nParis\nand more", ["Paris"], "longbench_f1", 1.0),
        ("trec", "\nCity or State\nother", ["City"], "longbench_class_match", 0.5),
        ("samsum", "\nThey meet\nat noon", ["They meet"], "longbench_rouge_l", 1.0),
        ("gov_report", "one two\nthree four", ["one two three four"], "longbench_rouge_l", 1.0),
        # white space at the end is a sentence of its own to the rouge package
        ("multi_news", "Ann sees blue.\n", ["Ann sees blue"], "longbench_rouge_l", 6 / 7),
        # a blank line is code once the answer has begun; where none is code, nothing is left
        ("lcc", "\n# note\nabcd", ["bcde"], "longbench_code_similarity", 0.75),
        ("lcc", "  \nx = 1", ["  "], "longbench_code_similarity", 1.0),
        ("repobench-p", "# x = 1", ["x = 1"], "longbench_code_similarity", 0.0),
        # any reference, anywhere in the answer, the best one counts
        ("ruler_squadqa", "no\nin 1082.", ["February 1082", "1082"], "ruler_any_match", 1.0),
        ("ruler_hotpotqa", "no\nin\t1083", ["February 1082", "1082"], "ruler_any_match", 0.0),
        ("niah_multivalue", "12, 34", ["12", "34", "56", "78"], "string_match_all", 0.5),
    ],
)
def test_the_benchmarks_own_scores(task, answer, references, name, expected):
    assert score(task, answer, references, "official") == {name: pytest.approx(expected, abs=1e-6)}


@pytest.mark.parametrize("task", ["narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa"])
def test_questions_first_line_on_paper_everything_in_lm_eval(task):
    answer = " Paris\nQuestion: and now some more"
    assert score(task, answer, ["Paris"]) == {"token_f1": 1.0}
    # 1 of 6 words right, all of the reference found.
    assert score(task, answer, ["Paris"], "lm_eval") == {"qa_f1_score": pytest.approx(2 * (1 / 6) / (7 / 6))}
    assert only(score(task, "\nParis", ["Paris"])) == 0.0


def test_few_shot_tasks_skip_leading_line_ends_but_in_lm_eval():
    for task, answer in (("triviaqa", "Paris"), ("trec", "City"), ("samsum", "They meet")):
        for convention, expected in (("paper", 1.0), ("lm_eval", 0.0), ("official", 1.0)):
            assert only(score(task, f"\n{answer}\nQuestion", [answer], convention)) == pytest.approx(expected, abs=1e-6)
            assert only(score(task, f" {answer}\nother", [answer], convention)) == pytest.approx(1.0, abs=1e-6)


def test_summaries_are_scored_whole():
    for task in ("qmsum", "multi_news", "gov_report"):
        for convention in CONVENTIONS:
            whole = only(score(task, "one two\nthree four", ["one two three four"], convention))
            assert whole == pytest.approx(1.0, abs=1e-6)


def test_code_lines():
    for task in ("lcc", "repobench-p"):
        assert score(task, "\n# note\nx = 1\ny", ["x = 1"]) == {"code_similarity": 1.0}
        assert score(task, "\n# note\nx = 1\ny", ["x = 1"], "lm_eval") == {"code_sim_score": 1.0}
        # A blank line counts on paper, once the answer has begun.
        assert only(score(task, "  \nx = 1", ["x = 1"])) == line_similarity("  ", ["x = 1"])
        assert only(score(task, "  \nx = 1", ["x = 1"], "lm_eval")) == 1.0
        # Where no line is code: everything on paper, nothing in lm-eval.
        assert only(score(task, "# x = 1", ["x = 1"])) == line_similarity("# x = 1", ["x = 1"]) > 0.5
        assert only(score(task, "# x = 1", ["x = 1"], "lm_eval")) == 0.0
        # Leading blanks of the line are part of it.
        assert only(score(task, "    x", ["    x"])) == 1.0


def test_ruler_questions_any_reference_against_share_of_references():
    references = ["1082", "February 1082", "in February 1082"]
    assert score("ruler_squadqa", " 1082.\nDocument 3", references) == {"substring_match": 1.0}
    assert score("ruler_squadqa", " 1082.\nDocument 3", references, "lm_eval") == {
        "string_match_part": pytest.approx(1 / 3)
    }
    # The first line only on paper; all of the answer in lm-eval.
    assert only(score("ruler_hotpotqa", "yes\nParis", ["paris"])) == 0.0
    assert only(score("ruler_hotpotqa", "yes\nParis", ["paris"], "lm_eval")) == 1.0
    assert only(score("ruler_hotpotqa", "\nParis", ["paris"])) == 0.0


def test_needles():
    for convention in CONVENTIONS:
        assert score("niah_multivalue", "12, 34", ["12", "34", "56", "78"], convention) == {"string_match_all": 0.5}


def test_trec_without_classes_uses_the_data_sets_own():
    assert len(TREC_CLASSES) == len(set(TREC_CLASSES)) == 50
    assert only(score("trec", "Other location", ["Other location"])) == 1.0
    assert only(score("trec", "City and State", ["City"])) == 0.5
    assert only(score("trec", "City and State", ["City"], classes=["City"])) == 1.0


def test_a_metric_can_be_a_task_and_tasks_can_be_added():
    assert score("substring_match", "x Paris y", ["paris"]) == {"substring_match": 1.0}
    with pytest.raises(MetricError, match="all_classes"):
        score("class_match", "a", ["a"])
    assert only(score("class_match", "a", ["a"], classes=["a", "b"])) == 1.0
    register_task("my_task", "token_f1", conventions.first_line)
    try:
        assert score("my_task", "a b\nc", ["b"]) == {"token_f1": 1.0}
        with pytest.raises(MetricError, match="scored already"):
            register_task("my_task", "token_f1")
    finally:
        del TASKS["my_task"]
    with pytest.raises(MetricError, match="unknown metric 'f1'.*token_f1"):
        register_task("other", "f1")


def test_refusals_list_what_is_known():
    with pytest.raises(MetricError, match="unknown task 'hotpotq'.*narrativeqa.*Did you mean 'hotpotqa'"):
        score("hotpotq", "x", ["x"])
    with pytest.raises(MetricError, match="names no task.*data.task"):
        main_metric("")
    with pytest.raises(MetricError, match="unknown convention 'lmeval'.*paper, lm_eval, official.*lm_eval"):
        main_metric("trec", "lmeval")
    for references in ([], "Paris", [None]):
        with pytest.raises(MetricError, match="at least one text"):
            score("trec", "x", references)


def test_every_task_has_a_name_and_a_score_in_every_convention():
    for task in TASKS:
        for convention in CONVENTIONS:
            (name,) = score(task, "x", ["x"], convention, classes=["x"])
            assert name == main_metric(task, convention)


ANSWERS = [
    "Paris",
    " Paris\nand more",
    "\n\nParis.",
    "# comment\n\n    x = foo(a)\n",
    "`code`",
    "City",
    "City or State or Country\nCity",
    "",
    "the the a. B c d. E",
    "Description of a person and Date",
]
REFERENCES = [["Paris"], ["City"], ["    x = foo(b)"], ["a paris", "no. B d", "yes"], ["Description of a person"]]


def _lm_eval_module(relative):
    spec = importlib.util.find_spec("lm_eval")
    if spec is None:
        pytest.skip("lm-eval is not installed (pip install refine_verl[eval])")
    path = Path(next(iter(spec.submodule_search_locations))) / relative
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        # The file alone: its package needs far more than the metrics do.
        module_spec.loader.exec_module(module)
    except ImportError as error:
        pytest.skip(f"lm-eval's longbench metrics need more: {error}")
    return module


# What their task definitions stop generation at.
UNTIL_LINE = ("triviaqa", "trec", "samsum")
LONGBENCH = ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "triviaqa", "trec", "samsum")
LONGBENCH += ("qmsum", "multi_news", "lcc", "repobench-p")


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_convention_is_lm_evals_for_longbench():
    theirs = _lm_eval_module("tasks/longbench/metrics.py")
    if importlib.util.find_spec("Levenshtein"):
        pytest.skip("fuzzywuzzy counts differently with python-Levenshtein")
    for task in LONGBENCH:
        name = main_metric(task, "lm_eval")
        function = getattr(theirs, f"get_{name}")
        for answer in ANSWERS:
            stopped = answer.split("\n")[0] if task in UNTIL_LINE else answer
            for references in REFERENCES:
                document = {"answers": references, "all_classes": list(TREC_CLASSES)}
                expected = function(document, [stopped])
                assert score(task, answer, references, "lm_eval") == pytest.approx(expected), (task, answer, references)


def test_lm_eval_convention_is_lm_evals_for_ruler():
    theirs = _lm_eval_module("tasks/ruler/common_utils.py")
    for answer in [*ANSWERS, "a\tb\x07Paris"]:
        for references in REFERENCES:
            document = {"max_length": 4096, "outputs": references}
            part = theirs.process_results_part(document, [answer])["4096"]
            every = theirs.process_results(document, [answer])["4096"]
            assert only(score("ruler_squadqa", answer, references, "lm_eval")) == pytest.approx(part)
            assert only(score("niah_single_1", answer, references, "lm_eval")) == pytest.approx(every)
