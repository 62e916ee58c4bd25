"""Placing workers on a Ray cluster, GPUs or not."""

from __future__ import annotations

from typing import Any

import ray
from verl.single_controller.ray import ResourcePoolManager
from verl.utils.device import get_device_name, get_resource_name

from refine_verl.config import RunFailed


class ResourceError(RunFailed):
    """The cluster is too small for the run, or has become so."""


class WorkerPoolManager(ResourcePoolManager):
    """One worker per GPU, or per CPU where there is no GPU (verl's own counts only GPUs and NPUs)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # a single worker group lives here, so each process gets its device whole
        self.max_colocate_count = 1

    def _check_resource_available(self) -> None:
        resource = get_resource_name()
        available = ray.cluster_resources().get(resource, 0)
        needed = self.get_n_gpus()
        if available < needed:
            raise ResourceError(
                f"the Ray cluster has {available:g} {resource}s, the run asks for {needed} workers on "
                f"{get_device_name()} (trainer.n_gpus_per_node * trainer.nnodes); lower these or add nodes"
            )
