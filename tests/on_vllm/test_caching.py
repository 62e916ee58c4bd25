"""States that vLLM keeps, splits and shares: prefix caching, prompts read in pieces, sequences beside each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reference.on_vllm import Answer, Serve, engine, gap, generate, prompts, teacher_forced
from torch import nn

from refine_verl.models.loading import load_model

# Of the two tokens where greedy answers part, in log-probability: the largest differences that bfloat16 makes.
NEAR_TIE = 0.3
# Twice what the same answers have without caching (0.04 to 0.06); a state that is lost or another's gives 1 or more.
BOUND = 0.15


def assert_same_answers(ones: list[Answer], others: list[Answer], exact: nn.Module) -> None:
    """Token for token, up to where two tokens are as probable: split otherwise, bfloat16 sums round otherwise."""
    for one, other in zip(ones, others, strict=True):
        apart = [i for i, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=True)) if a != b]
        if apart:
            both = [teacher_forced(exact, answer.tokens[: apart[0] + 1])[-1] for answer in (one, other)]
            assert apart[0] >= one.prompt_length and abs(float(both[0] - both[1])) < NEAR_TIE


@pytest.mark.parametrize("name", ["gated", "delta"])
def test_prefix_caching_gives_the_same_answers(name: str, directories: dict[str, Path], serve: Serve) -> None:
    with engine(directories[name], enable_prefix_caching=True) as llm:
        config = llm.llm_engine.vllm_config.cache_config
        assert (config.mamba_cache_mode, config.mamba_ssm_cache_dtype) == ("align", "float32")
        fresh = generate(llm, prompts(), log_probs_of_prompts=False)
        again = generate(llm, prompts(), log_probs_of_prompts=False)
        tails = [prompt + [7, 8, 9 + index] for index, prompt in enumerate(prompts())]
        shared = generate(llm, tails, log_probs_of_prompts=False)
    uncached = serve(name)[0]
    assert [answer.cached for answer in fresh] == [0, 0, 0, 0]
    # whole blocks of 32 tokens, and at least one token is read
    assert [answer.cached for answer in again] == [0, 32, 128, 192]
    assert [answer.cached for answer in shared] == [0, 32, 128, 192]
    exact = load_model(directories[name])
    assert_same_answers(fresh, again, exact)
    assert_same_answers(fresh, uncached, exact)
    assert gap(again, exact, "written") < BOUND and gap(shared, exact, "written") < BOUND


def test_the_state_of_another_prompt_is_told_apart(directories: dict[str, Path], serve: Serve) -> None:
    """The bound sees whether an answer was written from the state of its own prompt, and the ties where it began."""
    exact = load_model(directories["delta"])
    two = [answer for answer in serve("delta")[0] if answer.prompt_length >= 130]
    strangers = [
        Answer(other.tokens[:128] + answer.tokens[128:], answer.prompt_length, answer.log_probs, 0)
        for answer, other in zip(two, reversed(two), strict=True)
    ]
    assert gap(strangers[:1], exact, "written") > BOUND
    changed = [
        Answer([*answer.tokens[:-1], answer.tokens[0]], answer.prompt_length, answer.log_probs, 0) for answer in two
    ]
    with pytest.raises(AssertionError):
        assert_same_answers(two, changed, exact)


def test_prompts_in_pieces_and_sequences_in_turns(directories: dict[str, Path], serve: Serve) -> None:
    """Fewer tokens and sequences at a time than there are: states are carried over, and joined and left by others."""
    pieces = serve("gated", enable_chunked_prefill=True, max_num_batched_tokens=48, max_num_seqs=3)[0]
    assert gap(pieces, load_model(directories["gated"])) < BOUND


def test_a_long_text(directories: dict[str, Path], serve: Serve) -> None:
    """More tokens than vLLM reads at a time, and than fla's default of max_position_embeddings (2048)."""
    prompt = torch.randint(2, 500, (2500,), generator=torch.Generator().manual_seed(2)).tolist()
    # fla is imported in this process, so its own configuration is read, whose default vLLM takes for a limit
    longer = {"hf_overrides": {"max_position_embeddings": 4096}, "max_model_len": 4096}
    answers = serve("delta", [[prompt]], max_num_batched_tokens=1024, **longer)[0]
    assert gap(answers, load_model(directories["delta"])) < BOUND
