"""All checks, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from refine_verl.doctor.findings import FAIL, Finding
from refine_verl.doctor.installation import check_imports, check_plugin, check_python, check_versions
from refine_verl.doctor.kernels import check_kernels, check_triton
from refine_verl.doctor.machine import check_disk, check_gpu, check_localhost, check_open_files, check_shared_memory

Check = Callable[[], Iterator[Finding]]
CHECKS: tuple[Check, ...] = (
    check_python,
    check_versions,
    check_imports,
    check_plugin,
    check_gpu,
    check_triton,
    check_kernels,
    check_shared_memory,
    check_disk,
    check_open_files,
    check_localhost,
)


def diagnose(checks: Iterable[Check] = CHECKS) -> list[Finding]:
    """What all checks find; one that breaks is a failure of its own and stops no other."""
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:  # whatever is broken here, the other checks are still worth making
            name = check.__name__.removeprefix("check_").replace("_", " ")
            detail = f"the check itself failed: {type(error).__name__}: {error}"
            findings.append(Finding(name, FAIL, detail, "see the failures above; else this is a bug of ours"))
    return findings
