"""Servers that write answers: which weights they have, what happens when one is lost. They are made up here."""

from __future__ import annotations

import asyncio
import logging
import pickle
import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zmq
from omegaconf import DictConfig, OmegaConf
from ray.exceptions import RayActorError, RayTaskError

from refine_verl.compose.acting_keys import SERVER_KEYS
from refine_verl.compose.composition import compose_config
from refine_verl.config import RunFailed
from refine_verl.nsp import generation_seeds
from refine_verl.trainer import servers as module
from refine_verl.trainer.posttrain import PosttrainTrainer, answers_in_rows
from refine_verl.trainer.servers import AnswerServers, ServerLost, Written, server_config
from refine_verl.workers import weight_link
from refine_verl.workers.weight_link import PatientSocket, ServerGone, Watch

REQUESTS = [("a", [5, 6, 7], {"max_tokens": 2}), ("b", [8], {"max_tokens": 3})]


def composed(*more: str) -> DictConfig:
    config = compose_config(["recipe=posttrain", "model=tiny_deltanet", "data.train_files=x", *more])
    OmegaConf.resolve(config)
    config.actor_rollout_ref.model.tokenizer_path = "/tokenizer"
    return config


@dataclass
class World:
    """verl's managers, client and workers in one: answers are the version of the weights, over and over.

    Attributes:
        events: what was asked of it.
        failures: exceptions that the next answers raise, one after the other.
        refusals: the same for weights.
        versions: of the weights that the next answers claim, where that is not the last one sent.
    """

    events: list[str] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    refusals: list[Exception] = field(default_factory=list)
    starts: list[Exception] = field(default_factory=list)
    versions: list[int | None] = field(default_factory=list)
    version: int | None = None
    server_handles: tuple[str, ...] = ("server",)

    def start(self, config: DictConfig, group: Any) -> tuple[Any, Any]:
        self.events.append("start")
        self.version = None
        if self.starts:
            raise self.starts.pop(0)
        return self, self

    def connect_servers(self, rollout: DictConfig, handles: Any) -> None:
        assert handles == self.server_handles

    def update_weights(self, global_steps: int) -> None:
        if self.refusals:
            raise self.refusals.pop(0)
        self.events.append(f"weights {global_steps}")
        self.version = global_steps

    def sleep_replicas(self) -> None:
        self.events.append("sleep")
        self.version = None

    def get_client(self) -> World:
        return self

    async def generate(self, name: str, prompt_ids: list[int], sampling_params: dict[str, Any]) -> Any:
        await asyncio.sleep(0)
        if self.failures and name == "a":
            raise self.failures.pop(0)
        version = self.versions.pop(0) if self.versions else self.version
        length = sampling_params["max_tokens"]
        extra = {"global_steps": version, "num_cached_tokens": None}
        return SimpleNamespace(token_ids=[version] * length, log_probs=[-0.5] * length, extra_fields=extra)


def dead() -> RayActorError:
    return RayActorError()


def remote(cause: Exception) -> RayTaskError:
    return RayTaskError("update_weights", "the traceback", cause)


def made(world: World, *more: str, restarts: int = 0) -> AnswerServers:
    servers = AnswerServers(composed(*more), world, limit=48, restarts=restarts, start=world.start)
    servers.start()
    return servers


def test_weights_are_sent_once_for_each_version() -> None:
    world = World()
    servers = made(world, "trainer.device=cpu")
    first = servers.write(REQUESTS, 1)
    assert first == servers.write(REQUESTS, 1)
    assert first == [Written([1, 1], [-0.5, -0.5], 1, 0), Written([1, 1, 1], [-0.5] * 3, 1, 0)]
    assert [answer.version for answer in servers.write(REQUESTS, 4)] == [4, 4]
    assert world.events == ["start", "weights 1", "weights 4"]


@pytest.mark.parametrize(("device", "sleeps"), [("cuda", True), ("cpu", False)])
def test_servers_sleep_between_uses_on_gpus(device: str, sleeps: bool) -> None:
    """Before their first use, too; and they forget weights, which are sent again although they have not changed."""
    world = World()
    servers = made(world, f"trainer.device={device}")
    for _ in range(2):
        with servers.in_use():
            servers.write(REQUESTS, 1)
            servers.write(REQUESTS, 1)
    asleep = ["start", "sleep", "weights 1", "sleep", "weights 1", "sleep"]
    assert world.events == (asleep if sleeps else ["start", "weights 1"])
    if sleeps:
        with servers.in_use():
            pass  # nothing was asked: they sleep already
        assert world.events == asleep


