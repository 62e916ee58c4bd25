"""`memory = refine_verl.remember(model, documents)`: what a model knows of documents, without the documents."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from refine_verl.adaptation import Adapted, AdaptSettings, adapt
from refine_verl.adaptation.checks import check_model
from refine_verl.adaptation.guard import TemporaryActor, set_training
from refine_verl.adaptation.prompts import PromptError
from refine_verl.config import ConfigError, DataError
from refine_verl.models import Documents, FastWeightActor, FastWeightState
from refine_verl.models.answers import Answers, answer_draws, end_tokens_of
from refine_verl.record.format import size_text
from refine_verl.remember.files import Document, Stored, find, refuse_others, write
from refine_verl.remember.given import chosen, names_of, numbers_of, rows_of
from refine_verl.remember.identity import Identity, Watch

SEGMENT = 2048
"""Tokens of a document in one pass where nothing else is asked for."""

Progress = Callable[[int], object]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model wrote after a document and a question.

    Attributes:
        document, question: their numbers.
        tokens: int64 [L] on the model's device, the stop token included.
        log_probs: float32 [L] (float64 of a float64 model), of these tokens.
        text: the same without special tokens; None without a tokenizer.
    """

    document: int
    question: int
    tokens: Tensor
    log_probs: Tensor
    text: str | None


def remember(
    model: nn.Module,
    documents: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    names: Sequence[str] | None = None,
    segment: int = SEGMENT,
    batch_size: int = 1,
    most_bytes: int | None = None,
    progress: Progress = lambda tokens: None,
) -> Memory:
    """Read documents once each, and keep their states and nothing else.

    Args:
        model: as in `refine_verl.adapt`. It is not changed.
        documents: token ids as in `refine_verl.adapt`; with a tokenizer texts, or one text. What the tokenizer puts in
            front of a text is read, what it would put behind it is not.
        tokenizer: turns texts into tokens and back.
        names: of the documents; None numbers them.
        segment: tokens of a document in one pass; how many there are in memory at a time, whatever its length.
        batch_size: documents read together.
        most_bytes: that keys and values of attention layers may take; None: what is free on the model's device.
        progress: told after each pass how many tokens it read.

    Raises:
        ModelError: a model that cannot be asked here.
        PromptError: no documents, an empty one, a token id out of range, text without a tokenizer.
        ConfigError: an argument that cannot be used.
        DataError: keys and values of a hybrid would not fit. All before anything is read.
    """
    memory = memory_of(model, tokenizer, segment=segment, batch_size=batch_size)
    memory.add(documents, names=names, most_bytes=most_bytes, progress=progress)
    return memory


def memory_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, **how: Any) -> Memory:
    """A memory without documents.

    Raises:
        ModelError, ConfigError: see `remember`.
    """
    check_model(model, trains=False, caller="refine_verl.remember")
    return Memory(Watch(model, Identity.of(model, tokenizer)), tokenizer, **how)


def load(
    directory: str | Path,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    only: Sequence[int] | None = None,
    segment: int = SEGMENT,
    batch_size: int = 1,
) -> Memory:
    """What `Memory.save` wrote, bit for bit.

    Args:
        directory: as given to `Memory.save`, or `out=` of `python -m refine_verl.remember read`.
        model: the one that read the documents, with the weights and the dtype it had then.
        tokenizer: the one of the documents; None where token ids are given.
        only: numbers of the documents that are wanted; None: all of them.
        segment, batch_size: of what is appended, see `remember`.

    Raises:
        ConfigError: a number in ``only`` that no document has, or another argument that cannot be used.
        ModelError, DataError: another model, other weights, another dtype or tokenizer; a file that is missing, cut off
            or altered.
    """
    check_model(model, trains=False, caller="refine_verl.remember")
    stored = find(Path(directory).expanduser(), "directory")
    identity = Identity.of(model, tokenizer)
    refuse_others(stored, identity)
    kept = next((each.identity for each in stored if each.identity.tokenizer is not None), identity)
    memory = Memory(Watch(model, kept), tokenizer, segment=segment, batch_size=batch_size)
    memory._take(stored if only is None else [stored[number] for number in chosen(only, len(stored))])
    return memory


