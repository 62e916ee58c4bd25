"""Files of one JSON object per line that are appended to. A kill leaves at most a torn last line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from refine_verl.record.files import write_atomically

Test = Callable[[Mapping[str, Any]], bool]
Refusal = Callable[[str, bytes], Exception]
"""From `PATH, line 3` and that line to the error to raise."""


def read_lines(path: Path, is_record: Test, refusal: Refusal) -> list[tuple[bytes, dict[str, Any]]]:
    """The complete lines of a file, each with the record it holds. Blank lines and a torn last line are left out.

    Raises:
        Exception: what ``refusal`` makes of a complete line that is no JSON object, or one ``is_record`` is false for.
    """
    lines = path.read_bytes().split(b"\n")
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:  # undecodable bytes raise one, too
            record = None
        if isinstance(record, dict) and is_record(record):
            parsed.append((line, record))
        elif line.strip() and number < len(lines):
            raise refusal(f"{path}, line {number}", line)
    return parsed


def keep_lines(path: Path, is_record: Test, refusal: Refusal, keep: Test) -> tuple[list[dict[str, Any]], int]:
    """Drop a torn last line and the records that ``keep`` is false for; those that stay keep every byte.

    A file with neither is left alone; otherwise it is replaced in one step. Raises what :func:`read_lines` raises.

    Returns:
        The records that stay, and how many were dropped.
    """
    parsed = read_lines(path, is_record, refusal)
    kept = [(line, record) for line, record in parsed if keep(record)]
    content = b"".join(line + b"\n" for line, _ in kept)
    if content != path.read_bytes():
        write_atomically(path, content)
    return [record for _, record in kept], len(parsed) - len(kept)
