"""The nine short-context tasks of the paper's Table E.1, asked by lm-evaluation-harness from local files."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import datasets

from refine_verl.config import DataError
from refine_verl.evaluate.model import EvaluatedModel
from refine_verl.evaluate.results import Results, Row
from refine_verl.evaluate.samples import Unit
from refine_verl.evaluate.served import ServedModel
from refine_verl.evaluate.settings import EvaluateSettings

FOLDER = "short_context"
ROOM = 32768
"""Tokens: more than any prompt of these tasks. A state has no length, so room for more takes no memory."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What the harness reads for a task, and which of its metrics the paper reports.

    Attributes:
        dataset: hub id.
        config: configuration of it; None for the only one.
        split: the split that is scored.
        metrics: name and how it is aggregated (`results.aggregate`).
    """

    dataset: str
    config: str | None
    split: str
    metrics: dict[str, str]


TASKS = {
    "wikitext": Task(
        "EleutherAI/wikitext_document_level",
        "wikitext-2-raw-v1",
        "test",
        {"word_perplexity": "weighted_perplexity"},
    ),
    "lambada_openai": Task("EleutherAI/lambada_openai", "default", "test", {"perplexity": "perplexity", "acc": "mean"}),
    "fda": Task("hazyresearch/based-fda", "default", "validation", {"contains": "mean"}),
    "swde": Task("hazyresearch/based-swde-v2", "default", "validation", {"contains": "mean"}),
    "piqa": Task("baber/piqa", None, "validation", {"acc": "mean"}),
    "hellaswag": Task("Rowan/hellaswag", None, "validation", {"acc_norm": "mean"}),
    "winogrande": Task("allenai/winogrande", "winogrande_xl", "validation", {"acc": "mean"}),
    "arc_easy": Task("allenai/ai2_arc", "ARC-Easy", "test", {"acc": "mean"}),
    "arc_challenge": Task("allenai/ai2_arc", "ARC-Challenge", "test", {"acc_norm": "mean"}),
}


def missing_files(settings: EvaluateSettings, tasks: Sequence[str]) -> list[str]:
    """For each task without files where they should be and how to get them.

    Raises:
        DataError: a task has files of two kinds.
    """
    return [_no_file(settings, task) for task in tasks if not _files(settings, task)]


def units(settings: EvaluateSettings, tasks: Sequence[str]) -> list[Unit]:
    """What the harness is asked to do with which files."""
    found = []
    for task in tasks:
        files = _files(settings, task)
        digest = hashlib.sha256(json.dumps([task, settings.limit]).encode())
        for path in files:
            digest.update(path.read_bytes())
        found.append(Unit("short_context", task, None, source=str(files[0].parent), asked=digest.hexdigest()))
    return found


def room(task: str, model: ServedModel) -> int:
    """Tokens that vLLM has to take for a task: those of a window, where texts are read in windows. How long other
    prompts are is known only when the harness asks them, so what costs nothing is given to them."""
    from refine_verl.evaluate.lm import RefineLM

    window = RefineLM(model).max_length + 2 if task == "wikitext" else 2  # a token before it, and one after
    return window if model.max_model_len is not None else max(window, ROOM)


def run(
    unit: Unit,
    settings: EvaluateSettings,
    model: EvaluatedModel | ServedModel,
    results: Results,
    done: dict[str, dict[str, Any]],
) -> list[Row]:
    """Ask one task; a task whose samples are all there already, in ``done``, is not asked again."""
    import lm_eval

    from refine_verl.evaluate.lm import RefineLM

    task = TASKS[unit.task]
    records = list(done.values())
    if not records:
        with _local_files(settings, unit.task):
            found = lm_eval.simple_evaluate(
                model=RefineLM(model, batch_size=settings.batch_size),
                tasks=[unit.task],
                task_manager=_task_manager(),
                limit=settings.limit,
                bootstrap_iters=0,
            )
        records = [
            {
                "id": str(sample["doc_id"]),
                "sample": unit.asked,
                "responses": sample["filtered_resps"],
                **{metric: sample[metric] for metric in task.metrics},
            }
            for sample in found["samples"][unit.task]
        ]
        results.save(unit.name, records, replace=True)
    return [unit.row(metric, kind, records, settings) for metric, kind in task.metrics.items()]


@functools.cache
def _task_manager() -> Any:
    """The harness's tasks; finding them takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _files(settings: EvaluateSettings, task: str) -> list[Path]:
    """Files of the split that is scored; none where there are none."""
    found = _folder(settings, task).glob(f"**/{TASKS[task].split}*")
    files = sorted(path for path in found if path.name.endswith((".parquet", ".jsonl")))
    if len({path.suffix for path in files}) > 1:
        raise DataError(
            f"short_context: parquet and jsonl files for {task}: {', '.join(map(str, files))}. Leave one kind there."
        )
    return files


def _no_file(settings: EvaluateSettings, task: str) -> str:
    known = TASKS[task]
    path = _folder(settings, task) / f"{known.split}.parquet"
    dataset = ", ".join(json.dumps(name) for name in (known.dataset, known.config) if name)
    script = (
        f"from datasets import load_dataset; load_dataset({dataset}, split={json.dumps(known.split)})"
        f".to_parquet({json.dumps(str(path))})"
    )
    return (
        f"short_context: no file for {task}: there is no {path} (or {known.split}*.jsonl). Where the hub can be "
        f"reached, make it with: python -c {shlex.quote(script)}"
    )


def _folder(settings: EvaluateSettings, task: str) -> Path:
    return Path(settings.data_dir).expanduser() / FOLDER / task


@contextmanager
def _local_files(settings: EvaluateSettings, task: str) -> Iterator[None]:
    """The harness reads a task's dataset from our files. Two of the tasks are classes that name their dataset in code,
    so what they call to load it is replaced, for this block."""
    files = [str(path) for path in _files(settings, task)]
    kind = "parquet" if files[0].endswith(".parquet") else "json"
    load = datasets.load_dataset

    def local(*_: Any, **__: Any) -> Any:
        scored = load(kind, data_files=files, split="train")
        # examples to learn from are looked up even where none are shown
        splits = dict.fromkeys(("train", "validation", "test"), scored.select([]))
        return datasets.DatasetDict({**splits, TASKS[task].split: scored})

    with mock.patch.object(datasets, "load_dataset", local):
        yield
