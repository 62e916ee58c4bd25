"""Scores and answers of each model family against plain passes, one text at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reference.evaluate_files import BYTES
from reference.hybrid import hybrid_config
from reference.toy import tiny_config

from refine_verl.config import ConfigError
from refine_verl.data.tokenizers import load_tokenizer
from refine_verl.evaluate.model import EvaluatedModel, FoundModel, load_evaluated, ttt_settings
from refine_verl.models import FastWeightActor, ModelError, ModelInfo, load_model, make_actor

LACT = {"num_attn_heads": 2, "num_lact_heads": 2, "lact_chunk_size": 8, "window_size": 8}
PROMPTS = [b"The grass is green.", b"Ann", b"Bob has nine apples and Ann has seven."]


@pytest.fixture(params=["delta_net", "gated_deltanet", "lact_swiglu", "olmo_hybrid"])
def evaluated(request: pytest.FixtureRequest) -> EvaluatedModel:
    if request.param == "olmo_hybrid":
        config = hybrid_config(request.param, vocab_size=BYTES)
    else:
        config = tiny_config(request.param, vocab_size=BYTES, **(LACT if request.param == "lact_swiglu" else {}))
    model: Any = load_model(None, config=config, dtype=torch.float64, seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return EvaluatedModel(make_actor(model), load_tokenizer("bytes"))


def logits_of(evaluated: EvaluatedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return FastWeightActor.forward(evaluated.actor, input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def test_likelihoods(evaluated: EvaluatedModel) -> None:
    pairs = [(list(text[:cut]), list(text[cut:])) for text, cut in zip(PROMPTS, (4, 1, 30), strict=True)]
    for (context, following), found in zip(pairs, evaluated.likelihoods(pairs), strict=True):
        logits = logits_of(evaluated, context + following)[len(context) - 1 : -1].log_softmax(-1)
        wanted = logits.gather(1, torch.tensor(following)[:, None]).sum().item()
        assert found.log_prob == pytest.approx(wanted, rel=1e-6)  # sums are float32
        assert found.correct == int((logits.argmax(-1) == torch.tensor(following)).sum())
        assert found.tokens == len(following)


def test_answers(evaluated: EvaluatedModel) -> None:
    limits = [9, 5, 7]
    wanted = []
    for prompt, limit in zip(PROMPTS, limits, strict=True):
        ids = list(prompt)
        for _ in range(limit):
            ids.append(int(logits_of(evaluated, ids)[-1].argmax()))
            if ids[-1] in evaluated.stop_tokens:
                break
        wanted.append(evaluated.decode(ids[len(prompt) :]))
    assert evaluated.write([list(prompt) for prompt in PROMPTS], limits) == wanted
    stop = wanted[0][2:4]
    if stop.isascii() and stop:
        stopped = evaluated.write([list(prompt) for prompt in PROMPTS], limits, stops=[stop])
        assert stopped == [text.split(stop)[0] for text in wanted]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predictions_that_are_no_numbers_are_refused(evaluated: EvaluatedModel, value: float) -> None:
    """Weights that became so after they were read, or products too large for their dtype."""
    with torch.no_grad():
        evaluated.actor.get_output_embeddings().weight[5].fill_(value)
    with pytest.raises(ModelError, match="its predictions are NaN or infinite, so there is nothing to score"):
        evaluated.likelihoods([(list(PROMPTS[0]), list(PROMPTS[1]))])
    with pytest.raises(ModelError, match="its predictions are NaN or infinite"):
        evaluated.write([list(PROMPTS[0])], [4])


def test_a_selection_that_the_model_cannot_have_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    settings = ttt_settings("refine", {"nsp": {"selection": "surprise"}})
    for family, more, error in (("lact_swiglu", LACT, ConfigError), ("delta_net", {}, ModelError)):
        found = FoundModel(
            key="model",
            path=str(tmp_path),  # there are none
            info=ModelInfo(family, BYTES, True, tiny_config(family, vocab_size=BYTES, **more)),
            tokenizer=load_tokenizer("bytes"),
        )
        with pytest.raises(error, match=r"refine\.nsp\.selection: surprise" if error is ConfigError else "config.json"):
            load_evaluated(found, ttt=settings, device="cpu")
