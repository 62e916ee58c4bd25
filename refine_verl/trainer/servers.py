"""vLLM servers beside the training workers, which write answers: started, sent weights, asked, and ended.

verl's `LLMServerManager` starts them, its `CheckpointEngineManager` sends weights and lets them sleep, its
`LLMServerClient` asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from omegaconf import DictConfig, open_dict
from ray.exceptions import RayActorError, RayError, RayTaskError
from verl.single_controller.ray import RayWorkerGroup

from refine_verl.config import RunFailed
from refine_verl.workers.weight_link import ServerGone, first_line

logger = logging.getLogger(__name__)

SECONDS_TO_END = 30.0
"""So long a killed server may take before others are started in its place."""

Request = tuple[str, list[int], dict[str, Any]]
"""Which prompt, its tokens, and what `vllm.SamplingParams` takes."""


class ServerLost(RunFailed):
    """A server died, or wrote with other weights than it should have, once more than restarts are allowed."""


@dataclass(frozen=True)
class Written:
    """One answer of a server.

    Attributes:
        tokens: of the answer, a stop token included.
        log_probs: of each, of the distribution it was drawn from.
        version: of the weights that wrote it.
        cached: tokens of the prompt that the server had read before.
    """

    tokens: list[int]
    log_probs: list[float]
    version: int | None
    cached: int


class AnswerServers:
    """The servers of a run.

    Args:
        config: the run's, resolved.
        group: the training workers, which send the weights.
        limit: tokens of the longest prompt with its answer.
        restarts: so many losses of a server are made good.
        start: starts servers and returns verl's two managers, of servers and of weights; replaced in tests.
    """

    def __init__(
        self,
        config: DictConfig,
        group: RayWorkerGroup,
        limit: int,
        restarts: int,
        start: Callable[[DictConfig, RayWorkerGroup], tuple[Any, Any]] | None = None,
    ) -> None:
        self.config, self.group = server_config(config, limit), group
        self.left = self.allowed = restarts
        self._start = start or _start
        self.version: int | None = None  # of the weights that all servers have
        self.manager: Any = None
        self.sender: Any = None

    @property
    def sleeps(self) -> bool:
        """Whether servers give their memory back between uses."""
        return bool(self.config.actor_rollout_ref.rollout.free_cache_engine)

    def start(self) -> None:
        """Start a server for each replica; it waits for weights.

        Raises:
            RunFailed: one did not come up.
        """
        try:
            self.manager, self.sender = self._start(self.config, self.group)
        except RayError as error:
            raise RunFailed(
                f"vLLM's server did not start ({first_line(error)}). Its log is in Ray's session directory; "
                "refine.answers.engine=own does without it."
            ) from error
        self.group.connect_servers(self.config.actor_rollout_ref.rollout, self.manager.server_handles)
        self.version = None
        if self.sleeps:
            self.sender.sleep_replicas()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Servers keep their memory for as long as this lasts."""
        try:
            yield
        finally:
            if self.sleeps and self.version is not None:
                self.version = None  # a sleeping server forgets its weights
                try:
                    self.sender.sleep_replicas()
                except RayError as error:
                    logger.warning("vLLM's servers do not give their memory back (%s)", first_line(error))

    def write(self, requests: Sequence[Request], version: int) -> list[Written]:
        """Answers to all requests, written with the weights that the workers have.

        Args:
            requests: see `Request`; equal names go to one server, which reads the prompt once.
            version: of the workers' weights; they are sent first where the servers have others.

        Raises:
            ServerLost: after as many restarts as are allowed.
        """
        while True:
            try:
                self._bring_up_to_date(version)
                return self._ask(requests, version)
            except ServerLost as lost:
                if self.left == 0:
                    tried = f" after {self.allowed} restart(s)" if self.allowed else ""
                    raise ServerLost(f"{lost}{tried} (trainer.max_restarts={self.allowed})") from lost
                self.left -= 1
                logger.warning("%s. It is started again (%d more times)", lost, self.left)
                self._restart()

    def _restart(self) -> None:
        for actor in self.end():
            _wait_until_gone(actor)  # or the next ones would find its memory taken
        try:
            self.start()
        except RunFailed as error:
            raise ServerLost(f"{error}") from error

    def _bring_up_to_date(self, version: int) -> None:
        if self.version == version:
            return
        try:
            self.sender.update_weights(global_steps=version)
        except RayTaskError as error:
            if isinstance(error.cause, ServerGone):
                raise ServerLost(f"a vLLM server was lost while it was sent weights: {error.cause}") from error
            raise
        self.version = version

    def _ask(self, requests: Sequence[Request], version: int) -> list[Written]:
        try:
            outputs = asyncio.run(_all_answers(self.manager.get_client(), requests))
        except RayError as error:
            raise ServerLost(f"a vLLM server was lost: {_how(error)}") from error
        written = [_written(output) for output in outputs]
        other = sorted({str(answer.version) for answer in written if answer.version != version})
        if other:
            self.version = None
            raise ServerLost(
                f"a vLLM server is stale: it wrote with version {', '.join(other)} of the weights, and the workers "
                f"have version {version}"
            )
        return written

    def end(self) -> list[Any]:
        """Kill all servers' processes, and return what Ray knows them by."""
        manager, self.manager, self.version = self.manager, None, None
        if manager is None or not ray.is_initialized():
            return []
        actors = [server for replica in manager.get_replicas() for server in replica.servers]
        actors.append(manager.global_load_balancer)
        for actor in actors:
            ray.kill(actor, no_restart=True)
        return actors


