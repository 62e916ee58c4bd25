"""Known vulnerabilities of what is installed here, by pip-audit: part of `make check`.

Fails for an advisory that an upgrade within the bounds of setup.py would cure; others are listed. Where the advisory
service cannot be reached, says so and passes: a machine without a network can still run the other checks.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SECONDS = 180
COMMAND = [
    sys.executable,
    "-m",
    "pip_audit",
    *("--local", "--skip-editable", "--format", "json", "--progress-spinner", "off", "--timeout", "10"),
]


def run_audit() -> tuple[dict[str, Any] | None, str]:
    """pip-audit's findings, or None and why there are none."""
    try:
        done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return None, f"no answer within {SECONDS} s"
    try:
        return json.loads(done.stdout), ""
    except ValueError:
        lines = done.stderr.strip().splitlines()
        return None, lines[-1] if lines else f"exit status {done.returncode}"


def judge(report: dict[str, Any], bounds: dict[str, Requirement]) -> tuple[list[str], list[str], int]:
    """Sort the findings.

    Args:
        report: pip-audit's JSON.
        bounds: requirements of refine_verl by canonical name.

    Returns:
        Advisories that an upgrade cures, other advisories, and the number of packages that were looked up.
    """
    curable, others, known = [], [], 0
    for package in report["dependencies"]:
        if "skip_reason" in package:
            continue
        known += 1
        bound = bounds.get(canonicalize_name(package["name"]))
        for advisory in package.get("vulns", ()):
            fixes = advisory.get("fix_versions", [])
            allowed = [fix for fix in fixes if bound is None or bound.specifier.contains(fix)]
            line = f"{package['name']} {package['version']}: {advisory['id']}"
            if allowed:
                curable.append(f"{line}; upgrade to {allowed[0]}")
            else:
                others.append(f"{line}; {'fixed in ' + fixes[0] + ', out of our bounds' if fixes else 'not fixed yet'}")
    return curable, others, known


def main() -> int:
    report, problem = run_audit()
    if report is None:
        sys.stdout.write(f"pip-audit: SKIPPED, the advisory service cannot be reached ({problem})\n")
        return 0
    requirements = [Requirement(text) for text in importlib.metadata.requires("refine_verl") or []]
    curable, others, known = judge(report, {canonicalize_name(item.name): item for item in requirements})
    if not known:
        sys.stdout.write("pip-audit: SKIPPED, the advisory service knows none of the packages installed here\n")
        return 0
    for line in others:
        sys.stdout.write(f"pip-audit: note: {line}\n")
    for line in curable:
        sys.stdout.write(f"pip-audit: {line}\n")
    sys.stdout.write(f"pip-audit: {known} packages looked up, {len(curable)} to upgrade, {len(others)} to know of\n")
    return int(bool(curable))


if __name__ == "__main__":
    sys.exit(main())
