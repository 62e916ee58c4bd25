"""What is said of input that cannot be used, and of runs that fail: one base class each, so that every command answers
them the same way.

Standard library only.
"""

from __future__ import annotations


class Refusal(ValueError):
    """Input that cannot be used: the message says what is wrong, where, and what to do; commands exit with code 2."""


class RunFailed(RuntimeError):
    """Something ended a run, and the message says all of it; commands exit with code 1, without a traceback."""


class ConfigError(Refusal):
    """A setting that cannot be used; `key` is its dotted name and the message says what would work."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}" if key else message)
        self.key = key


class DataError(Refusal):
    """Bad input data or data settings; the message names key, file and row, and says what to do."""


class ModelError(Refusal):
    """A model that cannot be trained: what is wrong with it and what would work."""


def with_article(name: str) -> str:
    """``a delta_net``, ``an olmo_hybrid``."""
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
