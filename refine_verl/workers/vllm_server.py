"""verl's vLLM servers as a run uses them: on CPUs, too, and for models without positions. Needs vLLM."""

from __future__ import annotations

import os
import secrets
from typing import Any
from uuid import uuid4

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from refine_verl.serving.configs import register_configs
from refine_verl.serving.distribution import answer_to_vllm
from refine_verl.serving.parent import ENDS_WITH_PARENT

answer_to_vllm()  # or verl's package for vLLM would not be found to be installed

from verl.utils.device import get_device_name  # noqa: E402
from verl.workers.rollout.llm_server import LLMServerManager  # noqa: E402
from verl.workers.rollout.router import GlobalRequestLoadBalancer  # noqa: E402
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica  # noqa: E402


class AnswerServer(vLLMHttpServer):
    """One server, beside the training workers whose devices it shares."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        register_configs()
        os.environ[ENDS_WITH_PARENT] = str(os.getpid())
        # answers are asked for through Ray; nobody else is to use the HTTP side that vLLM opens beside it
        os.environ["VLLM_API_KEY"] = secrets.token_hex(32)
        super().__init__(*arguments, **named)

    def _validate_configs(self) -> None:
        """Nothing: the length was checked before the run, and a state has no positions that would bound it."""

    def _get_worker_extension_cls(self) -> str:
        return "refine_verl.workers.vllm_extension.AnswerWorkerExtension"

    async def alive(self) -> bool:
        """Whether the engine's processes are there."""
        return not self.engine.errored


class AnswerReplica(vLLMReplica):
    """Servers under names of their own, so that one that was lost does not stand in the way of the next one's."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named, name_suffix=uuid4().hex[:8])
        # it works on the devices of the training workers, which have been counted
        self.server_class = ray.remote(num_cpus=0)(AnswerServer)

    async def launch_servers(self) -> None:
        """verl's with GPUs; without, the same for the one server of a replica, since CPUs have no ids."""
        if get_device_name() != "cpu":
            await super().launch_servers()
            return
        node = await self.workers[0].__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())
        threads = await self.workers[0].__ray_call__.remote(lambda worker: worker.settings.threads)
        environment = {"OMP_NUM_THREADS": str(threads)}
        if "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:  # several servers would be bound to the same cores
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        server = self.server_class.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False),
            runtime_env={"env_vars": environment},
            name=f"{self._get_server_name_prefix()}server_{self.replica_rank}_0{self.name_suffix}",
            max_concurrency=self.max_concurrency,
        ).remote(
            config=self.config,
            model_config=self.model_config,
            rollout_mode=self.rollout_mode,
            workers=self.workers,
            replica_rank=self.replica_rank,
            node_rank=0,
            gpus_per_node=1,
            nnodes=1,
            cuda_visible_devices="",
        )
        self.servers.append(server)
        await server.launch_server.remote()
        address, port = await server.get_server_address.remote()
        self._server_handle, self._server_address = server, f"{address}:{port}"


class AnswerServerManager(LLMServerManager):
    """verl's manager of these servers."""

    rollout_replica_class = AnswerReplica

    async def _init_global_load_balancer(self) -> None:
        """As verl's default one, without a CPU of its own, which a cluster may not have left."""
        servers = dict(zip(self.server_addresses, self.server_handles, strict=True))
        self.global_load_balancer = ray.remote(num_cpus=0)(GlobalRequestLoadBalancer).remote(servers=servers)
