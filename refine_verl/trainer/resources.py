"""Placing workers on a Ray cluster, GPUs or not."""

from __future__ import annotations

import ray
from verl.single_controller.ray import RayResourcePool
from verl.utils.device import get_device_name, get_resource_name

from refine_verl.config import RunFailed


class ResourceError(RunFailed):
    """The cluster is too small for the run, or has become so."""


def worker_pool(per_node: int, nodes: int) -> RayResourcePool:
    """A place per GPU, or per CPU where there is no GPU, which a worker has for itself.

    Raises:
        ResourceError: the cluster has fewer.
    """
    resource, needed = get_resource_name(), per_node * nodes
    available = ray.cluster_resources().get(resource, 0)
    if available < needed:
        raise ResourceError(
            f"the Ray cluster has {available:g} {resource}s, the run asks for {needed} workers on "
            f"{get_device_name()} (trainer.n_gpus_per_node * trainer.nnodes); lower these or add nodes"
        )
    return RayResourcePool([per_node] * nodes, use_gpu=True, max_colocate_count=1, name_prefix="workers")
