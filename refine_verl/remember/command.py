"""What the three commands do."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from refine_verl.command.front import show
from refine_verl.command.show import progress_bar, show_table
from refine_verl.config import ConfigError, DataError, did_you_mean
from refine_verl.config.refusals import with_article
from refine_verl.data.prompts_tokenize import encode_prompts
from refine_verl.data.sources import iterate_documents, resolve_sources
from refine_verl.data.tokenizers import open_model_tokenizer
from refine_verl.models import load_model, open_model
from refine_verl.models.loading import device_of, dtype_of, import_external
from refine_verl.models.lora import apply_adapter, open_adapter
from refine_verl.record.files import AlreadyLockedError, locked
from refine_verl.record.format import size_text
from refine_verl.remember.files import Document, Stored, find, is_ours, refuse_others, write
from refine_verl.remember.memory import Memory, load, memory_of
from refine_verl.remember.settings import AskSettings, ListSettings, ReadSettings


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A document that is to be read: its name and token ids, int64 [T]."""

    name: str
    ids: torch.Tensor


def read(settings: ReadSettings) -> None:
    """Read the documents that are not in the directory yet, and save each batch when it is finished.

    Raises:
        ConfigError, DataError, ModelError, PromptError: what cannot be used; nothing has been read then.
    """
    out, tokenizer = Path(settings.out).expanduser(), _tokenizer(settings)
    stored, found = _stored(out), _documents(settings, tokenizer)
    waiting = _missing(found, stored)
    device = device_of(settings.device)
    model = _model(settings, dtype_of(settings.dtype, device), device)
    nothing = memory_of(model, tokenizer, segment=settings.segment, batch_size=settings.batch_size)
    refuse_others(stored, nothing.identity)
    for start in range(0, len(waiting), settings.batch_size):  # all of it, before the first one is read
        nothing.refuse_too_long([len(each.ids) for each in waiting[start : start + settings.batch_size]])
    if waiting:
        try:
            out.mkdir(parents=True, exist_ok=True)
            with locked(out / ".lock"):
                # another process may have filled it while the model was loaded
                stored = _stored(out)
                refuse_others(stored, nothing.identity)
                waiting = _missing(found, stored)
                _read(out, waiting, nothing, settings.batch_size, _next(stored))
        except AlreadyLockedError as error:
            raise DataError(f"out: {out} is being filled by another process. Wait for it.") from error
    show(f"{out}: {len(waiting)} documents read, {len(stored)} were there")


def _read(out: Path, waiting: Sequence[Waiting], nothing: Memory, together: int, number: int) -> None:
    with progress_bar("tokens", sum(len(each.ids) for each in waiting)) as advance:
        for start in range(0, len(waiting), together):
            part, memory = waiting[start : start + together], nothing[:0]
            memory.add([each.ids for each in part], names=[each.name for each in part], progress=advance)
            for document, state in zip(memory.documents, memory.states, strict=True):
                write(out, number, document, state, memory.identity)
                number += 1


def ask(settings: AskSettings) -> None:
    """Answer the questions.

    Raises:
        ConfigError, DataError, ModelError, PromptError: what cannot be used; the model has not been asked then.
    """
    questions = [settings.question] if settings.question is not None else _lines(str(settings.questions))
    directory = Path(settings.memory).expanduser()
    stored = find(directory)
    chosen = [
        number for number, each in enumerate(stored) if settings.document is None or _same(settings.document, each)
    ]
    if not chosen:
        names = [each.document.name for each in stored]
        near = did_you_mean(str(settings.document), names)
        raise ConfigError("document", f"{settings.document} is none of the {len(names)} that were read.{near}")
    tokenizer, device = _tokenizer(settings), device_of(settings.device)
    kind = getattr(torch, stored[0].identity.dtype)
    model = _model(settings, kind, device)
    memory = load(directory, model, tokenizer, only=chosen)
    answers = memory.ask(
        questions,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=settings.seed,
        batch_size=settings.batch_size,
    )
    found = [
        {"document": memory.documents[x.document].name, "question": questions[x.question], "answer": x.text}
        for x in answers
    ]
    if settings.json:
        show(json.dumps({"forward_tokens": memory.forward_tokens, "answers": found}, indent=2, ensure_ascii=False))
        return
    for each in found:
        show(f"{each['document']}\n  {each['question']}\n  {each['answer']}")


