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


def standardised(scores: Sequence[float]) -> list[float]:
    """Scores of tokens 1 to T-1 with mean 0 and standard deviation 1; entry 0 by the same measure."""
    counted = scores[1:]
    mean = sum(counted) / len(counted)
    deviation = math.sqrt(sum((score - mean) ** 2 for score in counted) / len(counted))
    return [(score - mean) / deviation for score in scores]


def surprise(write_norms: Sequence[Sequence[float]]) -> list[float]:
    """Mean over layers of each token's norm, in units of the layer's mean over tokens 1 to T-1."""
    units = [sum(layer[1:]) / (len(layer) - 1) for layer in write_norms]
    return [
        sum(layer[t] / unit for layer, unit in zip(write_norms, units, strict=True)) / len(units)
        for t in range(len(write_norms[0]))
    ]


def resemblance(hidden: Sequence[Sequence[float]], question_tokens: int) -> list[float]:
    """Of each token the largest cosine with a token of the question, all less the mean over the document."""
    length, width = len(hidden), len(hidden[0])
    mean = [sum(row[i] for row in hidden) / length for i in range(width)]
    rows = [[value - centre for value, centre in zip(row, mean, strict=True)] for row in hidden]

    def cosine(a: Sequence[float], b: Sequence[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    first = length - min(question_tokens, length // 2)
    scores = [max(cosine(row, rows[q]) for q in range(first, length)) for row in rows[:first]]
    return scores + [min(scores[1:] or scores)] * (length - first)


def place_of(uniform: float, probabilities: dict[int, float]) -> int:
    """The position that a uniform number falls on."""
    total = 0.0
    for position, probability in probabilities.items():
        total += probability
        if uniform < total:
            return position
    raise AssertionError("probabilities do not sum to 1")
