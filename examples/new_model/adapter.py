"""How REFINE reads the state of a DecayMemory model and hands it back: one class with one method."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from refine_verl.models import FastWeightState, Packed, register_adapter


@register_adapter("decay_memory")
class DecayMemoryAdapter:
    """Runs of unequal length become rows with padding behind them; the model leaves the state alone there."""

    def run(
        self, model: nn.Module, packed: Packed, state: FastWeightState | None, keep_state: bool
    ) -> tuple[Tensor, FastWeightState | None]:
        if packed.cu_seqlens is None:  # one row per run already
            rows, real = packed.tokens, None
        else:
            runs = packed.tokens[0].split(packed.lengths)
            rows = nn.utils.rnn.pad_sequence(list(runs), batch_first=True)
            places = torch.arange(rows.shape[1], device=rows.device)
            real = places < torch.tensor(packed.lengths, device=rows.device)[:, None]
        output = model.base_model(rows, real=real, state=None if state is None else state.tree)
        hidden = output.last_hidden_state
        if real is not None:  # back to the layout of packed.tokens: [1, total, d]
            hidden = hidden[real].unsqueeze(0)
        return hidden, FastWeightState(output.state) if keep_state else None
