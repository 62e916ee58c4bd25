"""A small fast-weight language model in plain PyTorch: linear attention whose memory decays.

Per head the fast weights W [d_k, d_v] are written and read at every token,

    W_t = a_t W_{t-1} + k_t v_t^T,        o_t = W_t^T q_t,

with a forget gate a_t in (0, 1) computed from the input. Keys come from the current and the previous token, so
the state has two parts: the memories and the last token's features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import ModelOutput

LayerState = dict[str, Tensor]


class DecayMemoryConfig(PretrainedConfig):
    model_type = "decay_memory"

    def __init__(
        self,
        vocab_size: int = 512,
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        num_heads: int = 2,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_heads = num_heads
        self.initializer_range = initializer_range
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)


class DecayMemory(nn.Module):
    """The mixer. Shapes: B rows, L tokens, H heads, D features per head."""

    def __init__(self, config: DecayMemoryConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        width = config.hidden_size
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(2 * width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.gate_proj = nn.Linear(width, self.heads)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, real: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        """x [B, L, H * D]; real bool [B, L], False for padding behind a row's end; state before the first token."""
        before = x.new_zeros(x.shape[0], 1, x.shape[2]) if state is None else state["shift"].to(x.dtype).unsqueeze(1)
        shifted = torch.cat([before, x], dim=1)
        q = F.normalize(self._split(self.q_proj(x)), dim=-1)
        k = F.normalize(self._split(self.k_proj(torch.cat([x, shifted[:, :-1]], dim=-1))), dim=-1)
        v = self._split(self.v_proj(x))
        # padding neither writes nor forgets, so a row's state stays what it was at its last real token
        k = k * real[:, None, :, None]
        log_gate = F.logsigmoid(self.gate_proj(x)).transpose(1, 2) * real[:, None]
        memory = None if state is None else state["memory"]
        with torch.autocast(x.device.type, enabled=False):  # the memory stays in float32
            out, memory = read_and_write(*(part.to(_precise(part)) for part in (q, k, v, log_gate)), memory)
        last = real.sum(dim=1)
        after = {"memory": memory, "shift": shifted[torch.arange(len(x), device=x.device), last]}
        return self.o_proj(out.to(x.dtype).transpose(1, 2).flatten(2)), after

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def read_and_write(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
    """All L tokens at once: q, k, v [B, H, L, D], log_gate [B, H, L], memory [B, H, D, D] or None.

    Returns: outputs [B, H, L, D] and the memory after the last token.
    """
    if memory is None:
        memory = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1])
    total = log_gate.cumsum(dim=-1)
    length = q.shape[2]
    causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    # what token j wrote has decayed by a_{j+1} ... a_i when token i reads it
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(~causal, -torch.inf).exp()
    inside = ((q @ k.transpose(-1, -2)) * decay) @ v
    out = inside + (q * total.exp().unsqueeze(-1)) @ memory
    remaining = (total[..., -1:] - total).exp().unsqueeze(-1)
    memory = total[..., -1, None, None].exp() * memory + (k * remaining).transpose(-1, -2) @ v
    return out, memory


class DecayMemoryBlock(nn.Module):
    def __init__(self, config: DecayMemoryConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.memory = DecayMemory(config)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, real: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        mixed, after = self.memory(self.norm1(x), real, state)
        x = x + mixed
        return x + self.mlp(self.norm2(x)), after


@dataclass
class DecayMemoryOutput(ModelOutput):
    """last_hidden_state [B, L, d], after the final norm; state: one dict per layer."""

    last_hidden_state: Tensor | None = None
    state: tuple[LayerState, ...] | None = None


class DecayMemoryPreTrainedModel(PreTrainedModel):
    config_class = DecayMemoryConfig
    base_model_prefix = "model"
    # what FSDP shards one by one
    _no_split_modules = ["DecayMemoryBlock"]


class DecayMemoryModel(DecayMemoryPreTrainedModel):
    """The trunk: everything but the LM head."""

    def __init__(self, config: DecayMemoryConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecayMemoryBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.post_init()

    def forward(
        self, input_ids: Tensor, real: Tensor | None = None, state: tuple[LayerState, ...] | None = None, **_: Any
    ) -> DecayMemoryOutput:
        if real is None:
            real = torch.ones_like(input_ids, dtype=torch.bool)
        x = self.embed_tokens(input_ids)
        after = []
        for index, layer in enumerate(self.layers):
            x, layer_state = layer(x, real, None if state is None else state[index])
            after.append(layer_state)
        return DecayMemoryOutput(last_hidden_state=self.norm(x), state=tuple(after))


class DecayMemoryForCausalLM(DecayMemoryPreTrainedModel):
    def __init__(self, config: DecayMemoryConfig) -> None:
        super().__init__(config)
        self.model = DecayMemoryModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids).last_hidden_state))


AutoConfig.register(DecayMemoryConfig.model_type, DecayMemoryConfig)
AutoModelForCausalLM.register(DecayMemoryConfig, DecayMemoryForCausalLM)
