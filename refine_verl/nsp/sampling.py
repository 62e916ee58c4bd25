"""Random numbers without a random state, and tokens drawn with them.

Every draw is a pure function of (seed, step, document, chunk, rollout, token). Results therefore do not
depend on the number of ranks, on how documents are packed, or on what was drawn before, and a resumed run
continues exactly.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refine_verl.nsp.entropy import accumulation_dtype
from refine_verl.nsp.registry import unknown_choice

PURPOSES: dict[str, int] = {"position": 0, "rollout": 1, "generation": 2}
"""Independent streams of one document. Numbers are part of the result: never change one."""

# Probabilities become integers with this many units in total, so that their running sum is exact.
_UNITS = float(2**53)
# Most logits turned into a CDF at once: bounds the float64 and int64 copies to about 32 MiB each.
_CDF_ELEMENTS = 1 << 22


def _words(name: str, value: int) -> list[int]:
    """A non-negative integer below 2**63 as two 32-bit words: fixed width, so no two inputs can collide."""
    number = operator.index(value)
    if not 0 <= number < 2**63:
        raise ValueError(f"{name} must be an integer in 0 ... 2**63-1, got {value}")
    return [number & 0xFFFFFFFF, number >> 32]


def _key(seed: int, step: int, document_id: int, purpose: str) -> np.ndarray:
    if purpose not in PURPOSES:
        raise unknown_choice("purpose of random draws", purpose, PURPOSES)
    words = _words("seed", seed) + _words("step", step) + _words("document_id", document_id)
    return np.random.SeedSequence([*words, PURPOSES[purpose]]).generate_state(2, np.uint64)


def _stream(key: np.ndarray, chunk: int = 0, rollout: int = 0) -> np.random.Generator:
    # Philox is counter based: the two upper words of its counter give every branch its own 2**64 blocks.
    counter = np.array([0, 0, rollout, chunk], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def uniforms(seed: int, step: int, document_id: int, purpose: str, shape: int | tuple[int, ...]) -> np.ndarray:
    """Numbers in [0, 1) that depend on nothing but the arguments.

    Args:
        seed, step, document_id: integers in 0 ... 2**63-1.
        purpose: a key of `PURPOSES`; different purposes are independent streams.
        shape: of the result, filled in C order: a longer first dimension leaves the earlier entries
            unchanged.

    Returns:
        float64 array of that shape.

    Raises:
        ValueError: an integer is out of range or the purpose is unknown.
    """
    return _stream(_key(seed, step, document_id, purpose)).random(shape)


def position_uniforms(seed: int, step: int, document_id: int, chunks: int) -> np.ndarray:
    """One number per chunk for `select_positions`: float64 `[c]`. Entry i does not depend on c."""
    return uniforms(seed, step, document_id, "position", chunks)


def rollout_uniforms(seed: int, step: int, document_id: int, chunks: int, rollouts: int, length: int) -> np.ndarray:
    """One number per token to generate: float64 `[c, n, k]`.

    Entry (i, r, j) is a pure function of (seed, step, document, i, r, j): other values of c, n or k leave
    it as it is.

    Raises:
        ValueError: as `uniforms`.
    """
    key = _key(seed, step, document_id, "rollout")
    values = np.empty((chunks, rollouts, length))
    for i in range(chunks):
        for r in range(rollouts):
            values[i, r] = _stream(key, i, r).random(length)
    return values


def generation_uniforms(seed: int, step: int, document_id: int, answers: int, length: int) -> np.ndarray:
    """One number per token of each answer to a prompt: float64 `[n, A]`.

    Entry (r, j) is a pure function of (seed, step, document, r, j): other values of n or A leave it as it is.

    Raises:
        ValueError: as `uniforms`.
    """
    key = _key(seed, step, document_id, "generation")
    return np.stack([_stream(key, rollout=r).random(length) for r in range(answers)])


def generation_seeds(seed: int, step: int, document_id: int, answers: int) -> list[int]:
    """A seed below 2**53 for each answer to a prompt, for a sampler that has random numbers of its own.

    Entry r is a pure function of (seed, step, document, r).

    Raises:
        ValueError: as `uniforms`.
    """
    return [int(number * _UNITS) for number in generation_uniforms(seed, step, document_id, answers, 1)[:, 0]]


def scaled_log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """`log_softmax(logits / temperature)` over the last dimension, in float32 (float64 for float64 logits).

    Temperature 0 means greedy decoding, whose distribution has no useful logarithm: the unscaled one is
    returned.

    Raises:
        ValueError: a negative temperature.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be 0 (greedy) or greater, got {temperature}")
    scaled = logits.to(accumulation_dtype(logits))
    if temperature not in (0, 1):
        scaled = scaled / temperature
    return torch.log_softmax(scaled, dim=-1)


