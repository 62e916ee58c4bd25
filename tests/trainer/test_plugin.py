"""verl finds our platform, and says so if it does not."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch
from reference.runs import environment
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

from refine_verl.plugin import CpuPlatform, PluginError, check_plugin

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def in_a_fresh_process(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in environment().items() if name != "VERL_PLATFORM"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**env, **variables}, capture_output=True, text=True, timeout=120)


@no_gpu
def test_importing_verl_alone_finds_the_cpu_platform() -> None:
    code = (
        "import verl, sys; from verl.utils.device import get_device_name, get_resource_name;"
        "from verl.plugin.platform.platform_manager import PlatformRegistry;"
        "print(get_device_name(), get_resource_name(), PlatformRegistry.get('cpu').__module__,"
        "'refine_verl.workers' in sys.modules, 'fla' in sys.modules)"
    )
    done = in_a_fresh_process(code)
    assert done.returncode == 0, done.stderr
    # nothing heavy is loaded: this happens in every process of every user of verl
    assert done.stdout.split()[-5:] == ["cpu", "CPU", "refine_verl.plugin", "False", "False"]


def test_the_entry_point_names_our_module() -> None:
    ours = [point for point in entry_points(group="verl.plugins") if point.value.startswith("refine_verl")]
    assert [point.load().__name__ for point in ours] == ["refine_verl.plugin"]


@no_gpu
def test_the_check_passes_here() -> None:
    assert check_plugin() == "cpu"


def test_another_class_under_our_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Intruder(PlatformBase):
        pass

    monkeypatch.setitem(PlatformRegistry._platforms, "cpu", Intruder)
    with pytest.raises(PluginError, match="platform 'cpu' is .*Intruder.*another plug-in has taken the name"):
        check_plugin()


@no_gpu
def test_a_cuda_platform_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What verl falls back to silently if our module does not load."""
    from verl.utils import device

    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    monkeypatch.setattr(device, "get_device_name", lambda: "cuda")
    with pytest.raises(PluginError, match="no GPU is visible.*VERL_PLATFORM=cpu"):
        check_plugin()


def test_the_platform_is_complete() -> None:
    """verl asks for all of this on the way; an abstract method left out would only fail in a worker."""
    platform = CpuPlatform()
    assert not CpuPlatform.__abstractmethods__
    assert platform.device_name == "cpu" and platform.communication_backend_name() == "gloo"
    assert platform.ray_resource_name() == "CPU" and platform.ray_resource_options(1.0) == {"num_cpus": 1}
    assert platform.is_platform_available() == (not torch.cuda.is_available())
    module = platform.device_module
    free, total = module.mem_get_info()
    assert 0 < free <= total and module.max_memory_allocated() >= 2**20
    assert torch.zeros(1).to(module.current_device()).device.type == "cpu"
    with platform.nvtx_range("step"):
        platform.synchronize()


def test_random_state_of_the_device_is_torchs() -> None:
    """verl saves and restores it with every checkpoint."""
    module = CpuPlatform().device_module
    state = module.get_rng_state()
    first = torch.rand(3)
    module.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_our_engine_is_the_one_verl_builds() -> None:
    from verl.workers.engine import EngineRegistry

    from refine_verl.plugin import ENGINE_MODEL_TYPE
    from refine_verl.workers.engine import RefineEngine

    for backend in ("fsdp", "fsdp2"):
        assert EngineRegistry.get_engine_cls(ENGINE_MODEL_TYPE, backend) is RefineEngine
