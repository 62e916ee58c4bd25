"""Settings of the `data:` section: the files, then how documents, or prompts with answers, are made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from refine_verl.config.options import Settings, option
from refine_verl.config.refusals import ConfigError, DataError

ANSWER_KEYS = ("answer", "answers", "outputs")
"""Columns tried, in this order, where `data.answer_key` is not set."""
UNCUT = 2**31
"""Tokens; stands for null where documents are not cut."""
MAX_NEW_TOKENS_KEY = "max_gen_tokens"
CLASSES_KEY = "all_classes"

F = TypeVar("F", bound="FileSettings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileSettings(Settings):
    """What documents and prompts have in common: which files, and how they are prepared."""

    SECTION: ClassVar[str] = "data"

    train_files: tuple[str, ...] = option(
        (),
        "files, directories, globs, hub data set ids (org/name[:config][:split]) or python_stdlib:train; one or a list",
        configured=None,
        paper="Long-Data-Collections",
    )
    val_files: tuple[str, ...] = option((), "the same, for validation; null: none", configured=None, paper="Booksum")
    cache_dir: str | None = option(
        None, "where tokenised documents are kept; null: refine_verl/data in the user's cache directory"
    )
    num_workers: int | None = option(
        None, "processes that tokenise; null: by the amount of text and the cores", at_least=1
    )
    progress: bool | None = option(None, "progress bars; null: on a terminal only")

    @classmethod
    def from_mapping(cls: type[F], mapping: Mapping[str, Any]) -> F:
        """Take this class's keys out of a `data:` section (plain or OmegaConf mapping); leave the others."""
        names = {field.name for field in dataclasses.fields(cls)}
        return super().from_mapping({key: mapping[key] for key in mapping if key in names})

    def files(self, split: str) -> tuple[str, ...]:
        """The names given for `split` ("train" or "validation")."""
        return self.train_files if split_key(split) == "data.train_files" else self.val_files


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings(FileSettings):
    """What to read as documents, and how to cut them."""

    text_key: str = option("text", "column that holds the text; plain text has only text", empty=False)
    max_length: int | None = option(
        None,
        "T: most tokens of a sequence; null: documents stay whole",
        at_least=1,
        configured=16384,
        paper="16,384",
    )
    min_length: int = option(
        1,
        "fewest tokens of a sequence, shorter documents are left out and counted; null: refine.nsp.chunks + "
        "refine.nsp.rollout_length",
        at_least=1,
        configured=None,
    )
    long_documents: str = option(
        "window",
        "a document longer than data.max_length: window cuts it into consecutive sequences, head keeps the first",
        choices=("window", "head"),
    )
    append_eos: bool = option(False, "put the end-of-sequence token after each document, unless it is there")

    def _check_rules(self) -> None:
        if self.max_length is not None and self.max_length < self.min_length:
            raise ConfigError(
                "data.max_length",
                f"{self.max_length} is smaller than data.min_length={self.min_length}: no sequence could be kept. "
                "Raise data.max_length or lower data.min_length.",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptSettings(FileSettings):
    """What to read as prompts with answers (post-training and test-time training), and how to make tokens of them."""

    prompt_key: str = option("prompt", "prompts with answers: column with the prompt", empty=False)
    answer_key: str | None = option(
        None,
        "column with the answer, or with the list of references, of which the first is trained on; null: answer, "
        "answers or outputs",
        empty=False,
    )
    task_key: str = option("task", "column with the task, which chooses the metric", empty=False)
    task: str | None = option(None, "the task of all rows, for files without that column", empty=False)
    id_key: str | None = option(None, "column that names each row; null: by file and row", empty=False)
    chat_template: bool = option(False, "wrap prompts into the tokenizer's chat template")
    apply_chat_template_kwargs: dict[str, Any] = option(
        {}, "more arguments of the chat template, each with a plus: +data.apply_chat_template_kwargs.NAME=VALUE"
    )
    # A base model reads "Answer:" and goes on with " Paris", so the answer that is trained must begin likewise.
    answer_separator: str = option(" ", "put between prompt and answer, unless there is white space already")
    max_prompt_length: int | None = option(
        None,
        "most tokens of a prompt, special tokens included; null: any",
        at_least=1,
        configured="${data.max_length}",
        paper="16,384",
    )
    max_answer_length: int | None = option(
        None,
        "most tokens of an answer, end of sequence included; a longer one is an error; null: any",
        at_least=1,
    )
    overlong_prompts: str = option(
        "error",
        "a prompt longer than data.max_prompt_length: refuse it, or cut tokens out of the middle, from the left or "
        "from the right, counted and reported",
        choices=("error", "middle", "left", "right"),
    )
    max_new_tokens: int = option(
        32, f"most tokens to generate, for rows without a column {MAX_NEW_TOKENS_KEY}", at_least=1
    )

    def _check_rules(self) -> None:
        for name, value in self.apply_chat_template_kwargs.items():
            key = f"data.apply_chat_template_kwargs.{name}"
            if not self.chat_template:
                raise ConfigError(key, f"{value} has no effect without data.chat_template=true.")
            if name in ("conversation", "tokenize", "add_generation_prompt"):
                raise ConfigError(key, "is set by REFINE itself. Leave it out.")
        if self.answer_separator.strip():
            raise ConfigError(
                "data.answer_separator",
                f"{self.answer_separator!r} must be white space (or empty): anything else belongs into the prompt, "
                "where generation reads it too.",
            )
        if self.overlong_prompts != "error" and self.max_prompt_length is None:
            raise ConfigError(
                "data.overlong_prompts",
                f"{self.overlong_prompts} has no effect without a limit: set data.max_prompt_length, or leave "
                "data.overlong_prompts at error.",
            )
        # The roles of a chat stand at both ends: it can only lose its middle.
        if self.chat_template and self.overlong_prompts in ("left", "right"):
            raise ConfigError(
                "data.overlong_prompts",
                f"{self.overlong_prompts} would cut the chat template's own tokens off the prompt; with "
                "data.chat_template=true use middle or error.",
            )


def longest_possible(data: Any, phase: str) -> int:
    """Tokens that no document or prompt of a run exceeds, whatever those at hand have: all processes make the same
    number of passes by it, and the plan counts them by it.

    Args:
        data: the `data:` section.
        phase: `refine.phase`.
    """
    limit = data["max_length"] if phase == "documents" else data["max_prompt_length"]
    return int(limit or UNCUT)


def split_key(split: str) -> str:
    """The dotted key of a split, for messages: "train" -> "data.train_files"."""
    keys = {"train": "data.train_files", "validation": "data.val_files"}
    if split not in keys:
        raise DataError(f"unknown split {split!r}; splits are: {', '.join(keys)}.")
    return keys[split]
