"""An engine that answers with this package's own passes stands in for vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from refine_verl.config import RunFailed
from refine_verl.evaluate import run as evaluate_run
from refine_verl.evaluate import served
from refine_verl.evaluate.model import EvaluatedModel, find_model, load_evaluated
from refine_verl.serving.engine import EngineSettings, Scored, Written


class StandIn:
    """What `serving.engine.Engine` does, in float32 and one after the other."""

    started: list[EngineSettings] = []
    asked: list[list[int]] = []
    ends_after: int | None = None

    def __init__(self, settings: EngineSettings, model_type: str) -> None:
        self.started.append(settings)
        self.settings = settings
        self.model: EvaluatedModel = load_evaluated(find_model(settings.model, adapter=settings.adapter))

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        *,
        stop_tokens: Sequence[int] = (),
        ends: Callable[[int, list[int]], bool] | None = None,
        contexts: Sequence[tuple[Sequence[int], Sequence[int]]] = (),
    ) -> Iterator[Written]:
        assert all(len(row) + limit <= self.settings.tokens for row, limit in zip(prompts, limits, strict=True))
        shared = {row: len(tokens) * (row != rows[0]) for rows, tokens in contexts for row in rows}
        for row in reversed(range(len(prompts))):  # in another order than they were given
            if self.ends_after is not None and len(self.asked) >= self.ends_after:
                raise RunFailed("vLLM's engine ended")
            self.asked.append(list(prompts[row]))
            (tokens,) = self.model._write([prompts[row]], [limits[row]], (), 0.0, None)
            if ends is not None:
                tokens = next((tokens[:n] for n in range(1, len(tokens)) if ends(row, tokens[:n])), tokens)
            assert not set(tokens[:-1]) & set(stop_tokens)
            yield Written(row, tokens, len(prompts[row]) - shared.get(row, 0))

    def score(self, rows: Sequence[Sequence[int]]) -> list[Scored]:
        found = []
        for row in rows:
            assert len(row) + 1 <= self.settings.tokens
            self.asked.append(list(row))
            with torch.no_grad():
                logits = self.model.actor.lm_head(self.model.actor.model(torch.tensor([row])).last_hidden_state)[0]
            values = logits[:-1].log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0]
            found.append(Scored(values.tolist(), (logits[:-1].argmax(-1) == torch.tensor(row[1:])).tolist()))
        return found

    def close(self) -> None:
        self.settings = EngineSettings(model="closed", tokens=0)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """`engine=vllm` is asked of a `StandIn`, as if vLLM were there."""
    monkeypatch.setattr(StandIn, "started", [])
    monkeypatch.setattr(StandIn, "asked", [])
    monkeypatch.setattr(served, "Engine", StandIn)
    monkeypatch.setattr(served, "served_dtype", lambda *_, **__: "float32")
    monkeypatch.setattr(served, "require_memory", lambda *_, **__: None)
    monkeypatch.setattr(served, "runs_on_cpu", lambda: True)
    monkeypatch.setattr(evaluate_run, "require_vllm", lambda *_: None)