class Memory:
    """Documents as states of one model, which has to have the weights that it read them with.

    `memory[i]` is a memory of that document alone: appending to one changes nothing in the other.

    Attributes:
        model, tokenizer: see `remember`.
        documents: what is known of each.
        forward_tokens: tokens that went through the model for this memory so far, documents and questions and answers.
    """

    def __init__(
        self, watch: Watch, tokenizer: PreTrainedTokenizerBase | None, *, segment: int = SEGMENT, batch_size: int = 1
    ) -> None:
        for name, value in (("segment", segment), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigError(name, f"must be at least 1, got {value}.")
        self.model: Any = watch.model
        self.tokenizer = tokenizer
        self.documents: tuple[Document, ...] = ()
        self.forward_tokens = 0
        self._states: tuple[FastWeightState, ...] = ()
        self._watch, self._segment, self._batch_size = watch, segment, batch_size

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int | slice) -> Memory:
        """A fork: the documents at ``index``, whose states are shared until one of them is appended to."""
        chosen = index if isinstance(index, slice) else slice(index, index + 1 or None)
        if not isinstance(index, slice) and not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        fork = Memory(self._watch, self.tokenizer, segment=self._segment, batch_size=self._batch_size)
        fork.documents, fork._states = self.documents[chosen], self._states[chosen]
        return fork

    @property
    def num_bytes(self) -> int:
        """Size of all states, keys and values of attention layers included."""
        return sum(state.num_bytes for state in self._states)

    @property
    def identity(self) -> Identity:
        """Of the model that the states are of."""
        return self._watch.identity

    @property
    def states(self) -> tuple[FastWeightState, ...]:
        """Of each document, one row."""
        return self._states

    def add(
        self,
        documents: Any,
        *,
        names: Sequence[str] | None = None,
        most_bytes: int | None = None,
        progress: Progress = lambda tokens: None,
    ) -> None:
        """Read more documents; the arguments are those of `remember`.

        Raises:
            PromptError, ConfigError, DataError, ModelError: see `remember`.
        """
        self._check()
        rows = rows_of(self.model, documents, self.tokenizer, "documents", begins=True)
        labels = names_of(names, len(rows), there=[each.name for each in self.documents])
        new = [Document(name=name, parts=()).longer(row) for name, row in zip(labels, rows, strict=True)]
        self.refuse_too_long([len(row) for row in rows], most_bytes)
        self._states += self._read(rows, None, progress)
        self.documents += tuple(new)

    def append(self, texts: Any, *, most_bytes: int | None = None, progress: Progress = lambda tokens: None) -> None:
        """Read on, from the states on: as if the documents had gone on with these texts.

        Args:
            texts: one for all documents, or a list with one for each; texts with a tokenizer, else token ids.
            most_bytes, progress: see `remember`.

        Raises:
            PromptError, ModelError, DataError: as in `remember`.
        """
        self._check()
        rows = self._one_for_each(texts, "append")
        lengths = [document.positions + len(row) for document, row in zip(self.documents, rows, strict=True)]
        self.refuse_too_long(lengths, most_bytes)
        self._states = self._read(rows, self._states, progress)
        self.documents = tuple(each.longer(row) for each, row in zip(self.documents, rows, strict=True))

    def ask(
        self,
        questions: Any,
        *,
        max_new_tokens: int | Sequence[int],
        of: int | Sequence[int] | None = None,
        temperature: float = 0.0,
        stop_tokens: Sequence[int] | None = None,
        seed: int = 0,
        batch_size: int = 8,
    ) -> list[Answer]:
        """Answer questions about the documents, without reading these again.

        Args:
            questions: texts with a tokenizer, else token ids; no special tokens are put around them.
            max_new_tokens: for all questions, or one number for each.
            of: for each question the number of its document, or one for all; None asks every question of every
                document.
            temperature: 0 takes the most likely token.
            stop_tokens: ids that end an answer; None takes those of the model and the tokenizer.
            seed: of sampled tokens; draws depend on it, the document and the question only.
            batch_size: pairs of document and question that are read and answered together.

        Returns:
            An answer to each pair: document by document, or in the order of the questions with ``of``.

        Raises:
            PromptError: questions, numbers or limits that cannot be used.
            ModelError: the model's weights have changed since it read the documents.
        """
        self._check()
        asked = rows_of(self.model, questions, self.tokenizer, "questions", begins=False)
        limits = numbers_of(max_new_tokens, len(asked), "max_new_tokens", least=1)
        if temperature < 0:
            raise PromptError(f"temperature must be 0 (greedy) or greater, got {temperature}.")
        if batch_size < 1:
            raise PromptError(f"batch_size must be at least 1, got {batch_size}.")
        pairs = self._pairs(len(asked), of)
        own = (self.tokenizer.eos_token_id,) if self.tokenizer is not None else ()
        stops = [int(x) for x in (end_tokens_of(self.model, *own) if stop_tokens is None else stop_tokens)]
        answers: list[Answer] = []
        how: dict[str, Any] = {"temperature": temperature, "stop_tokens": stops}
        with self._active(seed) as actor:
            for start in range(0, len(pairs), batch_size):
                part = pairs[start : start + batch_size]
                mine = [limits[question] for _, question in part]
                draws = self._draws(part, asked, seed, max(mine)) if temperature > 0 else None
                answers += self._answered(actor, part, asked, mine, draws=draws, **how)
        return answers

    def adapt(
        self, texts: Any, config: AdaptSettings | Mapping[str, Any] | None = None
    ) -> AbstractContextManager[Adapted]:
        """Test-time training on what follows the documents, which are not read again: `refine_verl.adapt` from states.

        Inside the block ``adapted.generate(...)`` answers the texts, each from its document's state on. The states are
        those of the weights before: nothing can be read or asked of this memory until the block has ended.

        Args:
            texts: one for all documents, or a list with one for each; texts with a tokenizer, else token ids.
            config: as in `refine_verl.adapt`.

        Raises:
            PromptError, ConfigError, ModelError: see `refine_verl.adapt`; the model's weights have changed since it
                read the documents.
        """
        self._check()
        rows = self._one_for_each(texts, "texts")
        return adapt(self.model, list(rows), config, states=self._states)

    def _one_for_each(self, texts: Any, what: str) -> tuple[Tensor, ...]:
        """Token ids of what follows each document.

        Raises:
            PromptError: there are others than one, or one for each; or no documents.
        """
        if not len(self):
            raise PromptError(f"{what}: this memory holds no documents. Add some first (memory.add).")
        rows = rows_of(self.model, texts, self.tokenizer, what, begins=False)
        if len(rows) not in (1, len(self)):
            raise PromptError(f"{what}: {len(rows)} texts for {len(self)} documents. Give one, or one for each.")
        return rows * (len(self) // len(rows))

    def save(self, directory: str | Path) -> None:
        """Write the states and what they are to a new directory, all of it or nothing.

        Raises:
            ConfigError: there is something at ``directory`` already.
            DataError: states that cannot be saved, or none.
            OSError: it cannot be written.
        """
        if not len(self):
            raise DataError("save: this memory holds no documents, so there is nothing to save.")
        path = Path(directory).expanduser()
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise ConfigError("directory", f"{path} is there already. Give a new or empty one.")
        self._watch.check()
        path.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            for number, (document, state) in enumerate(zip(self.documents, self._states, strict=True)):
                write(building, number, document, state, self._watch.identity)
            building.chmod(0o755)
            os.replace(building, path)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise

    def _check(self) -> None:
        """That the model is the one of the states, which come along to its device.

        Raises:
            ModelError: its weights have changed.
        """
        self._watch.check()
        device = next(self.model.parameters()).device
        self._states = tuple(state.to(device) for state in self._states)

    @contextmanager
    def _active(self, seed: int = 0) -> Iterator[FastWeightActor]:
        with TemporaryActor(self.model, activation_checkpointing="none").active(seed) as actor:
            set_training(actor, False)
            try:
                yield actor
            finally:
                self.forward_tokens += actor.forward_tokens

    def _read(
        self, rows: Sequence[Tensor], states: Sequence[FastWeightState] | None, progress: Progress
    ) -> tuple[FastWeightState, ...]:
        made: list[FastWeightState] = []
        with self._active() as actor:
            for start in range(0, len(rows), self._batch_size):
                part = slice(start, start + self._batch_size)
                made += FastWeightActor.forward(
                    actor,
                    mode="read_on",
                    rows=rows[part],
                    states=None if states is None else states[part],
                    segment=self._segment,
                    progress=progress,
                )
        return tuple(made)

    def _take(self, stored: Sequence[Stored]) -> None:
        device = next(self.model.parameters()).device
        self._states = tuple(each.state(device) for each in stored)
        self.documents = tuple(each.document for each in stored)

    def refuse_too_long(self, lengths: Sequence[int], most_bytes: int | None = None) -> None:
        """Whether keys and values of documents of so many tokens fit; they are there twice while they are put together.

        Raises:
            DataError: they do not.
        """
        with self._active() as actor:
            each = FastWeightActor.forward(actor, mode="bytes_per_token")
        needed = each * (sum(lengths) + sum(sorted(lengths)[-self._batch_size :]))
        free = _free(next(self.model.parameters()).device) if most_bytes is None else most_bytes
        if needed > free:
            raise DataError(
                f"documents: the attention layers of this model keep {size_text(each)} of keys and values for every "
                f"token, {size_text(needed)} for {sum(lengths)} tokens while they are read, and {size_text(free)} are "
                "free. Give shorter or fewer documents, or a model without attention layers."
            )

    def _pairs(self, questions: int, of: int | Sequence[int] | None) -> list[tuple[int, int]]:
        if of is None:
            return [(document, question) for document in range(len(self)) for question in range(questions)]
        numbers = numbers_of(of, questions, "of", least=0)
        wrong = [number for number in numbers if number >= len(self)]
        if wrong:
            raise PromptError(f"of: there is no document {wrong[0]}; there are {len(self)}, from 0 on.")
        return list(zip(numbers, range(questions), strict=True))

    def _draws(self, pairs: Sequence[tuple[int, int]], asked: Sequence[Tensor], seed: int, length: int) -> Tensor:
        """Uniforms [pairs, 1, length]."""
        keys = []
        for document, question in pairs:
            about = repr(self.documents[document].parts).encode() + asked[question].numpy().tobytes()
            keys.append(int.from_bytes(hashlib.blake2b(about, digest_size=8).digest(), "little") >> 1)
        return answer_draws(seed, 0, keys, 1, length)

    def _answered(
        self,
        actor: FastWeightActor,
        pairs: Sequence[tuple[int, int]],
        asked: Sequence[Tensor],
        limits: Sequence[int],
        **how: Any,
    ) -> Iterator[Answer]:
        """Read some questions, each from its document's state, and write."""
        used = sorted({document for document, _ in pairs})
        rows = [asked[question] for _, question in pairs]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        answers: Answers = FastWeightActor.forward(
            actor,
            mode="generate",
            prompts=Documents.from_tensors(
                padded.to(next(actor.parameters()).device),
                [len(row) for row in rows],
                before=FastWeightState.gather([self._states[d] for d in used], [(used.index(d), 0) for d, _ in pairs]),
            ),
            limits=limits,
            length=max(limits),
            **how,
        )
        lengths = answers.lengths[:, 0].tolist()
        for row, ((document, question), count) in enumerate(zip(pairs, lengths, strict=True)):
            tokens, log_probs = answers.tokens[row, 0, :count].clone(), answers.log_probs[row, 0, :count].clone()
            text = None
            if self.tokenizer is not None:
                text = str(self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True))
            yield Answer(document=document, question=question, tokens=tokens, log_probs=log_probs, text=text)


def _free(device: torch.device) -> int:
    """Bytes free on a device."""
    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)
