"""Settings of prompts and answers (the `data:` section of post-training and test-time training)."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from refine_verl.config.data import as_names, require_integer, split_key
from refine_verl.config.refusals import DataError

OVERLONG_POLICIES = ("error", "middle", "left", "right")
ANSWER_KEYS = ("answer", "answers", "outputs")
"""Columns tried, in this order, where `data.answer_key` is not set."""
MAX_NEW_TOKENS_KEY = "max_gen_tokens"
CLASSES_KEY = "all_classes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """What to read and how to make tokens of it. Field names are the keys under `data.`.

    Attributes:
        train_files: files (parquet, jsonl, jsonl.zst), directories, globs or hub dataset ids.
        val_files: the same, for validation; may be empty.
        prompt_key: column with the prompt, a string; with `chat_template` also a list of messages.
        answer_key: column with the answer, a string or a list of references; None takes whichever of
            `answer`, `answers` and `outputs` exists.
        task_key: column with the name of the task, which chooses the score.
        task: the task of rows in files that have no `task_key` column.
        id_key: column that names each row; None names it by file and row.
        chat_template: wrap the prompt into the tokenizer's chat template.
        answer_separator: put between prompt and answer unless white space is there already. A base model
            reads "Answer:" and goes on with " Paris", so the answer that is trained must begin likewise.
        max_prompt_length: most tokens of a prompt, special tokens included; None sets no limit.
        max_answer_length: most tokens of an answer, end-of-sequence included; a longer one is an error.
        overlong_prompts: `error`, or cut tokens out of the `middle`, from the `left` or from the `right`. A chat
            template can only lose its middle: the roles stand at both ends.
        max_new_tokens: most tokens to generate, for rows without a `max_gen_tokens` column.
        cache_dir: where prepared prompts are kept; default `$XDG_CACHE_HOME/refine_verl/data`.
        num_workers: processes that tokenise; None chooses by the amount of text and the cores.
        progress: progress bars on or off; None shows them on a terminal only.

    Raises:
        DataError: a value that is not allowed.
    """

    train_files: tuple[str, ...] = ()
    val_files: tuple[str, ...] = ()
    prompt_key: str = "prompt"
    answer_key: str | None = None
    task_key: str = "task"
    task: str | None = None
    id_key: str | None = None
    chat_template: bool = False
    answer_separator: str = " "
    max_prompt_length: int | None = None
    max_answer_length: int | None = None
    overlong_prompts: str = "error"
    max_new_tokens: int = 32
    cache_dir: str | None = None
    num_workers: int | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        for field in ("train_files", "val_files"):
            object.__setattr__(self, field, as_names(getattr(self, field), f"data.{field}"))
        for field in ("prompt_key", "task_key"):
            _require_name(f"data.{field}", getattr(self, field))
        for field in ("answer_key", "id_key", "task"):
            if getattr(self, field) is not None:
                _require_name(f"data.{field}", getattr(self, field))
        for field in ("max_prompt_length", "max_answer_length", "num_workers"):
            if getattr(self, field) is not None:
                require_integer(f"data.{field}", getattr(self, field), at_least=1)
        require_integer("data.max_new_tokens", self.max_new_tokens, at_least=1)
        if not isinstance(self.chat_template, bool):
            raise DataError(f"data.chat_template={self.chat_template!r} must be true or false.")
        if not isinstance(self.answer_separator, str) or self.answer_separator.strip():
            raise DataError(
                f"data.answer_separator={self.answer_separator!r} must be white space (or empty): anything else "
                "belongs into the prompt, where generation reads it too."
            )
        if self.overlong_prompts not in OVERLONG_POLICIES:
            near = difflib.get_close_matches(str(self.overlong_prompts), OVERLONG_POLICIES, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(
                f"data.overlong_prompts={self.overlong_prompts!r} is not one of: {', '.join(OVERLONG_POLICIES)}.{hint}"
            )
        if self.overlong_prompts != "error" and self.max_prompt_length is None:
            raise DataError(
                f"data.overlong_prompts={self.overlong_prompts} has no effect without a limit: set "
                "data.max_prompt_length, or leave data.overlong_prompts at error."
            )

        if self.chat_template and self.overlong_prompts in ("left", "right"):
            raise DataError(
                f"data.overlong_prompts={self.overlong_prompts} would cut the chat template's own tokens off the "
                "prompt; with data.chat_template=true use middle or error."
            )

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> PromptSettings:
        """Take this class's keys out of a `data:` section (plain or OmegaConf mapping); leave the others."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: data[key] for key in data if key in names})

    def files(self, split: str) -> tuple[str, ...]:
        """The names given for `split` ("train" or "validation")."""
        return self.train_files if split_key(split) == "data.train_files" else self.val_files


def _require_name(key: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise DataError(f"{key}={value!r} must be a name.")
