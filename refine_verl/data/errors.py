"""The one error type of the data path."""

from __future__ import annotations


class DataError(ValueError):
    """Bad input data or data settings; the message names key, file and row, and says what to do."""