def server_config(config: DictConfig, limit: int) -> DictConfig:
    """The run's configuration as verl's servers are to read it.

    Args:
        config: the run's, resolved. Not changed.
        limit: tokens of the longest prompt with its answer.
    """
    config = copy.deepcopy(config)
    rollout = config.actor_rollout_ref.rollout
    with open_dict(config):
        rollout.name, rollout.mode, rollout.load_format = "vllm", "async", "dummy"
        # what adapters add comes with the weights
        model = config.actor_rollout_ref.model
        model.lora_rank, model.lora_adapter_path = 0, None
        rollout.max_model_len = rollout.max_model_len or limit
        rollout.n_gpus_per_node = config.trainer.n_gpus_per_node
        rollout.seed = config.data.seed
        # of each answer, what it was drawn with is said: these are only vLLM's defaults
        rollout.temperature, rollout.n = 1.0, 1
        rollout.prompt_length = rollout.response_length = rollout.max_model_len
        if not rollout.enable_chunked_prefill:  # a prompt is read at once
            rollout.max_num_batched_tokens = max(rollout.max_num_batched_tokens, rollout.max_model_len)
        engine = dict(rollout.engine_kwargs.vllm or {})
        engine.setdefault("tokenizer", model.tokenizer_path)
        rollout.engine_kwargs.vllm = engine
        if config.trainer.device == "cpu":
            rollout.free_cache_engine = rollout.enable_sleep_mode = False
        else:
            rollout.enable_sleep_mode = rollout.free_cache_engine
    return config


def sampling_parameters(stop_tokens: Sequence[int], *, temperature: float, limit: int, seed: int) -> dict[str, Any]:
    """What verl's server is told of one answer.

    Args:
        stop_tokens: ids that end it, as in the workers, whatever the server's tokenizer takes for the end.
        temperature: 0 takes the most likely token.
        limit: most tokens.
        seed: of its random numbers.
    """
    ends = {"ignore_eos": True, "stop_token_ids": list(stop_tokens), "max_tokens": limit}
    return {**ends, "temperature": temperature, "seed": seed, "logprobs": True, "detokenize": False}


@contextmanager
def logging_as_it_is() -> Iterator[None]:
    """What vLLM says and changes while it is imported stays within; servers keep levels of their own.

    Importing it sets the level of the root logger and its handlers to ERROR, and asks for torchvision.
    """
    from transformers.utils import logging as of_transformers

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    loud: list[Any] = [logging.root, *logging.root.handlers]
    levels = [item.level for item in loud]
    verbosity = of_transformers.get_verbosity()
    of_transformers.set_verbosity_error()
    try:
        yield
    finally:
        of_transformers.set_verbosity(verbosity)
        for item, level in zip(loud, levels, strict=True):
            item.setLevel(level)


def _wait_until_gone(actor: Any) -> None:
    try:
        ray.get(actor.__ray_ready__.remote(), timeout=SECONDS_TO_END)
    except RayError:  # that it is dead; or a timeout, and the start says what is missing
        return


def _start(config: DictConfig, group: RayWorkerGroup) -> tuple[Any, Any]:
    with logging_as_it_is():
        from verl.checkpoint_engine.base import CheckpointEngineManager
        from verl.utils.config import omega_conf_to_dataclass

        from refine_verl.workers.vllm_server import AnswerServerManager

    with contextlib.redirect_stdout(io.StringIO()):  # verl prints addresses
        manager = AnswerServerManager.create(config=config, worker_group=group)
    transfer = omega_conf_to_dataclass(config.actor_rollout_ref.rollout.checkpoint_engine)
    return manager, CheckpointEngineManager(transfer, group, manager.get_replicas())


async def _all_answers(client: Any, requests: Sequence[Request]) -> list[Any]:
    asked = [
        asyncio.ensure_future(client.generate(name, prompt_ids=tokens, sampling_params=parameters))
        for name, tokens, parameters in requests
    ]
    try:
        return list(await asyncio.gather(*asked))
    except BaseException:
        for one in asked:
            one.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        raise


def _written(output: Any) -> Written:
    return Written(
        tokens=list(output.token_ids),
        log_probs=list(output.log_probs or []),
        version=output.extra_fields.get("global_steps"),
        cached=int(output.extra_fields.get("num_cached_tokens") or 0),
    )


def _how(error: RayError) -> str:
    return "its process has ended" if isinstance(error, RayActorError) else first_line(error)
