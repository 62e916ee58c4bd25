"""Answers inside the block: from the state, per row, reproducible, and with the adapted weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import refine_verl
from refine_verl.adaptation import PromptError
from refine_verl.models import FastWeightActor

from .conftest import CONFIG, build, prompts


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def huggingface(model: Any, row: Tensor, count: int, **values: Any) -> Tensor:
    mask = torch.ones_like(row)[None]
    written = model.generate(
        row[None], attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0, **values
    )
    return written[0, len(row) :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_greedy_equals_huggingfaces_generate(family: str, dtype: torch.dtype) -> None:
    model, rows = build(family, dtype), prompts()
    untouched = [huggingface(model, row, 6) for row in rows]
    with refine_verl.adapt(model, rows, CONFIG) as adapted:
        got = adapted.generate(max_new_tokens=6)
        assert same(got, [huggingface(adapted.model, row, 6) for row in rows])
        assert not same(got, untouched)
    assert same(untouched, [huggingface(model, row, 6) for row in rows])


def test_limits_stops_and_other_prompts() -> None:
    rows = prompts()
    with refine_verl.adapt(build(), rows, CONFIG) as adapted:
        free = adapted.generate(max_new_tokens=7, stop_tokens=())
        assert [len(row) for row in free] == [7] * 5
        limited = adapted.generate(max_new_tokens=[1, 7, 2, 5, 3], stop_tokens=(), batch_size=2)
        assert same(limited, [row[:n] for row, n in zip(free, [1, 7, 2, 5, 3], strict=True)])
        stop = int(free[1][2])
        for row, wanted in zip(adapted.generate(max_new_tokens=7, stop_tokens=[stop]), free, strict=True):
            end = wanted.tolist().index(stop) + 1 if stop in wanted else 7
            assert row.tolist() == wanted[:end].tolist()
        adapted.model.generation_config.eos_token_id = [stop]
        assert same(adapted.generate(max_new_tokens=7), adapted.generate(max_new_tokens=7, stop_tokens=[stop]))
        assert same(limited, adapted.generate(max_new_tokens=torch.tensor([1, 7, 2, 5, 3]), stop_tokens=()))
        other = adapted.generate(rows[3].tolist(), max_new_tokens=7, stop_tokens=())
        assert same(other, [free[3]])


def test_sampling_depends_on_seed_and_prompt_only() -> None:
    rows = prompts()
    with refine_verl.adapt(build(), rows, CONFIG) as adapted:

        def sample(chosen: list[Tensor], **values: Any) -> list[Tensor]:
            return adapted.generate(chosen, max_new_tokens=6, temperature=1.0, stop_tokens=(), **values)

        torch.manual_seed(0)
        first = sample(rows)
        torch.manual_seed(1)
        assert same(first, sample(rows[::-1], batch_size=2)[::-1])
        assert same(first, sample(rows, seed=0)) and not same(first, sample(rows, seed=1))
        assert same([first[2]], sample([rows[2]]))
        assert same([row[:2] for row in first], adapted.generate(max_new_tokens=2, temperature=1.0, stop_tokens=()))
        twice = sample([rows[0], rows[0]])
        assert not same(twice[:1], twice[1:])


def test_the_prompt_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    original = FastWeightActor.run

    def run(self: FastWeightActor, packed: Any, *arguments: Any, **values: Any) -> Any:
        passes.append(packed.tokens.numel())
        return original(self, packed, *arguments, **values)

    with refine_verl.adapt(build(), prompts(), CONFIG) as adapted:
        monkeypatch.setattr(FastWeightActor, "run", run)
        adapted.generate(max_new_tokens=4, stop_tokens=())
    assert passes == [sum(map(len, prompts())), 5, 5, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_training_the_model_answers_as_it_is(family: str, dtype: torch.dtype) -> None:
    model, rows = build(family, dtype), prompts()
    with refine_verl.adapt(model, rows, {"method": "none"}) as adapted:
        assert next(adapted.model.parameters()).dtype == dtype
        written = adapted.generate(max_new_tokens=1)
    assert same(written, [huggingface(model, row, 1) for row in rows])


def test_after_the_block() -> None:
    with refine_verl.adapt(build(), prompts(), CONFIG) as adapted:
        pass
    assert len(adapted.history) == 3
    with pytest.raises(RuntimeError, match="block has ended.*inside the block"):
        adapted.generate(max_new_tokens=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1, got 0 for row 0"),
        ({"max_new_tokens": [1, 2]}, "2 numbers for 5 prompts"),
        ({"max_new_tokens": 2.5}, "must be an integer or one per prompt, got 2.5"),
        ({"max_new_tokens": 1, "temperature": -1.0}, "temperature must be 0"),
        ({"max_new_tokens": 1, "batch_size": 0}, "batch_size must be at least 1"),
        ({"max_new_tokens": 1, "input_ids": []}, "no prompts"),
        ({"max_new_tokens": 1, "input_ids": [[1], []]}, "row 1 is empty"),
        ({"max_new_tokens": 1, "input_ids": [[1], [61]]}, "row 1, position 0: token id 61 is outside 0 ... 60"),
    ],
)
def test_refused(arguments: dict[str, Any], message: str) -> None:
    config = {**CONFIG, "method": "none"}
    with refine_verl.adapt(build(), prompts(), config) as adapted, pytest.raises(PromptError, match=message):
        adapted.generate(**arguments)
