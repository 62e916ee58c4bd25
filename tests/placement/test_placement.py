"""Everything that runs on a GPU runs on a second device, with what it makes in the right place: see `cases.py`.

And the host waits for it no more often than it has to: see `waits.py`.

In processes of their own: the device cannot be taken back, and PyTorch starts the threads of its backward passes once,
for the devices that it knows then.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.utils.backend_registration as backends
from reference.processes import ROOT, Forked

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(backends, "_setup_privateuseone_for_python_backend"),
        reason="this PyTorch cannot have a backend made in Python (2.13 can)",
    ),
]


@pytest.mark.parametrize(
    ("file", "which"), [("cases.py", "test_mode"), ("cases.py", "not test_mode"), ("waits.py", "test")]
)
def test_on_a_second_device(tmp_path: Path, file: str, which: str) -> None:
    arguments = [
        str(HERE / file),
        "-k",
        which,
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        f"--basetemp={tmp_path / 'own'}",
    ]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = Forked("pytest", arguments, {**own, "OMP_NUM_THREADS": "1"}, ROOT, tmp_path / "output")
    output, _ = run.communicate(timeout=900)
    assert run.returncode == 0, output[-20000:]
    assert " passed" in output and "skipped" not in output
