"""The ways to answer questions about a document, for any model, on token ids."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import peft  # noqa: F401 - here, so that the first document does not pay for loading it
import torch
from torch import Tensor, nn

import refine_verl
from refine_verl.adaptation import AdaptSettings
from refine_verl.models.lora import adapter_parameters
from refine_verl.remember.memory import remember

LABELS = {
    "nothing": "the question alone",
    "reading": "document and question read again",
    "state": "kept state",
    "sft": "SFT into LoRA",
    "refine": "REFINE into LoRA",
    "sft_state": "state and adapter of SFT",
    "refine_state": "state and adapter of REFINE",
}
"""Arms by name, in the order of tables."""
TRAINED = ("sft", "refine")
"""Methods that put the document into an adapter; their arms are asked without it, and with a state beside it."""


@dataclass(frozen=True)
class Case:
    """A document and what is asked about it.

    Attributes:
        document: int64 [T].
        passages: what adapters are trained on, int64 [T'] each: the document, or parts or orders of it.
        questions: int64 [Q] each, behind the document.
        alone: the same questions where no document is in front of them, with the special tokens of a beginning.
        limits: most tokens of each answer.
    """

    document: Tensor
    passages: Sequence[Tensor]
    questions: Sequence[Tensor]
    alone: Sequence[Tensor]
    limits: Sequence[int]


@dataclass
class Outcome:
    """What one way gave for one document.

    Attributes:
        answers: int64 [L] on the CPU for each question.
        kept_bytes: what has to be kept until the next question: token ids (int32), a state, an adapter.
        asking_seconds, making_seconds: of the processor, for all questions and for what is kept. An arm with an
            adapter and a state makes both.
        asking_passes, making_passes: tokens that went through the model, a backward pass counting as two forward ones.
    """

    answers: list[Tensor] = field(default_factory=list)
    kept_bytes: int = 0
    asking_seconds: float = 0.0
    making_seconds: float = 0.0
    asking_passes: int = 0
    making_passes: int = 0


def answer_all(
    model: nn.Module,
    case: Case,
    settings: Mapping[str, AdaptSettings],
    *,
    stop_tokens: Sequence[int] | None = None,
    batch_size: int = 8,
    segment: int = 2048,
    most_bytes: int | None = None,
) -> dict[str, Outcome]:
    """Answer greedily in every way.

    Args:
        model: as in `refine_verl.adapt`; it is the same afterwards.
        case: document and questions.
        settings: of the arms in `TRAINED`, with a ``lora_rank``; one that is missing is left out.
        stop_tokens: that end an answer; None takes the model's.
        batch_size: questions answered together.
        segment, most_bytes: see `refine_verl.remember`.

    Returns:
        By the names of `LABELS`.

    Raises:
        ConfigError, PromptError, ModelError, DataError: see `refine_verl.adapt` and `refine_verl.remember`.
    """
    meter, how = Meter(model), _How(stop_tokens, batch_size, segment, most_bytes)
    found = {name: Outcome() for name in ("nothing", "reading")}
    found["reading"].kept_bytes = 4 * len(case.document)
    whole = [torch.cat([case.document, question]) for question in case.questions]
    with meter.counting():
        for name, prompts in (("nothing", case.alone), ("reading", whole)):
            with refine_verl.adapt(model, list(prompts), {"method": "none"}) as plain:
                _ask(found[name], meter, lambda: plain.generate(max_new_tokens=list(case.limits), **how.asking))
        found["state"] = _state(model, case, meter, how)
        for method in TRAINED:
            if method in settings:
                found |= _adapted(model, case, settings[method], meter, how)
    return {name: found[name] for name in LABELS if name in found}


@dataclass(frozen=True)
class _How:
    """How documents are read and questions are asked."""

    stop_tokens: Sequence[int] | None
    batch_size: int
    segment: int
    most_bytes: int | None

    @property
    def asking(self) -> dict[str, Any]:
        return {"stop_tokens": self.stop_tokens, "batch_size": self.batch_size}

    @property
    def reading(self) -> dict[str, Any]:
        return {"segment": self.segment, "most_bytes": self.most_bytes}


def _state(model: nn.Module, case: Case, meter: Meter, how: _How) -> Outcome:
    outcome, mark = Outcome(), meter.mark()
    memory = remember(model, [case.document], **how.reading)
    outcome.making_seconds, outcome.making_passes = meter.since(mark)
    outcome.kept_bytes = memory.num_bytes

    def ask() -> list[Tensor]:
        answers = memory.ask(list(case.questions), max_new_tokens=list(case.limits), **how.asking)
        return [answer.tokens for answer in answers]

    _ask(outcome, meter, ask)
    return outcome


def _adapted(model: nn.Module, case: Case, settings: AdaptSettings, meter: Meter, how: _How) -> dict[str, Outcome]:
    """An adapter asked without the document, and with the state that the adapted model has after it."""
    alone, mark, limits = Outcome(), meter.mark(), list(case.limits)
    with refine_verl.adapt(model, list(case.passages), settings) as adapted:
        alone.making_seconds, alone.making_passes = meter.since(mark)
        tensors = adapter_parameters(adapted.model).values()
        alone.kept_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        _ask(alone, meter, lambda: adapted.generate(list(case.alone), max_new_tokens=limits, **how.asking))
        both = _state(adapted.model, case, meter, how)
    both.kept_bytes += alone.kept_bytes
    both.making_seconds += alone.making_seconds
    both.making_passes += alone.making_passes
    return {settings.method: alone, f"{settings.method}_state": both}


def _ask(outcome: Outcome, meter: Meter, ask: Callable[[], list[Tensor]]) -> None:
    mark = meter.mark()
    outcome.answers = [tokens.cpu() for tokens in ask()]
    outcome.asking_seconds, outcome.asking_passes = meter.since(mark)


class Meter:
    """Tokens that go through a model, and time.

    Seconds are those of the processor, which other processes on the machine do not lengthen; with a model on a GPU
    those of the clock, the device waited for.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.passes = model, 0
        self.device = next(model.parameters()).device

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what enters the model through its embeddings."""
        handle = self.model.get_input_embeddings().register_forward_hook(self._count)
        try:
            yield
        finally:
            handle.remove()

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.passes += inputs[0].numel() * (3 if torch.is_grad_enabled() else 1)

    def mark(self) -> tuple[float, int]:
        """Now."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter(), self.passes
        return time.process_time(), self.passes

    def since(self, mark: tuple[float, int]) -> tuple[float, int]:
        """Seconds and token passes since then."""
        now, passes = self.mark()
        return now - mark[0], passes - mark[1]
