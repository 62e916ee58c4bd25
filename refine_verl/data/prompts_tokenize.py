"""Prompts and answers to tokens, separately: what generation reads, and what it should go on with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from refine_verl.config import DataError, PromptSettings

# Text that a continuation is tokenised behind, so that no tokenizer takes it for the beginning of a document
# (sentencepiece puts a space there). One that does not merge with the continuation is taken, none where all do.
_ANCHORS = (":", ".", "\n", "a")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, settings: PromptSettings) -> None:
    """Refuse a tokenizer that cannot end an answer, or has no chat template where one is asked for."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-sequence token, so an answer has no end; set its eos_token "
            "(tokenizer_config.json)."
        )
    if settings.chat_template and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "data.chat_template=true, but the tokenizer has no chat template. Use the tokenizer of an "
            "instruction-tuned model, or set data.chat_template=false."
        )


def render(
    prompt: str | list[dict[str, str]], answer: str, where: str, tokenizer: Any, settings: PromptSettings
) -> tuple[str, str]:
    """The text generation starts from, and the text that should follow it (without end of sequence).

    Without a chat template the prompt stays as it is, and `data.answer_separator` goes before the answer where
    neither of them brings white space.

    Raises:
        DataError: the template fails, or puts something else behind the prompt once there is an answer.
    """
    if not settings.chat_template:
        text = str(prompt)
        separated = text[-1:].isspace() or answer[:1].isspace()
        return text, answer if separated else settings.answer_separator + answer
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    apply = partial(tokenizer.apply_chat_template, tokenize=False, **settings.apply_chat_template_kwargs)
    try:
        start = apply(messages, add_generation_prompt=True)
        whole = apply([*messages, {"role": "assistant", "content": answer}])
    except Exception as error:  # templates are programs: they raise what they like
        raise DataError(f"{where}: the tokenizer's chat template refuses this row: {error}") from error
    if not whole.startswith(start):
        raise DataError(
            f"{where}: with the answer, the tokenizer's chat template renders the prompt differently than for "
            "generation, so an answer cannot be trained the way it is generated. Set data.chat_template=false and give "
            "prompts as text, or use a tokenizer with a simpler template."
        )
    follows = whole[len(start) :]
    # The template may end the turn with the end-of-sequence token itself; it is added as a token below.
    end = follows.rfind(tokenizer.eos_token)
    return start, follows[:end] if end >= 0 else follows


def encode_prompts(
    tokenizer: Any, texts: Sequence[str], *, special_tokens: bool
) -> tuple[list[np.ndarray], np.ndarray]:
    """Tokens of prompts as generation reads them.

    Args:
        texts: N prompts.
        special_tokens: add what the tokenizer puts *before* a text (BOS). What it would put behind (some add
            an end of sequence) is left out: the text goes on. Both are told by position, never by token id.

    Returns:
        N int32 arrays, and int64 [N], how many tokens of each were added in front.
    """
    encoded = tokenizer(list(texts), add_special_tokens=special_tokens, return_special_tokens_mask=True)
    prompts, added = [], np.zeros(len(texts), np.int64)
    for number, (ids, mask) in enumerate(zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)):
        front, end = (_ones(mask), len(ids) - _ones(mask[::-1])) if special_tokens else (0, len(ids))
        added[number] = min(front, end)
        prompts.append(np.asarray(ids[:end], np.int32))
    return prompts, added


def encode_continuations(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """Tokens of texts that stand behind other text: no special tokens, no space that is not in the text.

    Returns:
        N int32 arrays, without end of sequence.
    """
    found: dict[int, np.ndarray] = {}
    for anchor in (*_ANCHORS, ""):
        left = [index for index in range(len(texts)) if index not in found]
        if not left:
            break
        head = tokenizer([anchor], add_special_tokens=False)["input_ids"][0] if anchor else []
        encoded = tokenizer([anchor + texts[index] for index in left], add_special_tokens=False)["input_ids"]
        for index, ids in zip(left, encoded, strict=True):
            if list(ids[: len(head)]) == list(head):
                found[index] = np.asarray(ids[len(head) :], np.int32)
    return [found[index] for index in range(len(texts))]


def cut_prompt(ids: np.ndarray, added: int, limit: int, policy: str) -> np.ndarray:
    """A prompt, int [T], of at most `limit` tokens; the `added` special tokens in front, fewer than `limit`, stay.

    The policy `left` drops the beginning, `right` the end, `middle` what lies between two equal parts.
    """
    if len(ids) <= limit:
        return ids
    front, body, room = ids[:added], ids[added:], limit - added
    head = {"left": 0, "right": room, "middle": (room + 1) // 2}[policy]
    tail = room - head
    return np.concatenate([front, body[:head], body[len(body) - tail :]])


def encode_rows(
    batch: dict[str, list[Any]], *, tokenizer: Any, special_tokens: bool, limit: int | None, policy: str
) -> dict[str, list[Any]]:
    """Tokenise a batch of rendered rows (columns `prompt` and `continuation`); for `Dataset.map`."""
    prompts, added = encode_prompts(tokenizer, batch["prompt"], special_tokens=special_tokens)
    answers = encode_continuations(tokenizer, batch["continuation"])
    lengths = [len(ids) for ids in prompts]
    if limit is not None and policy != "error":
        prompts = [cut_prompt(ids, front, limit, policy) for ids, front in zip(prompts, added, strict=True)]
    end = np.array([tokenizer.eos_token_id], np.int32)
    return {
        "prompt_ids": prompts,
        "answer_ids": [np.concatenate([ids, end]) for ids in answers],
        "length": [len(ids) for ids in prompts],
        "answer_length": [len(ids) + 1 for ids in answers],
        "full_length": lengths,
        "added": added.tolist(),
    }


def _ones(mask: Sequence[int]) -> int:
    """How many ones a mask begins with."""
    return next((index for index, flag in enumerate(mask) if not flag), len(mask))
