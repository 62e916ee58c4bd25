"""Prompts as users give them, checked row by row."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refine_verl.config import Refusal
from refine_verl.models import Documents, FastWeightState


class PromptError(Refusal):
    """Prompts that cannot be used: which row, what is wrong with it and what would work."""


@dataclass(frozen=True)
class Prompts:
    """Token ids of one or more prompts.

    Attributes:
        rows: int64 [T_b] for each prompt, on the CPU.
        ids: a number in 0 ... 2**63-1 per prompt that depends on its tokens only (and, for equal prompts, on how
            many came before): random draws that are keyed by it do not depend on the company a prompt keeps.
        states: what was read before each of them, a row each; None: they are the beginning.
    """

    rows: tuple[Tensor, ...]
    ids: tuple[int, ...]
    states: tuple[FastWeightState, ...] | None = None

    @classmethod
    def read(cls, input_ids: Any, *, vocabulary: int, shortest: int, needs: str) -> Prompts:
        """Check and copy what a user gave.

        Args:
            input_ids: int [T] or [B, T] (every row is read to its end, so no padding), or a sequence of rows of
                unequal length, each a tensor, an array or a list.
            vocabulary: ids must be smaller.
            shortest: fewest tokens of a row.
            needs: why, for the message.

        Raises:
            PromptError: none or an empty row, a wrong type or shape, an id out of range, a row too short.
        """
        rows = tuple(_row(row, index) for index, row in enumerate(_split(input_ids)))
        if not rows:
            raise PromptError("input_ids: no prompts (an empty batch). Give at least one row of token ids.")
        for index, row in enumerate(rows):
            wrong = ((row < 0) | (row >= vocabulary)).nonzero()
            if len(wrong):
                place = int(wrong[0])
                raise PromptError(
                    f"input_ids: row {index}, position {place}: token id {int(row[place])} is outside 0 ... "
                    f"{vocabulary - 1}, the vocabulary of the model. Is this the model's own tokenizer, and are the "
                    "rows without padding and label masks?"
                )
            if len(row) < shortest:
                raise PromptError(f"input_ids: row {index} has {len(row)} tokens, fewer than {shortest}: {needs}")
        return cls(rows, _content_ids(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def documents(self, indices: Sequence[int], device: torch.device) -> Documents:
        """The rows at ``indices`` as a micro-batch."""
        rows = [self.rows[index] for index in indices]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        before = None
        if self.states is not None:
            before = FastWeightState.stack([self.states[index] for index in indices])
        return Documents.from_tensors(padded.to(device), [len(row) for row in rows], before=before)

    def behind(self, states: FastWeightState | Sequence[FastWeightState]) -> Prompts:
        """These prompts, each read from a state on.

        Raises:
            PromptError: no states, or not one row for all prompts, or one for each.
        """
        states = [states] if isinstance(states, FastWeightState) else states
        if not isinstance(states, Sequence) or not all(isinstance(state, FastWeightState) for state in states):
            kinds = (
                {type(each).__name__ for each in states}
                if isinstance(states, (list, tuple))
                else {type(states).__name__}
            )
            raise PromptError(
                f"states: expected a FastWeightState, or a list of them, got {', '.join(sorted(kinds))}. Of what "
                "refine_verl.remember has read give memory.states."
            )
        rows = [row for state in states for row in state.split([1] * state.rows)]
        if len(rows) not in (1, len(self)):
            raise PromptError(f"states: {len(rows)} for {len(self)} prompts. Give one, or one for each.")
        return dataclasses.replace(self, states=tuple(rows * (len(self) // len(rows))))


def _split(input_ids: Any) -> list[Any]:
    """One entry per prompt."""
    if isinstance(input_ids, (str, bytes)):
        raise PromptError("input_ids: got text. Tokenise it first: tokenizer(text).input_ids.")
    if isinstance(input_ids, Mapping):
        raise PromptError(
            "input_ids: got a mapping. Give the token ids alone, without padding: tokenizer(texts).input_ids."
        )
    if isinstance(input_ids, (Tensor, np.ndarray)):
        if input_ids.ndim not in (1, 2):
            raise PromptError(f"input_ids: expected shape [T] or [B, T], got {list(input_ids.shape)}.")
        return [input_ids] if input_ids.ndim == 1 else list(input_ids)
    if not isinstance(input_ids, Sequence):
        raise PromptError(
            f"input_ids: expected a tensor [T] or [B, T], or a list of rows, got a {type(input_ids).__name__}."
        )
    entries = list(input_ids)
    return [entries] if entries and all(_is_number(entry) for entry in entries) else entries


def _is_number(entry: Any) -> bool:
    return isinstance(entry, (int, float, np.number)) or (isinstance(entry, Tensor) and entry.ndim == 0)


def _row(row: Any, index: int) -> Tensor:
    if isinstance(row, (str, bytes)):
        raise PromptError(f"input_ids: row {index} is text. Tokenise it first: tokenizer(text).input_ids.")
    try:
        values = row if isinstance(row, Tensor) else torch.as_tensor(np.asarray(row))
    except (TypeError, ValueError) as error:
        raise PromptError(f"input_ids: row {index} is no row of integers ({error}).") from error
    if values.ndim == 2 and values.shape[0] == 1:  # what a tokenizer returns for one text
        values = values[0]
    if values.ndim != 1:
        raise PromptError(f"input_ids: row {index} has shape {list(values.shape)}, expected [T].")
    if len(values) == 0:
        raise PromptError(f"input_ids: row {index} is empty. Every prompt needs at least one token.")
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise PromptError(f"input_ids: row {index} holds {values.dtype}, expected integers (token ids).")
    # a copy outside of inference mode's reach: what the caller does to his tensor later does not matter
    return values.detach().to("cpu", torch.int64, copy=True)


def _content_ids(rows: Sequence[Tensor]) -> tuple[int, ...]:
    seen: Counter[bytes] = Counter()
    ids = []
    for row in rows:
        content = row.numpy().astype("<i8").tobytes()
        key = hashlib.blake2b(content, digest_size=8, salt=seen[content].to_bytes(8, "little")).digest()
        seen[content] += 1
        ids.append(int.from_bytes(key, "little") >> 1)
    return tuple(ids)


def vocabulary_of(model: Any) -> int:
    """How many token ids can be read as well as predicted."""
    return min(model.get_input_embeddings().weight.shape[0], model.get_output_embeddings().weight.shape[0])
