"""Log-probabilities of an answer, the slow way."""

from __future__ import annotations

import torch
from torch import Tensor

from refine_verl.models import FastWeightActor


def plain_log_probs(actor: FastWeightActor, prompt: Tensor, answer: Tensor, temperature: float) -> Tensor:
    """Of every token of the answer, from one forward pass over prompt and answer without any state."""
    logits = actor(input_ids=torch.cat([prompt, answer])[None], use_cache=False).logits[0]
    scaled = torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, dim=-1)
    return scaled.gather(1, answer[:, None])[:, 0]
