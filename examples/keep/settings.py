"""Keys of the two commands. Loads no torch."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from refine_verl.config import CONVENTIONS, ConfigError, Settings, option

_GIVEN = dataclasses.MISSING


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiniatureSettings(Settings):
    """`python -m examples.keep`: the miniature."""

    SECTION: ClassVar[str] = "keep"

    fast: bool = option(False, "a base that has learned less, two seeds and few documents (--fast)")
    out: str | None = option(
        None, "directory for finished pieces; null: outputs/keep, with fast outputs/keep_fast", empty=False
    )
    threads: int = option(1, "of the processor", at_least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileSettings(Settings):
    """`python -m examples.keep model=DIR data=FILE out=DIR`: the same arms on a model and a file of questions."""

    SECTION: ClassVar[str] = "keep"

    model: str = option(_GIVEN, "directory or hub id of a fast-weight model", empty=False)
    data: tuple[str, ...] = option(_GIVEN, "files with prompts and answers: RULER's, LongBench's, or of your own")
    out: str = option(_GIVEN, "directory for results; the same command resumes where it was", empty=False)
    task: str | None = option(None, "which says how answers are scored, for files without a column task", empty=False)
    question: str | None = option(
        None,
        "what the question of a prompt begins with; null: what the task's published prompt has behind the document",
        empty=False,
    )
    adapt: dict | str | None = option(
        None, "settings of the adapters' training or a YAML file of them; null: rank 16, 4 passes, lr 1e-3"
    )
    passage: int | None = option(
        None, "train on passages of so many tokens of a document; null: on the document whole", at_least=2
    )
    limit: int | None = option(None, "documents, the first ones; null: all", at_least=1)
    convention: str = option("paper", "how answers are scored", choices=CONVENTIONS)
    tokenizer: str | None = option(None, "directory or hub id, or bytes; null: the model's", empty=False)
    external_lib: str | None = option(None, "package to import first: one that registers a model and its adapter")
    dtype: str = option("auto", "of the weights", choices=("auto", "float32", "bfloat16"))
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    segment: int = option(2048, "tokens of a document in one pass where its state is made", at_least=1)
    batch_size: int = option(8, "questions of a document answered together", at_least=1)

    def _check_rules(self) -> None:
        if not self.data:
            raise ConfigError(f"{self.SECTION}.data", "is empty. Give a file.")
