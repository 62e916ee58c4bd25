"""Prompts with a common context: which there are, that it is read once, and that answers stay what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reference.evaluate_files import TEXT, write_parquet

from refine_verl.evaluate import shared
from refine_verl.evaluate.__main__ import main
from refine_verl.evaluate.lm import RefineLM
from refine_verl.evaluate.shared import Batch, batches
from refine_verl.models import FastWeightActor

A, B = list(range(400)), list(range(1000, 1300))


@pytest.mark.parametrize(
    ("prompts", "wanted"),
    [
        # in any order, and the context is what all of them begin with
        ([[*A, 1], [*B, 2], [*A, 3, 4], [5]], [([1, 3], 0, True), ([0, 2], 400, True)]),
        # a prompt that is the beginning of another one keeps a token to be continued from
        ([A, [*A, 1], A], [([], 0, True), ([0, 1], 399, True), ([2], 399, False)]),
        # one that shares less joins where fewer tokens are read in all: twice 390 are saved, or once 400
        ([[*A, 1], [*A[:390], 2], [*A, 3]], [([0, 1], 390, True), ([2], 390, False)]),
        ([[*A, *B, 1], [*A, *B, 2], [*A[:300], 5000]], [([2], 0, True), ([0, 1], 700, True)]),
        ([A[:200] + [1], A[:200] + [2]], [([0, 1], 0, True)]),
    ],
)
def test_groups(prompts: list[list[int]], wanted: list[tuple[list[int], int, bool]]) -> None:
    found = [(batch.rows, batch.shared, batch.first) for batch in batches(prompts, 2, share=True)]
    assert found == [entry for entry in wanted if entry[0]]
    assert [row for batch in batches(prompts, 9, share=False) for row in batch.rows] == list(range(len(prompts)))


def test_what_is_read() -> None:
    assert Batch([3, 5], 400, True).read([410, 407]) == [410, 7]
    assert Batch([3, 5], 400, False).read([410, 407]) == [10, 7]
    assert Batch([3, 5], 0, True).read([410, 407]) == [410, 407]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every pass."""
    passes: list[int] = []
    original = FastWeightActor.run

    def run(self: FastWeightActor, packed: Any, *rest: Any, **named: Any) -> Any:
        passes.append(sum(packed.lengths))
        return original(self, packed, *rest, **named)

    monkeypatch.setattr(FastWeightActor, "run", run)
    monkeypatch.setattr(shared, "LEAST", 64)
    return passes


def test_evaluate(model_dir: Path, tmp_path: Path, counted: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [TEXT * 2 + f"Question {n}?" for n in range(5)] + [TEXT[3:] + "Else?"]
    rows = [{"prompt": x, "answers": ["City"], "max_gen_tokens": 1, "task": "trec"} for x in prompts]
    write_parquet(tmp_path / "data/longbench/trec_16384.parquet", [rows[0], rows[5], *rows[1:5]])
    arguments = [f"model={model_dir}", "tasks=trec", f"data_dir={tmp_path / 'data'}", "batch_size=2"]
    assert main([*arguments, f"out={tmp_path / 'once'}"]) == 0
    shown = capsys.readouterr().out
    context = len(TEXT) * 2 + len("Question ")
    read = context + 5 * 2 + len(TEXT[3:] + "Else?")
    assert sum(counted) == read
    asked = sum(map(len, prompts))
    said = f"Contexts that several prompts begin with were read once: {read} of {asked} prompt tokens were read."
    assert said in shown.splitlines() and said in (tmp_path / "once/results.md").read_text()
    (row,) = json.loads((tmp_path / "once/results.json").read_text())["results"]
    assert (row["prompt_tokens"], row["read_tokens"]) == (asked, read)

    counted.clear()
    assert main([*arguments, f"out={tmp_path / 'each'}", "share_contexts=false"]) == 0
    assert sum(counted) == asked and "were read once" not in capsys.readouterr().out
    one, other = (
        [json.loads(line) for line in (tmp_path / name / "samples/trec.jsonl").read_text().splitlines()]
        for name in ("once", "each")
    )
    assert [x["prediction"] for x in one] == [x["prediction"] for x in other]
    assert main([*arguments, f"out={tmp_path / 'no'}", "share_contexts=true", "ttt=sft"]) == 2
    assert "share_contexts: has no effect with ttt=sft" in capsys.readouterr().err


def test_the_harness(model_dir: Path, counted: list[int]) -> None:
    from lm_eval.api.instance import Instance

    lm = RefineLM(pretrained=str(model_dir), batch_size=2)
    prompts = [TEXT * 2 + f"Question {n}?" for n in range(3)] + ["Else?"]
    given = {"until": ["zzz"], "max_gen_toks": 1}
    requests = [Instance("generate_until", {}, (text, given), index) for index, text in enumerate(prompts)]
    together = lm.generate_until(requests, disable_tqdm=True)
    assert sum(counted) == len(TEXT) * 2 + len("Question ") + 3 * 2 + len("Else?")
    assert together == [lm.generate_until([request], disable_tqdm=True)[0] for request in requests]


def test_log_likelihoods_of_the_harness(model_dir: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices of one question, and questions behind the same examples: read once, and scored as if read each time."""
    from lm_eval.api.instance import Instance

    lm = RefineLM(pretrained=str(model_dir), batch_size=2, dtype="float32")
    lm.evaluated.actor.double()  # type: ignore[union-attr]
    contexts = [TEXT * 2 + f"Question {n}?" for n in range(2)] + ["Else?"]
    pairs = [(context, choice) for context in contexts for choice in (" yes", " no", " neither")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    together = lm.loglikelihood(requests, disable_tqdm=True)
    # the two questions differ in the token before their last one
    behind = sum(len(choice) for _, choice in pairs) + 6 * len("0?") + 3 * len("Else?")
    assert sum(counted) == len(TEXT) * 2 + len("Question ") + behind
    monkeypatch.setattr(shared, "LEAST", 10_000)
    counted.clear()
    each = lm.loglikelihood(requests, disable_tqdm=True)
    assert sum(counted) == sum(len(context) + len(choice) for context, choice in pairs)
    assert [value for value, _ in together] == pytest.approx([value for value, _ in each], rel=0, abs=1e-9)
    assert [greedy for _, greedy in together] == [greedy for _, greedy in each]
    assert len({round(value, 6) for value, _ in each}) == len(pairs)  # the comparison can fail
