"""From settings to a directory of results: everything is found and checked, then the model is asked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from refine_verl.adaptation import AdaptSettings
from refine_verl.command.show import progress_bar
from refine_verl.config import DataError
from refine_verl.data.tokenize import tokenizer_fingerprint
from refine_verl.evaluate import needles, short_context
from refine_verl.evaluate.console import require_lm_eval
from refine_verl.evaluate.files import check_data_dir, find_documents, find_longbench, find_ruler_qa, refuse_missing
from refine_verl.evaluate.model import Answer, EvaluatedModel, find_model, load_evaluated, ttt_settings
from refine_verl.evaluate.results import Results, Row
from refine_verl.evaluate.samples import Sample, Unit, read_answers, read_documents
from refine_verl.evaluate.served import ServedModel
from refine_verl.evaluate.settings import EvaluateSettings
from refine_verl.evaluate.shared import batches
from refine_verl.evaluate.tables import Table, build_tables
from refine_verl.scoring import main_metric, score
from refine_verl.serving.engine import require_vllm


def evaluate(settings: EvaluateSettings) -> list[Table]:
    """Run all tasks, write their results, and return the tables.

    Raises:
        ConfigError, DataError, ModelError, PromptError: what cannot be used; nothing is written then.
    """
    ttt = ttt_settings(settings.ttt, settings.adapt)
    plan = _Plan(settings)
    units = plan.units()
    if settings.engine == "vllm":
        with _served(plan, settings) as served:
            return _evaluate(plan, units, settings, served)
    own = load_evaluated(plan.model, dtype=settings.dtype, device=settings.device, ttt=ttt)
    return _evaluate(plan, units, settings, own)


def _evaluate(
    plan: _Plan, units: list[Unit], settings: EvaluateSettings, model: EvaluatedModel | ServedModel
) -> list[Table]:
    words = json.dumps(tokenizer_fingerprint(model.tokenizer), sort_keys=True)
    identity = {
        "engine": settings.engine,
        "model": settings.model,
        **({} if settings.adapter is None else {"adapter": settings.adapter}),
        "model_sha256": model.fingerprint(),
        "tokenizer": settings.tokenizer or settings.model,
        "tokenizer_sha256": hashlib.sha256(words.encode()).hexdigest(),
        "dtype": model.dtype,
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
        "convention": settings.convention if settings.uses("convention") else None,
        "ttt": settings.ttt,
        "adapt": dataclasses.asdict(model.ttt) if settings.ttt != "none" else None,
    }
    results = Results(settings.out, identity)
    units = [*plan.needles(), *units]
    finished = _finished(units, results, model.ttt)
    if isinstance(model, ServedModel):
        _require_room(units, finished, model)
    rows = results.earlier(finished)
    label = settings.model if settings.adapter is None else f"{settings.model} with {settings.adapter}"
    label = label if settings.ttt == "none" else f"{label} + {settings.ttt} at test time"
    tables: list[Table] = []
    for unit in units:
        run = short_context.run if unit.group == "short_context" else _run
        rows += run(unit, settings, model, results, finished[unit.name])
        tables = build_tables(rows, label)
        results.write(rows, "\n".join(table.markdown() for table in tables))
    return tables


def _served(plan: _Plan, settings: EvaluateSettings) -> ServedModel:
    return ServedModel(
        plan.model,
        dtype=settings.dtype,
        batch_size=settings.batch_size,
        max_model_len=settings.max_model_len,
        memory=settings.gpu_memory_utilization,
        keep_states=settings.share_contexts,
    )


def _require_room(units: Sequence[Unit], finished: dict[str, dict[str, dict[str, Any]]], model: ServedModel) -> None:
    """Refuse what is longer than vLLM may be asked for, before the first sample is.

    Raises:
        DataError: names the sample.
    """
    for unit in units:
        for sample in unit.samples:
            if sample.id not in finished[unit.name]:
                # a document is scored, and vLLM writes one token after it
                model.require_room(f"{unit.name}, sample {sample.id},", len(sample.ids) + max(sample.limit, 1))
        if unit.group == "short_context" and not finished[unit.name]:
            model.require_room(unit.name, short_context.room(unit.task, model))


def _finished(units: Sequence[Unit], results: Results, ttt: AdaptSettings) -> dict[str, dict[str, dict[str, Any]]]:
    """The answered samples of each unit by id; what could only be refused later is refused here.

    Raises:
        ConfigError: an answer to what is no longer asked.
        DataError: a prompt too short to adapt to.
    """
    found = {}
    for unit in units:
        if unit.group == "short_context":
            found[unit.name] = results.whole(unit.name, unit.fingerprint)
        for sample in unit.samples:
            if len(sample.ids) < ttt.shortest_prompt:
                raise DataError(
                    f"{unit.name}: the prompt of sample {sample.id} has {len(sample.ids)} tokens, and ttt={ttt.method} "
                    f"needs at least {ttt.shortest_prompt} (adapt.nsp.chunks, adapt.nsp.rollout_length). Lower these, "
                    "or leave the task out."
                )
    for unit in units:
        if unit.group != "short_context":
            found[unit.name] = results.finished(unit.name, {sample.id: sample.digest for sample in unit.samples})
    return found


class _Plan:
    """Where everything is; made before weights are read.

    Raises:
        DataError, ModelError, ConfigError: something is missing.
    """

    def __init__(self, settings: EvaluateSettings) -> None:
        self.settings, self.groups = settings, settings.by_group()
        self.short = self.groups.get("short_context", [])
        if settings.engine == "vllm":
            require_vllm("engine")
        self.model = find_model(settings.model, settings.tokenizer, adapter=settings.adapter)
        self.tokenizer = self.model.tokenizer
        check_data_dir(settings, self.groups)
        missing = needles.missing_files(settings, self.groups.get("ruler_niah", []), self.tokenizer)
        self.files = {
            **find_ruler_qa(settings, self.groups.get("ruler_qa", []), self.model.info.model_type, missing),
            **find_longbench(settings, self.groups.get("longbench", []), missing),
        }
        missing += short_context.missing_files(settings, self.short)
        self.documents = find_documents(settings, missing) if "ntp" in self.groups else []
        refuse_missing(missing)
        if self.short:
            require_lm_eval()

    def units(self) -> list[Unit]:
        """All samples but the needles, read and checked."""
        answers = [read_answers(path, unit, self.settings, self.tokenizer) for unit, path in self.files.items()]
        short = short_context.units(self.settings, self.short)
        ntp = read_documents(self.documents, self.settings, self.tokenizer) if self.documents else ()
        return [*answers, *short, *ntp]

    def needles(self) -> list[Unit]:
        """The needles, made where they are not there yet: when all else is known to be in order."""
        return [
            read_answers(
                needles.frozen_needles(self.settings, task, length, self.tokenizer),
                Unit("ruler_niah", task, length),
                self.settings,
                self.tokenizer,
            )
            for task in self.groups.get("ruler_niah", [])
            for length in self.settings.lengths
        ]


def _run(
    unit: Unit,
    settings: EvaluateSettings,
    model: EvaluatedModel | ServedModel,
    results: Results,
    done: dict[str, dict[str, Any]],
) -> list[Row]:
    """Ask what is not answered yet, and sum up."""
    left = [sample for sample in unit.samples if sample.id not in done]
    ask = _score if unit.group == "ntp" else _ask
    with progress_bar(unit.name, len(unit.samples), done=len(done)) as step:
        for records in ask(unit, left, settings, model):
            results.save(unit.name, records)
            done.update({record["id"]: record for record in records})
            step(len(records))
    metrics = ("ntp_accuracy", "ntp_loss") if unit.group == "ntp" else (main_metric(unit.task, settings.convention),)
    records = [done[sample.id] for sample in unit.samples]
    results.save(unit.name, records, replace=True)  # in the order of the data
    return [unit.row(metric, "mean", records, settings) for metric in metrics]


def _score(
    unit: Unit, samples: Sequence[Sample], settings: EvaluateSettings, model: EvaluatedModel | ServedModel
) -> Iterator[list[dict[str, Any]]]:
    """Records of documents, as many as are read together at a time."""
    for batch in batches([sample.ids for sample in samples], settings.batch_size, share=False):
        chosen = [samples[row] for row in batch.rows]
        rows = [sample.ids.tolist() for sample in chosen]
        found = model.likelihoods([(row[:1], row[1:]) for row in rows])
        yield [
            {
                "id": sample.id,
                "sample": sample.digest,
                "tokens": one.tokens,
                "ntp_loss": -one.log_prob / one.tokens,
                "ntp_accuracy": one.correct / one.tokens,
            }
            for sample, one in zip(chosen, found, strict=True)
        ]


def _ask(
    unit: Unit, samples: Sequence[Sample], settings: EvaluateSettings, model: EvaluatedModel | ServedModel
) -> Iterator[list[dict[str, Any]]]:
    """Records of prompts, as they are answered."""
    prompts, limits = [sample.ids for sample in samples], [sample.limit for sample in samples]
    share = settings.shares(unit.group)
    for answers in model.answers(prompts, limits, size=settings.batch_size, share=share) if samples else ():
        yield [_record(unit, samples[answer.row], answer, settings.convention) for answer in answers]


def _record(unit: Unit, sample: Sample, answer: Answer, convention: str) -> dict[str, Any]:
    scores = score(unit.task, answer.text, sample.references, convention, classes=sample.classes)
    return {
        "id": sample.id,
        "sample": sample.digest,
        "prompt_tokens": len(sample.ids),
        "read_tokens": answer.read,
        "prediction": answer.text,
        "references": list(sample.references),
        **scores,
    }
