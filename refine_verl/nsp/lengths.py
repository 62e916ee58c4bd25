"""Where rollouts end, if not all of them after k tokens (`refine.nsp.rollout_length` with `min`, `max` and `by`).

A length belongs to a position: it is decided by the document alone, so all rollouts from there have it, and nobody can
write himself a better one. Every pass still has room for `max` tokens, whatever the documents are; what lies behind the
end of a rollout is neither rewarded nor trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from refine_verl.config import ConfigError, NSPSettings, RolloutLength

CLOSED = "\"'”’»)]}"
"""May stand behind the end of a sentence, in the same token."""
ENDS = (".", "!", "?", "…", "。", "！", "？", "‽", "।", "؟")


def ends_sentence(text: str) -> bool:
    """Whether a token of this text ends a sentence: full stop, question or exclamation mark, or a new line."""
    return "\n" in text or text.rstrip().rstrip(CLOSED).endswith(ENDS)


def sentence_ends(tokenizer: Any, nsp: NSPSettings) -> tuple[int, ...]:
    """Ids of the tokens that end a sentence, if rollouts end there, otherwise none.

    Raises:
        ConfigError: they do, and the tokenizer, one of transformers, has no such tokens.
    """
    if not isinstance(nsp.rollout_length, RolloutLength) or nsp.rollout_length.by != "sentence":
        return ()
    texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
    found = tuple(index for index, text in enumerate(texts) if ends_sentence(text))
    if not found:
        raise ConfigError(
            "refine.nsp.rollout_length.by",
            "sentence needs tokens that end a sentence (. ! ? or a new line), and the tokenizer has none. Set "
            "by=entropy.",
        )
    return found


def rollout_lengths(length: RolloutLength, positions: Tensor, entropy: Tensor, tokens: Tensor, ends: Tensor) -> Tensor:
    """How many tokens the rollouts from each position of a document have.

    The first number j from `min` on for which the real continuation x_{t+1} ... x_{t+j} stops at a place that ends a
    rollout; `max` if there is none before. With `by=entropy` that is where what follows is predicted with less entropy
    than the document has on average; with `by=sentence` where x_{t+j} ends a sentence.

    Args:
        length: min, max and by.
        positions: int64 `[c]`, each t with t + max < T.
        entropy: `[T]`, of the prediction made from each token (Eq. 5).
        tokens: int `[T]`.
        ends: int `[ids]`, of tokens that end a sentence; only for `by=sentence`.

    Returns:
        int64 `[c]`, on the device of `tokens`, without waiting for it.
    """
    numbers = torch.arange(1, length.max + 1, device=tokens.device)
    places = positions.to(tokens.device)[:, None] + numbers
    calm = entropy < entropy[:-1].mean()
    stops = torch.isin(tokens[places], ends) if length.by == "sentence" else calm[places]
    stops = stops & (numbers >= length.min)
    stops[:, -1] = True
    return stops.int().argmax(dim=1) + 1


def counted_tokens(lengths: Tensor, width: int) -> Tensor:
    """Which of `width` tokens are the rollout's own: bool `[..., width]` for lengths `[...]`."""
    return torch.arange(width, device=lengths.device) < lengths[..., None]
