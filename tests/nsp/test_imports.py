from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("verl", "ray", "fla", "transformers", "triton", "mamba_ssm", "flash_attn", "vllm")
REPORT = f"import sys; print([name for name in {HEAVY!r} if name in sys.modules])"


def loaded_after(statement: str) -> str:
    """Which heavy packages a fresh interpreter has loaded after a statement."""
    return subprocess.run(
        [sys.executable, "-c", f"{statement}; {REPORT}"],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout.strip()


def test_nsp_needs_torch_and_numpy_only() -> None:
    everything = ", ".join(
        f"refine_verl.nsp.{m}" for m in ("entropy", "selection", "sampling", "rewards", "objective", "functions")
    )
    assert loaded_after(f"import refine_verl.nsp, {everything}") == "[]"


def test_a_heavy_import_would_be_seen() -> None:
    pytest.importorskip("ray")
    assert "ray" in loaded_after("import ray")
