"""What a check says."""

from __future__ import annotations

import dataclasses

OK, WARN, FAIL = "ok", "warning", "failed"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        status: `OK`, `WARN` (training may work, not as well as it could) or `FAIL`.
        detail: what was seen.
        fix: what to do; empty if nothing.
    """

    name: str
    status: str
    detail: str
    fix: str = ""
