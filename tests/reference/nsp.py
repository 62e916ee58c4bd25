"""Next-sequence prediction spelled out with Python loops and `math`: slow, obvious, close to the paper."""

from __future__ import annotations

import math
from collections.abc import Sequence


def entropy(logits: Sequence[float]) -> float:
    """Eq. 5 for one distribution, in nats."""
    total = sum(math.exp(value) for value in logits)
    probabilities = [math.exp(value) / total for value in logits]
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred average over the neighbours that exist; an even window looks further back than ahead."""
    smoothed = []
    for i in range(len(values)):
        places = range(i - window // 2, i - window // 2 + window)
        existing = [values[j] for j in places if 0 <= j < len(values)]
        smoothed.append(sum(existing) / len(existing))
    return smoothed


def smooth_entropies(entropies: Sequence[float], window: int) -> list[float]:
    """Smoothed H[0..T-1], where H[0] does not exist: its entry averages the neighbours that do."""
    tail = smooth(entropies[1:], window)
    neighbours = [entropies[j] for j in range(1, len(entropies)) if j <= window - 1 - window // 2]
    return [sum(neighbours) / len(neighbours) if neighbours else entropies[1], *tail]


def chunk_probabilities(
    entropies: Sequence[float], chunks: int, rollout_length: int, anchor: str, tau: float, window: int
) -> list[dict[int, float]]:
    """Eq. 6: for each chunk, position -> probability."""
    smoothed = smooth_entropies(entropies, window)
    positions = list(range(len(entropies) - rollout_length))
    offset = {"prediction": 1, "token": 0}[anchor]
    result = []
    for i in range(chunks):
        start, stop = i * len(positions) // chunks, (i + 1) * len(positions) // chunks
        weights = {t: math.exp(smoothed[t + offset] / tau) for t in positions[start:stop]}
        total = sum(weights.values())
        result.append({t: weight / total for t, weight in weights.items()})
    return result


def ppo_clip_token(log_prob: float, old_log_prob: float, advantage: float, clip_ratio: float) -> float:
    """The clipped loss of one token, without dual clip."""
    ratio = math.exp(log_prob - old_log_prob)
    clipped = min(max(ratio, 1 - clip_ratio), 1 + clip_ratio)
    return -min(ratio * advantage, clipped * advantage)
