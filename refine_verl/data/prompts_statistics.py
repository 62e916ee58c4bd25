"""The account of what became of prompts and answers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from refine_verl.config import DataError

PROMPT_STATISTICS_FILE = "prompt_statistics.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptStatistics:
    """What became of the rows of one split. Lengths in tokens.

    Attributes:
        rows: rows read; every one of them is kept.
        truncated: prompts that were longer than `data.max_prompt_length` and were cut.
        tokens_dropped: prompt tokens cut away.
        prompt_tokens, answer_tokens: tokens of all prompts and of all first references.
        shortest_prompt, longest_prompt, longest_answer: over all rows, after cutting.
        tasks: rows per task.
    """

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


def read_prompt_statistics(path: Path) -> PromptStatistics:
    """The account kept in a prepared directory.

    Raises:
        DataError: `path` is not a directory made by `prepare_prompts`.
    """
    try:
        values: dict[str, Any] = json.loads((path / PROMPT_STATISTICS_FILE).read_text())
        return PromptStatistics(**values)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is not a directory of prepared prompts ({error}); delete it and retry.") from error
