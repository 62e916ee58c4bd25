"""Adapting needs neither Ray nor verl, and importing the package alone needs nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

ADAPT = """
import sys
sys.path.insert(0, "tests")
from reference.toy import tiny_config
from refine_verl.models import load_model
import refine_verl
model = load_model(None, config=tiny_config("delta_net"))
with refine_verl.adapt(model, [list(range(20))]) as adapted:
    adapted.generate(max_new_tokens=2)
assert adapted.history
"""


def loaded_after(code: str) -> set[str]:
    code += "\nimport sys; print('loaded', *{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("loaded", 1)[1].split())


def test_adapting_loads_neither_ray_nor_verl() -> None:
    loaded = loaded_after(ADAPT)
    assert {"torch", "fla", "refine_verl"} <= loaded
    assert not loaded & {"ray", "verl", "vllm", "flash_attn", "hydra", "tensordict"}


def test_the_package_stays_light() -> None:
    loaded = loaded_after("import refine_verl; refine_verl.__version__; assert 'adapt' in refine_verl.__all__")
    assert not loaded & {"torch", "ray", "verl", "transformers", "fla", "numpy"}
    assert "torch" in loaded_after("import refine_verl; refine_verl.adapt")  # negative control


def test_names_that_are_not_there() -> None:
    import refine_verl

    assert not hasattr(refine_verl, "adapts")