def list_documents(settings: ListSettings) -> None:
    """Show what was read.

    Raises:
        DataError: no documents, or files that cannot be used.
    """
    stored = find(Path(settings.memory).expanduser())
    identity, total = stored[0].identity, sum(each.num_bytes for each in stored)
    if settings.json:
        rows = [
            {"document": each.document.name, "tokens": each.document.positions, "bytes": each.num_bytes}
            for each in stored
        ]
        about = {"model_type": identity.model_type, "dtype": identity.dtype, "weights_sha256": identity.weights}
        show(json.dumps({"model": about, "documents": rows}, indent=2, ensure_ascii=False))
        return
    lines = [(each.document.name, each.document.positions, size_text(each.num_bytes)) for each in stored]
    note = f"{len(stored)} documents, {size_text(total)}; of {with_article(identity.model_type)} in {identity.dtype}"
    show_table(str(settings.memory), ("document", "tokens", "state"), lines, [note])


def _tokenizer(settings: ReadSettings | AskSettings) -> PreTrainedTokenizerBase:
    """Of the model, which is checked, too; no weights are read."""
    transformers_logging.disable_progress_bar()
    if settings.external_lib is not None:
        import_external(settings.external_lib)
    info = open_model(settings.model, key="model")
    return open_model_tokenizer(settings.tokenizer, settings.model, info.vocab_size, keys=("tokenizer", "model"))


def _model(settings: ReadSettings | AskSettings, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """With its adapter, if there is one."""
    adapter = None if settings.adapter is None else open_adapter(settings.adapter)
    model = load_model(settings.model, dtype=dtype, key="model")
    if adapter is not None:
        apply_adapter(model, adapter)
    return model.to(device).eval()


def _stored(out: Path) -> list[Stored]:
    """What is in the directory that is to be filled.

    Raises:
        DataError: it is none, or holds other things.
    """
    if not out.exists():
        return []
    if not out.is_dir():
        raise DataError(f"out: {out} is no directory.")
    # a state without its JSON file is what a process that was killed left; it is replaced
    others = [path.name for path in out.iterdir() if path.name[0] != "." and not is_ours(path)]
    if others:
        raise DataError(f"out: {out} holds other files ({others[0]}). Give a new or empty directory.")
    return find(out, "out") if any(path.suffix == ".json" and is_ours(path) for path in out.iterdir()) else []


def _next(stored: Sequence[Stored]) -> int:
    return max((int(each.path.stem) + 1 for each in stored), default=0)


def _documents(settings: ReadSettings, tokenizer: PreTrainedTokenizerBase) -> list[Waiting]:
    """The documents of the files.

    Raises:
        DataError: files that cannot be read, an empty document.
    """
    sources = resolve_sources(settings.files, key="data.train_files", default_split="train")
    found = []
    for document in iterate_documents(sources, settings.text_key):
        ids = torch.from_numpy(encode_prompts(tokenizer, [document["text"]], special_tokens=True)[0][0]).to(torch.int64)
        found.append(Waiting(f"{document['source']}:{document['row']}", ids))
    return found


def _missing(documents: Sequence[Waiting], stored: Sequence[Stored]) -> list[Waiting]:
    """Those that are not stored, under this or another name of the same file.

    Raises:
        DataError: one has changed since it was stored.
    """
    there: dict[tuple[str, str], list[Stored]] = {}
    for each in stored:
        there.setdefault(_place(each.document.name), []).append(each)
    waiting = []
    for document in documents:
        known = there.get(_place(document.name))
        if known is None:
            waiting.append(document)
            continue
        parts = Document(name=document.name, parts=()).longer(document.ids).parts
        if all(each.document.parts != parts for each in known):
            raise DataError(
                f"files: {document.name} has other tokens than when it was read (its text or the tokenizer has "
                f"changed). Remove {known[0].path} and its .safetensors, or give another out."
            )
    return waiting


def _place(name: str) -> tuple[str, str]:
    """The same for all spellings of a document's name: the file's real path, and the row."""
    source, _, row = name.rpartition(":")
    return os.path.realpath(source), row


def _same(name: str, stored: Stored) -> bool:
    return name == stored.document.name or _place(name) == _place(stored.document.name)


def _lines(name: str) -> list[str]:
    try:
        lines = Path(name).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("questions", f"{name} cannot be read: {error}.") from error
    if not any(line.strip() for line in lines):
        raise ConfigError("questions", f"{name} is empty.")
    return [line for line in lines if line.strip()]


RUN: dict[str, Callable[[Any], None]] = {"read": read, "ask": ask, "list": list_documents}
