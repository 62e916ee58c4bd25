"""`generate` from the state: the same tokens as reading everything again for each of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import set_seed

from refine_verl.models.lact import LaCTCache, LaCTForCausalLM

PROMPTS = (19, 8, 3, 16)
NEW = 24
Build = Callable[..., LaCTForCausalLM]
FIELDS = {"use_muon": True, "w0_w2_low_rank": 3, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(1, 61, (length,), generator=generator) for length in PROMPTS]


def padded(rows: list[Tensor], side: str) -> dict[str, Tensor]:
    ones = [torch.ones_like(row) for row in rows]
    ids, mask = (torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_side=side) for part in (rows, ones))
    return {"input_ids": ids, "attention_mask": mask}


def read_again(model: LaCTForCausalLM, prompt: Tensor, new: int) -> Tensor:
    """Greedy, one full pass per token, no state."""
    with torch.no_grad():
        for _ in range(new):
            prompt = torch.cat([prompt, model(input_ids=prompt[None], use_cache=False).logits[0, -1:].argmax(-1)])
    return prompt[-new:]


def test_greedy_batch_of_unequal_prompts(lact: Build) -> None:
    model = lact(**FIELDS)
    batch = padded(prompts(), "left")
    written = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    for row, prompt in zip(written, prompts(), strict=True):
        assert torch.equal(row[-NEW:], read_again(model, prompt, NEW))
    assert len({tuple(row[-NEW:].tolist()) for row in written}) == len(PROMPTS)


def test_no_token_is_read_twice(lact: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lact(**FIELDS)
    read = []
    original = type(model.model).run
    monkeypatch.setattr(
        type(model.model), "run", lambda self, *args, **kw: read.append(sum(args[1])) or original(self, *args, **kw)
    )
    model.generate(**padded(prompts(), "left"), max_new_tokens=NEW, do_sample=False)
    assert read == [sum(PROMPTS)] + [len(PROMPTS)] * (NEW - 1)


def test_sampling_and_returned_sequences(lact: Build) -> None:
    model, (prompt, *_) = lact(**FIELDS), prompts()
    runs = []
    for use_cache in (True, False):
        set_seed(3)
        runs.append(
            model.generate(
                input_ids=prompt[None], max_new_tokens=NEW, do_sample=True, num_return_sequences=3, use_cache=use_cache
            )
        )
    assert torch.equal(*runs)
    assert len({tuple(row.tolist()) for row in runs[0]}) == 3


def test_beams_follow_their_states(lact: Build) -> None:
    model, batch = lact(**FIELDS), padded(prompts()[:2], "left")
    cached, again = (
        model.generate(**batch, max_new_tokens=12, num_beams=3, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert torch.equal(cached, again)


def test_a_cache_goes_on(lact: Build) -> None:
    """Turn by turn, with a cache that is handed back; its size does not grow with the text."""
    model, cache = lact(**FIELDS), LaCTCache()
    text = torch.zeros(1, 0, dtype=torch.int64)
    turns = torch.randint(1, 61, (8, 1, 16), generator=torch.Generator().manual_seed(6))
    sizes = []
    for turn in turns:
        text = torch.cat([text, turn], dim=1)
        wanted = read_again(model, text[0], 5)
        mask = torch.ones_like(text)  # a 0 that was written is no padding
        text = model.generate(
            input_ids=text, attention_mask=mask, past_key_values=cache, max_new_tokens=5, do_sample=False
        )
        assert torch.equal(text[0, -5:], wanted)
        sizes.append(cache.num_bytes)
    assert cache.get_seq_length() == text.shape[1] - 1
    assert max(sizes[3:]) <= 1.5 * max(sizes[:3])


def test_logits_in_blocks_of_a_padded_batch(lact: Build) -> None:
    """A mask longer than the block, as generate passes it; a block may be padding only, for some rows or for all."""
    model, rows = lact(), prompts()
    batch = padded(rows, "left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    cache, logits = LaCTCache(), []
    ids, mask = (torch.nn.functional.pad(part, (2, 0)) for part in (ids, mask))
    with torch.no_grad():
        for start in range(0, ids.shape[1], 2):
            stop = min(start + 2, ids.shape[1])
            output = model(
                input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True
            )
            logits.append(output.logits)
        got = torch.cat(logits, dim=1)
        for row, mine in zip(rows, got, strict=True):
            wanted = model(input_ids=row[None]).logits[0]
            torch.testing.assert_close(mine[-len(row) :], wanted, rtol=1e-9, atol=1e-9)


def test_going_back_is_refused(lact: Build) -> None:
    cache = lact()(input_ids=torch.ones(1, 9, dtype=torch.int64), use_cache=True).past_key_values
    with pytest.raises(NotImplementedError, match="cannot forget"):
        cache.crop(4)
