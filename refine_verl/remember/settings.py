"""Keys of `python -m refine_verl.remember`'s three commands. Loads no torch."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from refine_verl.config import ConfigError, Settings, option

_GIVEN = dataclasses.MISSING
_MODEL = "directory or hub id of a Hugging Face checkpoint with weights"
_TOKENIZER = "directory or hub id, or bytes; null: the model's own"
_LIBRARY = "package to import first: one that registers a model and its adapter"
_DEVICE = "auto, cpu or cuda[:N]"
_ADAPTER = "directory of a LoRA adapter of the model, as PEFT writes one"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadSettings(Settings):
    """`remember read`: documents of files to states."""

    SECTION: ClassVar[str] = "read"

    model: str = option(_GIVEN, _MODEL, empty=False)
    files: tuple[str, ...] = option(_GIVEN, "text, parquet or jsonl files, directories, globs, or hub dataset ids")
    out: str = option(_GIVEN, "directory for the states; documents that are in it are not read again", empty=False)
    adapter: str | None = option(None, _ADAPTER, empty=False)
    tokenizer: str | None = option(None, _TOKENIZER, empty=False)
    text_key: str = option("text", "column with the text", empty=False)
    external_lib: str | None = option(None, _LIBRARY)
    dtype: str = option(
        "auto", "of the weights: bfloat16 on a GPU, else float32", choices=("auto", "float32", "bfloat16")
    )
    device: str = option("auto", _DEVICE)
    segment: int = option(2048, "tokens of a document in one pass, which decide how much memory it takes", at_least=1)
    batch_size: int = option(1, "documents read together, and saved when they are finished", at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AskSettings(Settings):
    """`remember ask`: questions about documents that were read."""

    SECTION: ClassVar[str] = "ask"

    model: str = option(_GIVEN, f"{_MODEL}: the one that read the documents", empty=False)
    memory: str = option(_GIVEN, "directory with the states", empty=False)
    question: str | None = option(None, "one question", empty=False)
    questions: str | None = option(None, "a UTF-8 text file with a question in every line", empty=False)
    document: str | None = option(None, "name of the document to ask; null: all of them", empty=False)
    max_new_tokens: int = option(64, "most tokens of an answer", at_least=1)
    temperature: float = option(0.0, "0 takes the most likely token", at_least=0)
    seed: int = option(0, "of sampled tokens", at_least=0)
    batch_size: int = option(8, "pairs of document and question that are read and answered together", at_least=1)
    adapter: str | None = option(None, f"{_ADAPTER}: the one that it read them with", empty=False)
    tokenizer: str | None = option(None, _TOKENIZER, empty=False)
    external_lib: str | None = option(None, _LIBRARY)
    device: str = option("auto", _DEVICE)
    json: bool = option(False, "one JSON object instead of text (--json)")

    def _check_rules(self) -> None:
        if (self.question is None) == (self.questions is None):
            raise ConfigError("question", "or questions: give one of them.")
        if self.seed >= 2**63:
            raise ConfigError("seed", f"must be below 2**63, got {self.seed}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListSettings(Settings):
    """`remember list`: what there is."""

    SECTION: ClassVar[str] = "list"

    memory: str = option(_GIVEN, "directory with the states", empty=False)
    json: bool = option(False, "one JSON object instead of a table (--json)")
