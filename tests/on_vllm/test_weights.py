"""Weights that change while vLLM serves: sent in pieces by verl's sender, taken by the extension of a run's servers."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.on_vllm import MODELS, engine, gap, generate, prompts, write_model
from safetensors.torch import load_file

from refine_verl.models.loading import load_model
from refine_verl.serving.distribution import answer_to_vllm, installed_vllm
from refine_verl.trainer.servers import sampling_parameters

answer_to_vllm()

EXTENSION = "refine_verl.workers.vllm_extension.AnswerWorkerExtension"
BOUND = 0.08  # as of test_log_probs


def send(llm: Any, weights: list[tuple[str, torch.Tensor]], address: str) -> int:
    """Send them through a buffer of 1 MB; returns in how many pieces they went."""
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    sender = BucketedWeightSender(address, bucket_size_mb=1, use_shm=True)
    pieces: list[int] = []
    begin = sender._init_socket

    def counting() -> None:
        begin()
        socket = sender.socket
        sender.socket = type(
            "Counting",
            (),
            {
                "send_pyobj": lambda _, message: (pieces.append(1), socket.send_pyobj(message)),
                "recv": lambda _: socket.recv(),
                "close": lambda _: socket.close(0),
            },
        )()

    sender._init_socket = counting
    thread = threading.Thread(target=lambda: asyncio.run(sender.async_send_weights(iter(weights))))
    thread.start()
    llm.collective_rpc("update_weights_from_ipc", kwargs={"use_shm": True})
    thread.join(60)
    llm.reset_prefix_cache()
    return len(pieces) - 1  # the first says where the buffer is


@pytest.mark.parametrize("name", ["delta_gate_tied", "gated_grouped"])
def test_weights_that_change(name: str, directories: dict[str, Path], tmp_path: Path) -> None:
    """A server with random weights follows one model, then another; the other one is far off each time."""
    second = write_model(tmp_path / "second", **MODELS[name], seed=4)
    with engine(directories[name], load_format="dummy", worker_extension_cls=EXTENSION, seed=1) as llm:
        [address] = llm.collective_rpc("_get_zmq_handle")
        models = {directory: load_model(directory) for directory in (directories[name], second)}
        for directory, other in ((directories[name], second), (second, directories[name])):
            weights = list(load_file(directory / "model.safetensors").items())
            assert send(llm, weights, address) > 2
            answers = generate(llm, prompts())
            assert gap(answers, models[directory]) < BOUND < gap(answers, models[other]) / 5
        check_sampling(llm)


def check_sampling(llm: Any) -> None:
    """As servers are asked: up to the limit, or to a stop token, which counts; the same seed writes the same."""
    from vllm import SamplingParams

    def answer(*stop_tokens: int, **how: Any) -> list[int]:
        told = sampling_parameters(stop_tokens, **{"temperature": 1.0, "limit": 9, "seed": 1, **how}) | {"logprobs": 0}
        [output] = llm.generate([{"prompt_token_ids": prompts()[1]}], SamplingParams(**told), use_tqdm=False)
        assert len(output.outputs[0].logprobs) == len(output.outputs[0].token_ids)
        return list(output.outputs[0].token_ids)

    first = answer()
    assert len(first) == 9 and answer(limit=4) == first[:4] and answer() == first != answer(seed=2)
    end = first.index(first[3]) + 1
    assert answer(first[3]) == first[:end]
    assert answer(temperature=0.0) == answer(temperature=0.0, seed=2)


def test_verl_finds_a_vllm() -> None:
    from importlib.metadata import version

    found = installed_vllm()
    assert found is not None and version("vllm").partition("+")[0] == found[1].partition("+")[0]
