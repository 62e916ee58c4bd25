"""`python -m refine_verl.doctor [--json]`: exit status 0 if nothing failed, else 1."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from refine_verl.command.quiet import quieten_third_parties
from refine_verl.doctor.findings import FAIL, OK, WARN, Finding
from refine_verl.doctor.installation import check_imports, check_plugin, check_python, check_versions
from refine_verl.doctor.kernels import check_kernels
from refine_verl.doctor.machine import (
    check_disk,
    check_gpu,
    check_localhost,
    check_open_files,
    check_shared_memory,
)

Check = Callable[[], Iterator[Finding]]
CHECKS: tuple[Check, ...] = (
    check_python,
    check_versions,
    check_imports,
    check_plugin,
    check_gpu,
    check_kernels,
    check_shared_memory,
    check_disk,
    check_open_files,
    check_localhost,
)
COLOURS = {OK: "green", WARN: "yellow", FAIL: "red"}


def diagnose(checks: Iterable[Check] = CHECKS) -> list[Finding]:
    """What all checks find; one that breaks is a failure of its own and stops no other."""
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:  # the doctor must survive the patient
            name = check.__name__.removeprefix("check_").replace("_", " ")
            detail = f"the check itself failed: {type(error).__name__}: {error}"
            findings.append(Finding(name, FAIL, detail, "see the failures above; else this is a bug of ours"))
    return findings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m refine_verl.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="findings as JSON instead of a table")
    arguments = parser.parse_args(argv)
    logging.getLogger("refine_verl").setLevel(logging.WARNING)
    quieten_third_parties()
    findings = diagnose()
    failed = sum(finding.status == FAIL for finding in findings)
    if arguments.json:
        report = {"ok": not failed, "findings": [dataclasses.asdict(finding) for finding in findings]}
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
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
