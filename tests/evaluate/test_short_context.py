"""The nine short-context tasks through the harness, from made-up files in the columns of the real ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from reference.evaluate_files import TEXT, write_jsonl, write_parquet
from reference.served import StandIn, stand_in

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM  # noqa: E402

from refine_verl.evaluate import short_context  # noqa: E402
from refine_verl.evaluate.__main__ import main  # noqa: E402
from refine_verl.evaluate.settings import EvaluateSettings  # noqa: E402

ARC = {"question": "What is green?", "choices": {"text": ["grass", "sky"], "label": ["A", "B"]}, "answerKey": "A"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "wikitext": [{"page": TEXT}, {"page": TEXT[:30]}],
    "lambada_openai": [{"text": "The grass is green"}, {"text": "Bob has nine apples"}],
    "fda": [{"text": "Color: ", "value": "e"}, {"text": "Name: ", "value": "zzz"}],
    "swde": [{"text": "Color: ", "value": "e"}, {"text": "Name: ", "value": "zzz"}],
    "piqa": [{"goal": "Eat", "sol1": "apple", "sol2": "stone", "label": n} for n in (0, 1)],
    "hellaswag": [
        {"ctx_a": "Ann eats", "ctx_b": "and", "activity_label": "Food", "endings": list("abcd"), "label": str(n)}
        for n in (0, 3)
    ],
    "winogrande": [{"sentence": "Ann saw _ .", "option1": "Bob", "option2": "Eve", "answer": n} for n in "12"],
    "arc_easy": [ARC, {**ARC, "answerKey": "B"}],
    "arc_challenge": [ARC, {**ARC, "answerKey": "B"}],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for task, rows in ROWS.items():
        split = short_context.TASKS[task].split
        if task in ("piqa", "swde"):
            write_jsonl(folder / f"short_context/{task}/{split}.jsonl", rows)
        else:
            write_parquet(folder / f"short_context/{task}/data/{split}-00000-of-00001.parquet", rows)
    return folder


@pytest.mark.slow
def test_as_the_harness_with_its_own_model(
    data: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [f"model={model_dir}", "tasks=short_context", f"data_dir={data}", f"out={tmp_path}/o"]
    assert main([*command, "batch_size=3"]) == 0
    assert "Wiki ppl" in capsys.readouterr().out
    results = {
        (row["task"], row["metric"]): row for row in json.loads((tmp_path / "o/results.json").read_text())["results"]
    }
    assert {task for task, _ in results} == set(ROWS)
    theirs = HFLM(pretrained=str(model_dir), batch_size=1, device="cpu", dtype="float32")
    settings = EvaluateSettings(model="m", out="o", tasks=["short_context"], data_dir=str(data))
    for task in ("wikitext", "lambada_openai", "fda", "hellaswag"):
        with short_context._local_files(settings, task):
            found = lm_eval.simple_evaluate(
                model=theirs, tasks=[task], task_manager=short_context._task_manager(), bootstrap_iters=0
            )
        for metric in short_context.TASKS[task].metrics:
            wanted = found["results"][task][f"{metric},none"]
            assert math.isclose(results[task, metric]["value"], wanted, rel_tol=1e-3), (task, metric)
            assert results[task, metric]["samples"] == 2

    stand_in(monkeypatch)  # the same tasks by vLLM, as if it were there
    few = [
        "tasks=wikitext,lambada_openai,fda,hellaswag",
        *(item for item in command if not item.startswith(("tasks", "out"))),
    ]
    assert main([*few, "engine=vllm", f"out={tmp_path}/v", "batch_size=3"]) == 0
    assert StandIn.started[0].tokens == short_context.ROOM
    for row in json.loads((tmp_path / "v/results.json").read_text())["results"]:
        assert math.isclose(results[row["task"], row["metric"]]["value"], row["value"], rel_tol=1e-3), row
    answers = [(tmp_path / f"{out}/samples/fda.jsonl").read_text() for out in "ov"]
    assert answers[0] == answers[1]

    def not_again(*_: Any, **__: Any) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(lm_eval, "simple_evaluate", not_again)
    assert main(command) == 0
    capsys.readouterr()
    assert main([*command, "limit=1"]) == 2
    assert "another limit" in capsys.readouterr().err
