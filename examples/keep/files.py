"""The arms on a model and a file of prompts with answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.keep.arms import LABELS, TRAINED, Outcome, answer_all
from examples.keep.records import means, record_of
from examples.keep.rows import Asked, read_documents
from examples.keep.settings import FileSettings
from examples.keep.tables import costs, figure
from examples.miniature.pieces import Pieces, Record, write_json
from examples.miniature.results import table
from examples.miniature.statistics import paired
from refine_verl.adaptation import AdaptSettings
from refine_verl.command.show import progress_bar
from refine_verl.config import ConfigError, DataError
from refine_verl.evaluate.model import EvaluatedModel, find_model, load_evaluated, ttt_settings
from refine_verl.models.loading import import_external
from refine_verl.models.lora import target_names
from refine_verl.record.files import write_atomically
from refine_verl.scoring import main_metric, score

ADAPTERS: dict[str, Any] = {"lora_rank": 16, "lr": 1e-3, "steps": 4}
"""Of their training where nothing else is asked for; for no model known to be the best."""
OF_REINFORCEMENT = ("nsp", "on_policy", "clip_ratio", "norm_adv_by_std_in_grpo")
"""Keys of ``adapt`` that are for REFINE alone."""


def run(settings: FileSettings) -> str:
    """Answer all questions of all documents in all ways, write results, and return the table.

    Raises:
        ConfigError, DataError, ModelError, PromptError: what cannot be used; nothing is written then.
    """
    if settings.external_lib is not None:
        import_external(settings.external_lib)
    training = {method: adapters(method, settings.adapt) for method in TRAINED}
    found = find_model(settings.model, settings.tokenizer)
    documents = read_documents(settings)
    model = load_evaluated(found, dtype=settings.dtype, device=settings.device)
    for each in training.values():
        target_names(model.actor, each.lora, AdaptSettings.SECTION)
    refuse_short(documents, model, training, settings.passage)
    out = Path(settings.out).expanduser()
    pieces, records = Pieces(out / "documents", tell=False), []
    identity = (model.fingerprint(), model.dtype, settings.segment, settings.batch_size, settings.passage)
    with progress_bar("documents", len(documents)) as step:
        for number, asked in enumerate(documents):
            key = (identity, training, settings.convention, asked)
            record = pieces.get(f"{number:05d}", key, lambda: _answered(asked, model, training, settings))  # noqa: B023
            records.append(record)
            step(1)
    results = {
        "settings": dataclasses.asdict(settings),
        "adapters": {method: dataclasses.asdict(each) for method, each in training.items()},
        "model": {"sha256": model.fingerprint(), "dtype": model.dtype, "device": str(model.device)},
        "documents": records,
    }
    write_json(out / "results.json", results)
    text = shown(results)
    write_atomically(out / "results.md", text)
    return text


def adapters(method: str, given: dict[str, Any] | str | None) -> AdaptSettings:
    """Settings of one way of training.

    Raises:
        ConfigError: what cannot be used, or no adapters (``lora_rank=0``).
    """
    chosen: Any = given
    if not isinstance(given, str):
        own = {name: value for name, value in (given or {}).items() if method != "sft" or name not in OF_REINFORCEMENT}
        chosen = {**ADAPTERS, **own}
    settings = ttt_settings(method, chosen)
    if not settings.lora_rank:
        raise ConfigError("adapt.lora_rank", "is 0, and a document is kept in an adapter. Set a rank.")
    return settings


def refuse_short(
    documents: Sequence[Asked], model: EvaluatedModel, training: dict[str, AdaptSettings], passage: int | None
) -> None:
    """Refuse documents that no adapter can be trained on, before the first is read.

    Raises:
        DataError: names the row.
    """
    least = max(each.shortest_prompt for each in training.values())
    for asked in documents:
        shortest = min(map(len, asked.case(model.tokenizer, passage).passages))
        if shortest < least:
            raise DataError(
                f"{asked.where}: its document (or a passage of it) has {shortest} tokens, and REFINE needs {least} "
                "(nsp.chunks + nsp.rollout_length). Lower adapt.nsp.chunks, or raise passage."
            )


def _answered(
    asked: Asked, model: EvaluatedModel, training: dict[str, AdaptSettings], settings: FileSettings
) -> Record:
    case = asked.case(model.tokenizer, settings.passage)
    outcomes = answer_all(
        model.actor,
        case,
        training,
        stop_tokens=tuple(model.stop_tokens),
        batch_size=settings.batch_size,
        segment=settings.segment,
    )
    return {
        "document": asked.where,
        "tokens": len(case.document),
        "questions": [row.id for row in asked.rows],
        "arms": {arm: _scored(asked, each, model, settings.convention) for arm, each in outcomes.items()},
    }


def _scored(asked: Asked, outcome: Outcome, model: EvaluatedModel, convention: str) -> Record:
    texts = [model.decode(answer.tolist()) for answer in outcome.answers]
    scores = [
        score(row.task, text, row.answers, convention, classes=row.classes)[main_metric(row.task, convention)]
        for row, text in zip(asked.rows, texts, strict=True)
    ]
    return {**record_of(outcome, len(texts), sum(scores) / len(scores)), "answers": texts}


def shown(results: dict[str, Any]) -> str:
    """A page with the table: means over documents, each of which counts the same."""
    records, settings = results["documents"], results["settings"]
    plain = [
        {arm: {name: value for name, value in of.items() if name != "answers"} for arm, of in record["arms"].items()}
        for record in records
    ]
    mean, rows = means(plain), []
    for arm, label in LABELS.items():
        scores, reading = (
            {str(number): record[name]["score"] for number, record in enumerate(plain)} for name in (arm, "reading")
        )
        gain = "" if arm == "reading" else figure(paired(scores, reading), signed=True)
        rows.append([label, f"{mean[arm]['score']:.3f}", gain, *costs(mean[arm])])
    questions = sum(len(record["questions"]) for record in records)
    tokens = sum(record["tokens"] for record in records) / len(records)
    header = ["", "score", "minus reading", *costs(None)]
    about = (
        f"{settings['model']} on {', '.join(settings['data'])}: {len(records)} documents of {tokens:,.0f} tokens on "
        f"average, {questions} questions; {results['model']['dtype']} on {results['model']['device']}; scores in the "
        f"convention {settings['convention']}. Means over documents; behind ± half of a 95% interval over them."
    )
    return f"# What is kept of a document\n\n{about}\n\n{table(header, rows)}\n"
