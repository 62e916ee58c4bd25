"""`python -m refine_verl.doctor [--json]`: exit status 0 if nothing failed, else 1."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from refine_verl.command.front import run_command, show
from refine_verl.command.keys import OutputSettings, list_keys, read_keys
from refine_verl.doctor.findings import FAIL, OK, WARN, Finding

USAGE = """\
python -m refine_verl.doctor [--json]

Whether this machine is ready to train, and if not, what to do. Exit code 0, or 1 if a check failed.

"""
COLOURS = {OK: "green", WARN: "yellow", FAIL: "red"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, 1 if a check failed."""
    return run_command(argv, help=lambda _: USAGE + list_keys(OutputSettings), run=_run)


def _run(arguments: list[str]) -> int:
    settings, _ = read_keys(arguments, OutputSettings)
    from refine_verl.doctor.diagnosis import diagnose  # torch, verl and fla take seconds to load

    findings = diagnose()
    failed = sum(finding.status == FAIL for finding in findings)
    if settings.json:
        report = {"ok": not failed, "findings": [dataclasses.asdict(finding) for finding in findings]}
        show(json.dumps(report, indent=2))
    else:
        _show(findings, failed)
    return int(failed > 0)


def _show(findings: list[Finding], failed: int) -> None:
    console = Console()
    table = Table(box=None, pad_edge=False)
    for title in ("check", "status", "what was seen, and what to do"):
        table.add_column(title, overflow="fold")
    for finding in findings:
        status = f"[{COLOURS[finding.status]}]{finding.status}[/]"
        table.add_row(escape(finding.name), status, escape(finding.detail))
        if finding.fix:
            table.add_row("", "", f"-> {escape(finding.fix)}")
    console.print(table)
    console.print(f"{failed} failed" if failed else "ready to train")


if __name__ == "__main__":
    sys.exit(main())
