"""What a user gives to a memory, checked: texts or token ids, numbers and names."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from refine_verl.adaptation.prompts import PromptError, Prompts, vocabulary_of
from refine_verl.config import ConfigError
from refine_verl.data.prompts_tokenize import encode_continuations, encode_prompts


def rows_of(
    model: Any, given: Any, tokenizer: PreTrainedTokenizerBase | None, what: str, *, begins: bool
) -> tuple[Tensor, ...]:
    """Token ids, int64 [T] on the CPU, of what a user gave as ``what``; checked.

    Raises:
        PromptError: names ``what``, and which of them.
    """
    texts = [given] if isinstance(given, str) else given
    if isinstance(texts, Sequence) and texts and all(isinstance(text, str) for text in texts):
        if tokenizer is None:
            raise PromptError(f"{what}: got text, and no tokenizer to read it with. Give tokenizer=, or token ids.")
        if begins:
            given = encode_prompts(tokenizer, texts, special_tokens=True)[0]
        else:
            given = encode_continuations(tokenizer, texts)
    try:
        return Prompts.read(given, vocabulary=vocabulary_of(model), shortest=1, needs="there is nothing to read.").rows
    except PromptError as error:
        raise PromptError(str(error).replace("input_ids", what, 1)) from error


def numbers_of(given: Any, count: int, what: str, *, least: int) -> list[int]:
    """One number for all, or one for each of ``count``."""
    try:
        numbers = [operator.index(x) for x in given] if hasattr(given, "__len__") else [operator.index(given)] * count
    except TypeError as error:
        raise PromptError(f"{what}: must be an integer, or one for each question, got {given!r}.") from error
    if len(numbers) != count:
        raise PromptError(f"{what}: {len(numbers)} numbers for {count} questions.")
    for number in numbers:
        if number < least:
            raise PromptError(f"{what}: must be at least {least}, got {number}.")
    return numbers


def chosen(only: Sequence[int], count: int) -> list[int]:
    """Numbers of documents.

    Raises:
        ConfigError: something else, or there is no such document.
    """
    try:
        numbers = [operator.index(number) for number in only]
    except TypeError as error:
        raise ConfigError("only", f"must be a list of numbers of documents, got {only!r}.") from error
    wrong = [number for number in numbers if not 0 <= number < count]
    if wrong:
        raise ConfigError("only", f"there is no document {wrong[0]}; there are {count}, from 0 on.")
    return numbers


def names_of(names: Sequence[str] | None, count: int, there: Sequence[str]) -> list[str]:
    """Names of new documents; None numbers them, behind the largest number that is ``there``.

    Raises:
        ConfigError: too many or too few, or one that is there already.
    """
    if names is None:  # a fork may have a larger number than it has documents
        first = max([len(there), *(int(name) + 1 for name in there if name.isdecimal())])
        return [str(first + number) for number in range(count)]
    labels = [names] if isinstance(names, str) else list(names)
    if len(labels) != count:
        raise ConfigError("names", f"{len(labels)} names for {count} documents.")
    twice = next((name for place, name in enumerate(labels) if name in there or name in labels[:place]), None)
    if twice is not None:
        raise ConfigError("names", f"there would be two documents {twice!r}. Give each a name of its own.")
    return labels
