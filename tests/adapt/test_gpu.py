"""Adapting on a GPU, in the precisions people load models in."""

from __future__ import annotations

import pytest
import torch

import refine_verl
from refine_verl.models import load_model

from .conftest import CONFIG, bits, fingerprint, prompts

pytestmark = pytest.mark.gpu

FAMILIES = {
    "delta_net": {"hidden_size": 128, "num_heads": 2},
    "gated_deltanet": {"hidden_size": 128, "num_heads": 2, "head_dim": 64, "expand_v": 1.0},
}


@pytest.mark.parametrize("backup", ["cpu", "device"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_it_learns_answers_and_comes_back(name: str, dtype: torch.dtype, backup: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(name, vocab_size=61, num_hidden_layers=2, **FAMILIES[name])
    model = load_model(None, config=config, dtype=dtype, seed=1).cuda()
    before, state = fingerprint(model), torch.cuda.get_rng_state()
    rows = prompts((200, 130, 90))
    settings = {**CONFIG, "steps": 8, "lr": 1e-3, "backup": backup}
    with refine_verl.adapt(model, rows, settings) as adapted:
        assert all(parameter.dtype == torch.float32 for parameter in adapted.model.parameters())
        assert adapted.history[-1]["actor/ntp_loss"] < adapted.history[0]["actor/ntp_loss"]
        answers = adapted.generate(max_new_tokens=5, stop_tokens=())
        assert [answer.device.type for answer in answers] == ["cuda"] * 3
        if dtype == torch.bfloat16:  # a float32 model needs the caller's own autocast, as outside the block
            row = rows[0].cuda()[None]
            written = adapted.model.generate(
                row, attention_mask=torch.ones_like(row), max_new_tokens=5, do_sample=False, pad_token_id=0
            )
            assert written.shape[1] > row.shape[1]
    after = fingerprint(model)
    # the storage of moved originals may be another one; what is in it may not
    same = [key for key in before if not key.endswith(":is")]
    assert [key for key in same if before[key] != after[key]] == []
    assert bits(state) == bits(torch.cuda.get_rng_state())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
