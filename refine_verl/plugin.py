"""What verl discovers of us, and the only list of doors we use into verl.

verl loads this module in every process through the entry-point group ``verl.plugins``; it must stay light. It adds
the one thing verl lacks for a laptop: a CPU platform (gloo, FSDP2, one Ray CPU per worker). Engines are registered
by ``refine_verl.workers.engine`` when a worker imports it.

Doors into verl 0.9.1 (all public registries or subclassing; nothing is patched):

=====================================================  =====================================================
door                                                   used by
=====================================================  =====================================================
``verl.plugins`` entry point, ``PlatformRegistry``     this module: platform ``cpu``
``EngineRegistry`` (model type ``refine_lm``)          ``workers.engine.RefineEngine``
``TrainingWorker`` (subclass)                          ``workers.worker.NSPRolloutWorker``
``PPOTrainer`` of trainer v1 (subclass)                ``trainer.refine_trainer.RefineTrainer``
``RayResourcePool``, ``RayWorkerGroup`` (called)       ``trainer.refine_trainer``
``LLMServerManager``, ``CheckpointEngineManager``      ``trainer.servers``, ``workers.vllm_server``
``vLLMHttpServer`` and its extension (subclasses)      ``workers.vllm_server``, ``workers.vllm_extension``
``ServerAdapter`` (called)                             ``workers.weight_link``
``data.custom_cls``                                    ``data.verl_dataset``
advantage and policy-loss registries (called)          ``workers.advantage``, ``workers.loss``
=====================================================  =====================================================
"""

from __future__ import annotations

import os
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

from refine_verl.config import RunFailed

ENGINE_MODEL_TYPE = "refine_lm"
"""Model type our engine is registered under; ``language_model`` belongs to verl's own engine."""


def _peak_memory(*_: Any) -> int:
    """Peak resident memory of this process in bytes: what a device's peak allocation is on a GPU."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _used_memory(*_: Any) -> int:
    import psutil

    return psutil.Process().memory_info().rss


def _memory_info(*_: Any) -> tuple[int, int]:
    import psutil

    memory = psutil.virtual_memory()
    return memory.available, memory.total


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _cpu_device_module() -> types.ModuleType:
    """The ``torch.cuda`` that verl expects, for the CPU; ``torch.cpu`` lacks most of it."""
    module = types.ModuleType("refine_verl.plugin.cpu_device")
    module.__dict__.update(
        is_available=lambda: True,
        # verl hands this to Tensor.to; an index would mean an accelerator
        current_device=lambda: "cpu",
        device_count=lambda: os.cpu_count() or 1,
        set_device=_nothing,
        synchronize=_nothing,
        empty_cache=_nothing,
        manual_seed=torch.manual_seed,
        manual_seed_all=torch.manual_seed,
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
        get_device_name=lambda *_: "CPU",
        memory_allocated=_used_memory,
        memory_reserved=_used_memory,
        max_memory_allocated=_peak_memory,
        max_memory_reserved=_peak_memory,
        reset_peak_memory_stats=_nothing,
        set_per_process_memory_fraction=_nothing,
        mem_get_info=_memory_info,
        Stream=torch.cpu.Stream,
        current_stream=torch.cpu.current_stream,
        stream=torch.cpu.stream,
    )
    return module


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    """verl on hosts without an accelerator. Chosen by verl's own detection when no other platform is there."""

    _device_module = _cpu_device_module()

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> types.ModuleType:
        return self._device_module

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return not torch.cuda.is_available()

    def current_device(self) -> Any:
        return "cpu"

    def device_count(self) -> int:
        return os.cpu_count() or 1

    def set_device(self, device_index: int) -> None:
        return None

    def synchronize(self, device_index: int | None = None) -> None:
        return None

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        return None

    def empty_cache(self) -> None:
        return None

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        return None

    def profiler_stop(self) -> None:
        return None

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
        # A whole core each: Ray sizes a worker's thread pools by its number of CPUs.
        return {"num_cpus": 1}

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


class PluginError(RunFailed):
    """verl does not see our platform or engine; the message says why and what to do."""


def check_plugin() -> str:
    """Check that the names we rely on really resolve to our objects in this process.

    verl swallows errors while loading a plug-in and silently falls back to CUDA, so this is asked at start-up.

    Returns:
        verl's device name, ``cpu`` or ``cuda``.

    Raises:
        PluginError: a name resolves to something else.
    """
    from verl.utils.device import get_device_name

    platform = PlatformRegistry.get("cpu")
    if platform is not CpuPlatform:
        raise PluginError(f"verl's platform 'cpu' is {platform}, not ours: another plug-in has taken the name")
    device = get_device_name()
    if device == "cuda" and not torch.cuda.is_available() and "VERL_PLATFORM" not in os.environ:
        raise PluginError(
            "verl chose the CUDA platform but no GPU is visible. Another verl plug-in may have been loaded first; "
            "set VERL_PLATFORM=cpu to run without a GPU."
        )
    return device