def _invert_cdf(log_probs: Tensor, draws: Tensor) -> Tensor:
    """First token whose CDF exceeds the draw, `[R, V], [R] -> [R]`.

    In integers: sums are exact whatever order a device adds in, the CDF cannot decrease, and a token of
    probability 0 has an empty interval, so that it cannot be drawn. Probabilities below 2**-53 are lost.
    """
    probabilities = log_probs.to(torch.float64).exp().nan_to_num(nan=0.0)
    cdf = (probabilities * _UNITS).to(torch.int64).cumsum(dim=-1)
    total = cdf[:, -1]
    target = torch.minimum((draws * total).to(torch.int64), total - 1)
    tokens = torch.searchsorted(cdf, target[:, None], right=True)[:, 0]
    # Only rows of NaN get here out of range: keep the index legal, their log-prob is NaN and says the rest.
    return tokens.clamp_(max=log_probs.shape[-1] - 1)


@torch.no_grad()
def sample_from_logits(
    logits: Tensor, uniforms: Tensor | np.ndarray, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the CDF of `softmax(logits / temperature)` (Eq. 7).

    Args:
        logits: `[R, V]`, any floating dtype. A row of NaN gives token 0 with log-prob NaN.
        uniforms: `[R]`, numbers in [0, 1), one per row. Not looked at when greedy.
        temperature: 0 takes the most likely token.

    Returns:
        tokens: int64 `[R]`, never one of probability 0.
        log_probs: `[R]`, float32 (float64 for float64 logits), of those tokens under the scaled distribution
        (for greedy: under the unscaled one).

    Raises:
        ValueError: shapes do not fit or the temperature is negative.
    """
    draws = torch.as_tensor(uniforms, dtype=torch.float64, device=logits.device)
    if logits.dim() != 2 or draws.shape != logits.shape[:1]:
        raise ValueError(f"expected logits [R, V] and uniforms [R], got {list(logits.shape)} and {list(draws.shape)}")
    rows = max(1, _CDF_ELEMENTS // max(1, logits.shape[1]))
    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    log_probs = torch.empty(logits.shape[0], dtype=accumulation_dtype(logits), device=logits.device)
    for start in range(0, logits.shape[0], rows):
        part = slice(start, start + rows)
        all_log_probs = scaled_log_softmax(logits[part], temperature)
        tokens[part] = all_log_probs.argmax(dim=-1) if temperature == 0 else _invert_cdf(all_log_probs, draws[part])
        log_probs[part] = all_log_probs.gather(-1, tokens[part, None])[:, 0]
    return tokens, log_probs


def without(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """`logits` `[..., V]` with no probability left for `tokens`; the same tensor if there are none."""
    if not tokens:
        return logits
    return logits.index_fill(-1, torch.tensor(list(tokens)).to(logits.device, non_blocking=True), -torch.inf)


def end_tokens(generation: Any, *more: int | None) -> tuple[int, ...]:
    """Ids that end an answer, in order.

    Args:
        generation: a model's ``generation_config``; None where it has none.
        more: other ids, such as the tokenizer's end of sequence; None is left out.
    """
    ends = getattr(generation, "eos_token_id", None)
    ids = {*more, *(ends if isinstance(ends, (list, tuple)) else [ends])}
    return tuple(sorted(int(token) for token in ids if token is not None))
