"""Keys of `python -m refine_verl.prepare`'s three commands. Loads no torch, transformers or datasets."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from refine_verl.config import ConfigError, Settings, option

SOURCES = ("squad", "hotpotqa")
_GIVEN = dataclasses.MISSING


@dataclasses.dataclass(frozen=True, kw_only=True)
class RulerSettings(Settings):
    """`prepare ruler_qa`: question answering at a given length."""

    SECTION: ClassVar[str] = "ruler_qa"

    source: str = option(_GIVEN, "whose questions", choices=SOURCES)
    input: str = option(_GIVEN, "official json file, parquet or jsonl files, or hub dataset id (:config:split)")
    tokenizer: str = option(_GIVEN, "directory or hub id; the length is counted with it")
    length: int = option(_GIVEN, "most tokens of prompt and answer together, 4096 say", at_least=1)
    train: int = option(1600, "questions for training", at_least=0)
    test: int = option(200, "questions for testing", at_least=0)
    answer_tokens: int = option(32, "least room left for the answer", at_least=1)
    seed: int = option(0, "of the choice of questions, of distractors and of their order", at_least=0)
    out: str = option(_GIVEN, "directory to fill")

    def _check_rules(self) -> None:
        if self.train + self.test == 0:
            raise ConfigError("train", "and test are both 0: nothing to make. Raise one of them.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongBenchSettings(Settings):
    """`prepare longbench`: LongBench's English tasks as prompts."""

    SECTION: ClassVar[str] = "longbench"

    input: str = option(_GIVEN, "directory with TASK.jsonl files, or hub id of a dataset with tasks as configs")
    out: str = option(_GIVEN, "directory to fill with TASK.parquet")
    tasks: tuple[str, ...] | None = option(None, "which tasks; null: the paper's twelve")
    tokenizer: str | None = option(None, "directory or hub id to count lengths with; null leaves them empty")
    length: int | None = option(None, "leave out samples whose prompt and answer have more tokens", at_least=1)

    def _check_rules(self) -> None:
        if self.length is not None and self.tokenizer is None:
            raise ConfigError("length", f"{self.length} counts tokens: give --tokenizer as well.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentSettings(Settings):
    """`prepare documents`: long documents out of a corpus."""

    SECTION: ClassVar[str] = "documents"

    input: tuple[str, ...] = option(_GIVEN, "files, directories, globs, hub dataset ids, or python_stdlib")
    out: str = option(_GIVEN, "directory to fill")
    tokenizer: str = option(_GIVEN, "directory or hub id to count tokens with")
    min_tokens: int = option(_GIVEN, "fewest tokens of a document, special tokens included", at_least=1)
    max_tokens: int | None = option(None, "leave out longer documents")
    text_key: str = option("text", "column with the text")
    limit: int | None = option(None, "stop after this many documents", at_least=1)
    limit_tokens: int | None = option(None, "stop after this many tokens", at_least=1)
    sample: float = option(1.0, "share of the documents to look at, by seed and text", above=0)
    seed: int = option(0, "of sample", at_least=0)
    shard_size: int = option(1000, "documents per file, about", at_least=1)

    def _check_rules(self) -> None:
        if self.sample > 1:
            raise ConfigError("sample", f"must be at most 1, got {self.sample}.")
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ConfigError("max_tokens", f"must be at least min_tokens={self.min_tokens}, got {self.max_tokens}.")
