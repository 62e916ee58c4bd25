"""The core knows neither verl nor Ray, the settings not even torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

FORBIDDEN = {
    "refine_verl.models": {"verl", "ray", "vllm", "flash_attn", "hydra"},
    "refine_verl.nsp": {"verl", "ray", "fla", "transformers"},
    "refine_verl.kernels": {"verl", "ray"},
    "refine_verl.config": {"verl", "ray", "torch", "transformers", "fla"},
    "refine_verl.compose.validate": {"verl", "ray", "torch", "transformers", "fla"},
}


def loaded_by(module: str) -> set[str]:
    code = f"import sys, {module}; print(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("module", FORBIDDEN)
def test_importing_does_not_load(module: str) -> None:
    assert not loaded_by(module) & FORBIDDEN[module]


def test_the_check_sees_imports() -> None:
    """Negative control."""
    assert {"verl", "ray", "torch"} <= loaded_by("refine_verl.workers.engine")
