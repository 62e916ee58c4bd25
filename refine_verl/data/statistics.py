"""The account of what became of documents, or of prompts and answers, kept in the prepared directory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import ClassVar, TypeVar

from refine_verl.config import DataError

S = TypeVar("S", bound="Statistics")


class Statistics:
    """Base of both accounts: how they are kept."""

    FILE: ClassVar[str]
    KIND: ClassVar[str]

    def summary(self) -> str:
        """One line for the log."""
        raise NotImplementedError

    def save(self, directory: Path) -> None:
        """Write the account into a prepared directory."""
        values = dataclasses.asdict(self)  # type: ignore[call-overload]
        (directory / self.FILE).write_text(json.dumps(values, indent=2) + "\n")

    @classmethod
    def load(cls: type[S], directory: Path) -> S:
        """The account kept in a prepared directory.

        Raises:
            DataError: there is no such directory, or it holds something else.
        """
        if not directory.is_dir():
            raise DataError(
                f"no prepared {cls.KIND} at {directory}. On several machines data.cache_dir must lie on a file "
                "system that all of them see."
            )
        try:
            return cls(**json.loads((directory / cls.FILE).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"{directory} is not a directory of prepared {cls.KIND} ({error}); delete it and retry."
            ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataStatistics(Statistics):
    """What happened to every document and token. Lengths are in tokens, of the sequences that were kept.

    documents = kept + too_short, and the tokens of all documents = tokens_kept + tokens_dropped.

    Attributes:
        documents: documents read.
        kept: documents with at least one sequence.
        too_short: documents below the minimum length, left out whole.
        cut: kept documents longer than the maximum length.
        windows: sequences that came out; equals `kept` where nothing was cut into windows.
        tokens_kept: tokens in the sequences.
        tokens_dropped: tokens of documents too short, heads' tails, and last windows below the minimum.
        min_length: shortest sequence.
        mean_length: mean length of the sequences.
        max_length: longest sequence.
        longest_document: tokens of the longest document read, kept or not.
    """

    FILE: ClassVar[str] = "statistics.json"
    KIND: ClassVar[str] = "documents"

    documents: int
    kept: int
    too_short: int
    cut: int
    windows: int
    tokens_kept: int
    tokens_dropped: int
    min_length: int
    mean_length: float
    max_length: int
    longest_document: int

    def summary(self) -> str:
        """One line for the log."""
        return (
            f"{self.documents:,} documents, {self.kept:,} kept as {self.windows:,} sequences of "
            f"{self.min_length:,} to {self.max_length:,} tokens (mean {self.mean_length:,.0f}); "
            f"{self.too_short:,} too short, {self.cut:,} cut; "
            f"{self.tokens_kept:,} tokens kept, {self.tokens_dropped:,} dropped"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptStatistics(Statistics):
    """What became of the rows of one split. Lengths in tokens.

    Attributes:
        rows: rows read; every one of them is kept.
        truncated: prompts that were longer than `data.max_prompt_length` and were cut.
        tokens_dropped: prompt tokens cut away.
        prompt_tokens, answer_tokens: tokens of all prompts and of all first references.
        shortest_prompt, longest_prompt, longest_answer: over all rows, after cutting.
        tasks: rows per task.
    """

    FILE: ClassVar[str] = "prompt_statistics.json"
    KIND: ClassVar[str] = "prompts"

    rows: int
    truncated: int
    tokens_dropped: int
    prompt_tokens: int
    answer_tokens: int
    shortest_prompt: int
    longest_prompt: int
    longest_answer: int
    tasks: dict[str, int]

    def summary(self) -> str:
        """One line for the log."""
        tasks = ", ".join(f"{name or '(no task)'} {count}" for name, count in self.tasks.items())
        cut = f"; {self.truncated} prompts cut by {self.tokens_dropped} tokens in all" if self.truncated else ""
        return (
            f"{self.rows} prompts of {self.shortest_prompt} to {self.longest_prompt} tokens, answers of at most "
            f"{self.longest_answer} tokens ({tasks}){cut}"
        )
