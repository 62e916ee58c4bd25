"""What needs vLLM: `make test-vllm`, in an environment that has it; elsewhere nothing is collected here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from reference.on_vllm import MODELS, Answer, Serve, engine, generate, prompts, write_model

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {name: write_model(base / name, **config) for name, config in MODELS.items()}


@pytest.fixture(scope="session")
def serve(directories: dict[str, Path]) -> Serve:
    """``serve(name, batches, **arguments)``: greedy answers of a fresh engine to batches of prompts."""
    kept: dict[str, list[list[Answer]]] = {}

    def answers(name: str, batches: list[list[list[int]]] | None = None, **arguments: Any) -> list[list[Answer]]:
        key = repr((name, batches, sorted(arguments.items())))
        if key not in kept:
            with engine(directories[name], **arguments) as llm:
                kept[key] = [generate(llm, batch) for batch in batches or [prompts()]]
        return kept[key]

    return answers