def test_servers_that_are_to_keep_their_memory_do() -> None:
    world = World()
    servers = made(world, "trainer.device=cuda", "actor_rollout_ref.rollout.free_cache_engine=false")
    with servers.in_use():
        servers.write(REQUESTS, 1)
    assert world.events == ["start", "weights 1"]


@pytest.mark.parametrize("other", [3, None])
def test_a_stale_server_is_noticed(other: int | None, caplog: pytest.LogCaptureFixture) -> None:
    """One of two answers was written with other weights."""
    world = World(versions=[4, other])
    with pytest.raises(ServerLost, match=f"is stale: it wrote with version {other} of the weights.* have version 4"):
        made(world).write(REQUESTS, 4)
    world = World(versions=[4, other])
    with caplog.at_level(logging.WARNING):
        answers = made(world, "trainer.device=cpu", restarts=1).write(REQUESTS, 4)
    assert [answer.version for answer in answers] == [4, 4] and "is stale" in caplog.text
    assert world.events == ["start", "weights 4", "start", "weights 4"]


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"failures": [dead()]}, "was lost: its process has ended"),
        ({"failures": [remote(RuntimeError("EngineCore encountered an issue"))]}, "EngineCore encountered an issue"),
        ({"refusals": [remote(ServerGone("its engine has ended"))]}, "while it was sent weights: its engine has ended"),
    ],
)
def test_a_lost_server_is_started_again_as_often_as_allowed(
    losses: dict[str, list[Exception]], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    def world(times: int) -> World:
        return World(**{name: list(errors) * times for name, errors in losses.items()})

    with pytest.raises(ServerLost, match=rf"{message}.*\(trainer.max_restarts=0\)"):
        made(world(1)).write(REQUESTS, 1)
    with caplog.at_level(logging.WARNING):
        assert len(made(world(2), restarts=2).write(REQUESTS, 1)) == 2
    assert caplog.text.count("It is started again") == 2
    with pytest.raises(ServerLost, match=rf"{message}.*after 1 restart\(s\) \(trainer.max_restarts=1\)"):
        made(world(2), restarts=1).write(REQUESTS, 1)


def test_a_lost_training_worker_is_no_lost_server() -> None:
    """It ends the attempt, and the run resumes from its checkpoint."""
    for error in (dead(), remote(ValueError("a bug"))):
        with pytest.raises(type(error)) as raised:
            made(World(refusals=[error]), restarts=5).write(REQUESTS, 1)
        assert raised.value is error


def test_lost_servers_are_gone_before_others_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them and the balancer; ended a second time, there is nothing to end."""

    class Actor(SimpleNamespace):
        @property
        def __ray_ready__(self) -> Any:
            return SimpleNamespace(remote=lambda: self.name)

    def get(name: str, timeout: float) -> None:
        world.events.append(f"{name} is gone")
        raise dead()

    world = World(failures=[dead()])
    world.get_replicas = lambda: [
        SimpleNamespace(servers=[Actor(name="a")]),
        SimpleNamespace(servers=[Actor(name="b")]),
    ]
    world.global_load_balancer = Actor(name="c")
    monkeypatch.setattr(module.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(module.ray, "kill", lambda actor, no_restart: world.events.append(f"kill {actor.name}"))
    monkeypatch.setattr(module.ray, "get", get)
    servers = made(world, "trainer.device=cpu", restarts=1)
    servers.write(REQUESTS, 1)
    ends = ["kill a", "kill b", "kill c", "a is gone", "b is gone", "c is gone"]
    assert world.events == ["start", "weights 1", *ends, "start", "weights 1"]
    assert len(servers.end()) == 3 and servers.end() == []


def test_what_an_import_does_to_logging_is_undone() -> None:
    """vLLM's sets levels to ERROR, and warnings of lost servers would not be seen."""
    handler = logging.StreamHandler()
    logging.root.addHandler(handler)
    before = logging.root.level
    try:
        with module.logging_as_it_is():
            logging.root.setLevel(logging.CRITICAL)
            handler.setLevel(logging.CRITICAL)
        assert (logging.root.level, handler.level) == (before, logging.NOTSET)
    finally:
        logging.root.removeHandler(handler)


def test_servers_that_do_not_start() -> None:
    failing = remote(ValueError("Available memory on node 0 is less than desired"))
    with pytest.raises(RunFailed, match="did not start .ValueError: Available memory .* refine.answers.engine=own"):
        made(World(starts=[failing]))
    world = World(failures=[dead()])
    servers = made(world, restarts=1)
    world.starts.append(failing)
    with pytest.raises(ServerLost, match="did not start"):
        servers.write(REQUESTS, 1)


def test_what_verl_is_told() -> None:
    more = ("data.seed=7", "+actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes=100")
    config = composed("trainer.device=cuda", "trainer.n_gpus_per_node=4", *more)
    told = server_config(config, limit=48).actor_rollout_ref.rollout
    assert (told.name, told.load_format, told.max_model_len, told.seed) == ("vllm", "dummy", 48, 7)
    assert told.enable_sleep_mode and told.free_cache_engine and told.n_gpus_per_node == 4
    assert told.engine_kwargs.vllm == {"kv_cache_memory_bytes": 100, "tokenizer": "/tokenizer"}
    assert config.actor_rollout_ref.rollout.name == "nsp"  # a copy
    told = server_config(composed("trainer.device=cpu", "actor_rollout_ref.rollout.max_model_len=99"), limit=48)
    rollout = told.actor_rollout_ref.rollout
    assert not rollout.enable_sleep_mode and not rollout.free_cache_engine and rollout.max_model_len == 99
    lora = ("lora_rank=4", "lora_adapter_path=/adapter")
    config = composed("trainer.device=cpu", *(f"actor_rollout_ref.model.{key}" for key in lora))
    told = server_config(config, limit=48).actor_rollout_ref.model
    # adapters come with the weights: a server that knew of one would wait for it
    assert (told.lora_rank, told.lora_adapter_path) == (0, None) and config.actor_rollout_ref.model.lora_rank == 4


KEYS_OF_SERVERS = {
    "tensor_model_parallel_size": 2,
    "gpu_memory_utilization": 0.25,
    "free_cache_engine": False,
    "max_model_len": 99,
    "max_num_seqs": 7,
    "max_num_batched_tokens": 512,
    "enable_prefix_caching": False,
    "enable_chunked_prefill": False,
    "enforce_eager": True,
    "cudagraph_capture_sizes": [1, 2],
    "checkpoint_engine.update_weights_bucket_megabytes": 3,
    "engine_kwargs.vllm": {"kv_cache_memory_bytes": 100},
}


def test_every_key_of_servers_arrives() -> None:
    """As verl reads them. The control: none of them is a default."""
    from verl.utils.config import omega_conf_to_dataclass

    assert set(SERVER_KEYS) == {f"actor_rollout_ref.rollout.{name}" for name in KEYS_OF_SERVERS}
    config = composed("trainer.device=cuda")
    plain = OmegaConf.select(config, "actor_rollout_ref.rollout")
    assert all(OmegaConf.select(plain, name) != value for name, value in KEYS_OF_SERVERS.items())
    for name, value in KEYS_OF_SERVERS.items():
        OmegaConf.update(config, f"actor_rollout_ref.rollout.{name}", value, force_add=True)
    told = omega_conf_to_dataclass(server_config(config, limit=48).actor_rollout_ref.rollout)
    for name, value in KEYS_OF_SERVERS.items():
        found: Any = told
        for part in name.split("."):
            found = found[part] if isinstance(found, dict) else getattr(found, part)
        if name == "engine_kwargs.vllm":
            found = {key: found[key] for key in value}
        assert found == value, name


# The trainer


def test_answers_in_rows() -> None:
    written = [Written([n] * n, [-float(n)] * n, 3, 0) for n in (1, 2, 3, 1)]
    rows = answers_in_rows(written, samples=2, width=4)
    assert rows["answer_tokens"].tolist() == [[[1, 0, 0, 0], [2, 2, 0, 0]], [[3, 3, 3, 0], [1, 0, 0, 0]]]
    assert rows["answer_lengths"].tolist() == [[1, 2], [3, 1]] and rows["weights_version"].tolist() == [[3, 3], [3, 3]]
    assert rows["old_log_probs"][1].tolist() == [[-3, -3, -3, 0], [-1, 0, 0, 0]]


class Ended(Exception):
    """A checkpoint was written."""


def trainer(world: World | None, **more: Any) -> Any:
    """A trainer that is not set up."""
    made_up = PosttrainTrainer.__new__(PosttrainTrainer)
    servers = None if world is None else made(world, "trainer.device=cpu")
    config = SimpleNamespace(data=SimpleNamespace(seed=5))
    parts = {"servers": servers, "servers_lost": None, "weights_version": 6, "config": config, "global_steps": 2}
    made_up.__dict__.update({**parts, "stop_tokens": (9,), "run_dir": "/run"} | more)
    return made_up


COLUMNS = {
    "prompt_ids": [torch.tensor([1, 2, 3]), torch.tensor([4])],
    "answer_ids": [torch.tensor([1]), torch.tensor([1])],
    "document_id": [70, 71],
    "max_new_tokens": [2, 4],
}


def test_what_servers_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """n requests to each prompt, without its padding, up to its own limit, with seeds of their own."""
    world, asked = World(), []
    made_up = trainer(world)
    write = made_up.servers.write
    made_up.servers.write = lambda requests, version: asked.extend(requests) or write(requests, version)
    answers, forward_tokens = made_up.answer(COLUMNS, samples=2, temperature=0.7)
    assert [tokens for _, tokens, _ in asked] == [[1, 2, 3], [1, 2, 3], [4], [4]]
    assert len({name for name, _, _ in asked}) == 2  # one server reads a prompt
    assert [parameters["max_tokens"] for _, _, parameters in asked] == [2, 2, 4, 4]
    seeds = [parameters["seed"] for _, _, parameters in asked]
    assert seeds == [*generation_seeds(5, 2, 70, 2), *generation_seeds(5, 2, 71, 2)] and len(set(seeds)) == 4
    expected = {"temperature": 0.7, "stop_token_ids": [9], "ignore_eos": True, "logprobs": True}
    assert all(expected.items() <= parameters.items() for _, _, parameters in asked)
    assert (
        answers["answer_lengths"].tolist() == [[2, 2], [4, 4]]
        and answers["answer_tokens"][0, 0].tolist() == [6] * 2 + [0] * 2
    )
    assert forward_tokens == 3 + 3 + 1 + 1 + 1 + 1 + 3 + 3


def test_seeds_are_a_function_of_step_and_prompt() -> None:
    seeds = generation_seeds(5, 2, 70, 4)
    assert seeds[:2] == generation_seeds(5, 2, 70, 2) and len(set(seeds)) == 4
    assert all(0 <= seed < 2**53 for seed in seeds)
    assert seeds != generation_seeds(5, 3, 70, 4) != generation_seeds(6, 3, 70, 4)


def test_the_step_is_finished_without_servers_and_the_run_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parent = PosttrainTrainer.__mro__[1]
    monkeypatch.setattr(parent, "answer", lambda *_, **how: ("own", how))
    saved: list[int] = []
    world = World()
    made_up = trainer(world, _save_checkpoint=lambda: saved.append(2))
    world.refusals.append(remote(ServerGone("its engine has ended")))
    with caplog.at_level(logging.WARNING):
        assert made_up.answer(COLUMNS, samples=2, temperature=1.0) == ("own", {"samples": 2, "temperature": 1.0})
    assert "The training workers write what is left of this step" in caplog.text and made_up.servers is None
    for already, writes in ((True, []), (False, [2])):
        with pytest.raises(ServerLost, match="Step 2 .* saved in /run/global_step_2; the same command resumes"):
            made_up._stop_if_asked(already)
        assert saved == writes


@pytest.mark.parametrize(("gap", "warned"), [(0.1, False), (0.2, True), (float("nan"), True)])
def test_a_gap_is_warned_about(gap: float, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    made_up = trainer(None, settings=SimpleNamespace(answers=SimpleNamespace(gap_warning=0.15)))
    with caplog.at_level(logging.WARNING):
        made_up._warn_of_gap({"answers/log_prob_gap/mean": gap, "answers/log_prob_gap/max": 3.0})
        made_up._warn_of_gap({"answer/log_prob_gap": 9.0})  # of answers that the workers wrote
    assert (caplog.text.count("refine.answers.gap_warning=0.15") == 1) == warned and (
        "at most 3.000" in caplog.text
    ) == warned


# Weights


@pytest.fixture
def pair(tmp_path: Any) -> Any:
    """A sender's socket and its address."""
    context = zmq.Context()
    socket = context.socket(zmq.REQ)
    address = f"ipc://{tmp_path / 's'}"
    socket.bind(address)
    yield socket, address
    socket.close(0)
    context.term()


def answers_once(address: str) -> threading.Thread:
    def receive() -> None:
        context = zmq.Context()
        socket = context.socket(zmq.REP)
        socket.connect(address)
        socket.send(pickle.dumps(("taken", pickle.loads(socket.recv()))))
        socket.close(1000)
        context.term()

    thread = threading.Thread(target=receive)
    thread.start()
    return thread


def test_a_sender_waits_for_its_peer(pair: Any) -> None:
    socket, address = pair
    patient = PatientSocket(socket, lambda: None)
    thread = answers_once(address)
    patient.send_pyobj({"a": 1})
    assert pickle.loads(patient.recv()) == ("taken", {"a": 1})
    thread.join()


@pytest.mark.parametrize("sent", [False, True])
def test_a_sender_does_not_wait_for_a_peer_that_is_gone(pair: Any, sent: bool) -> None:
    """Before anybody took the message, and after it was taken and not answered."""
    socket, address = pair
    gone: list[str] = []
    patient = PatientSocket(socket, lambda: gone[0] if gone else None)
    context = zmq.Context()
    peer = context.socket(zmq.REP)
    if sent:
        peer.connect(address)
        patient.send_pyobj("a piece")
        peer.recv()
        peer.close(0)
    gone.append("its engine has ended")
    started = time.monotonic()
    with pytest.raises(ServerGone, match="its engine has ended"):
        patient.recv() if sent else patient.send_pyobj("a piece")
    assert time.monotonic() - started < 5
    peer.close(0)
    context.term()


def test_patience_ends(pair: Any) -> None:
    with pytest.raises(ServerGone, match="took no weights for 0 s"):
        PatientSocket(pair[0], lambda: None, patience=0.1).send_pyobj("a piece")


def test_watching_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not done; done too early; refused; alive and dead."""
    state: dict[str, Any] = {"done": False, "result": None, "alive": True}

    def get(what: str, timeout: float | None = None) -> Any:
        if what == "alive":
            return state["alive"]
        if isinstance(state["result"], Exception):
            raise state["result"]

    monkeypatch.setattr(weight_link.ray, "wait", lambda refs, timeout: (refs, []) if state["done"] else ([], refs))
    monkeypatch.setattr(weight_link.ray, "get", get)
    server = SimpleNamespace(alive=SimpleNamespace(remote=lambda: "alive"))
    watch = Watch("received", server)
    assert Watch(None, None).why_gone() is None and watch.why_gone() is None
    watch.looked -= 100
    assert watch.why_gone() is None
    state["alive"] = False
    assert watch.why_gone() is None  # not asked each time
    watch.looked -= 100
    assert watch.why_gone() == "its engine has ended"
    state["done"] = True
    assert watch.why_gone() == "it stopped receiving before all weights were sent"
    state["result"] = remote(ValueError("lm_head.bias: has no such weight"))
    assert watch.why_gone() == "ValueError: lm_head.bias: has no such weight"
    state["result"] = dead()
    assert "RayActorError" in str(watch.why_gone()) or "ActorDied" in str(watch.why_gone())


def test_a_client_that_fails_leaves_no_request_behind() -> None:
    ended: list[str] = []

    class Client:
        async def generate(self, name: str, **_: Any) -> None:
            if name == "b":
                raise dead()
            try:
                await asyncio.sleep(60)
            finally:
                ended.append(name)

    with pytest.raises(RayActorError):
        asyncio.run(module._all_answers(Client(), REQUESTS))
    assert ended == ["a"]
