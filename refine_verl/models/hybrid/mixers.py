"""The linear layers of hybrids in transformers: projections and norms are the model's, the recurrence is fla's.

transformers' own forward functions let packed documents see each other, and write into the state they were given. What
runs here instead is a short convolution and a gated delta rule from a state to a state, by the names at which
`refine_verl.kernels.patch` puts operators that can be cut, and stand-ins for the CPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from refine_verl.models.packing import Packed

RECURRENT_AT_MOST = 64
"""Tokens of a pass without gradients that fla's recurrent kernel reads faster than its chunked one, as in fla."""

LinearState = dict[str, Any]
"""``recurrent``: [R, heads, K, V], float32 or float64. ``conv``: a tuple of [R, D, W], the last inputs."""


@dataclass
class LinearOfLayer:
    """What a linear layer reads and leaves behind in one pass.

    Attributes:
        packed: the tokens of the pass.
        before: the state before them; None before the first token.
        keep: whether the state after them is wanted.
        after: that, once the layer has run.
    """

    packed: Packed
    before: LinearState | None
    keep: bool
    after: LinearState | None = None

    def run(
        self,
        inputs: Sequence[tuple[Tensor, nn.Module]],
        split: tuple[int, int, int],
        gates: tuple[Tensor, Tensor],
        mixer: Any,
        allow_neg_eigval: bool = False,
    ) -> Tensor:
        """Convolutions and delta rule.

        Args:
            inputs: projections [B, L, ..] and the convolution of each; together queries, keys and values.
            split: their widths.
            gates: logits of the decay and of the step size, [B, L, value heads] each.
            mixer: the layer's module, for its sizes, ``A_log`` and ``dt_bias``.
            allow_neg_eigval: step sizes up to 2.

        Returns:
            [B, L, value heads, V].
        """
        states = self.before["conv"] if self.before else (None,) * len(inputs)
        convolved, kept = zip(
            *(self._convolve(x, conv, state) for (x, conv), state in zip(inputs, states, strict=True)), strict=True
        )
        mixed = convolved[0] if len(convolved) == 1 else torch.cat(convolved, dim=-1)
        q, k, v = mixed.split(split, dim=-1)
        decay, step = gates
        out, final = self._rule()(
            q=q.unflatten(-1, (-1, mixer.head_k_dim)),
            k=k.unflatten(-1, (-1, mixer.head_k_dim)),
            v=v.unflatten(-1, (-1, mixer.head_v_dim)),
            g=decay,
            beta=step,
            initial_state=self.before["recurrent"] if self.before else None,
            output_final_state=self.keep,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            A_log=mixer.A_log,
            dt_bias=mixer.dt_bias,
            use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=allow_neg_eigval,
            cu_seqlens=self.packed.cu_seqlens,
        )
        if self.keep:
            self.after = {"recurrent": final, "conv": kept}
        assert isinstance(out, Tensor)
        return out

    def _rule(self) -> Any:
        short = max(self.packed.lengths) <= RECURRENT_AT_MOST and not torch.is_grad_enabled()
        layers = importlib.import_module("fla.layers.gated_deltanet")  # as it is now: what stands there may change
        return layers.fused_recurrent_gated_delta_rule if short else layers.chunk_gated_delta_rule

    def _convolve(self, x: Tensor, conv: Any, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        operator = importlib.import_module("fla.modules.causal_conv1d.ops").causal_conv1d
        out: tuple[Tensor, Tensor | None] = operator(
            x,
            weight=conv.weight.squeeze(1),
            bias=conv.bias,
            initial_state=state,
            output_final_state=self.keep,
            activation="silu",
            cu_seqlens=self.packed.cu_seqlens,
        )
        return out


def qwen3_5(mixer: Any, layer: LinearOfLayer, hidden: Tensor) -> Tensor:
    """A linear layer of Qwen3.5, [B, L, d]: one projection and one convolution for queries, keys and values."""
    gates = mixer.in_proj_a(hidden), mixer.in_proj_b(hidden)
    out = layer.run(
        [(mixer.in_proj_qkv(hidden), mixer.conv1d)], (mixer.key_dim, mixer.key_dim, mixer.value_dim), gates, mixer
    )
    return _projected(mixer.out_proj, mixer.norm, out, mixer.in_proj_z(hidden))


def qwen3_next(mixer: Any, layer: LinearOfLayer, hidden: Tensor) -> Tensor:
    """A linear layer of Qwen3-Next, [B, L, d]: as Qwen3.5's, with its projections side by side for each key head."""
    ordered = mixer.fix_query_key_value_ordering(mixer.in_proj_qkvz(hidden), mixer.in_proj_ba(hidden))
    *inputs, gate, step, decay = ordered
    mixed = torch.cat([x.flatten(2) for x in inputs], dim=-1)
    out = layer.run([(mixed, mixer.conv1d)], (mixer.key_dim, mixer.key_dim, mixer.value_dim), (decay, step), mixer)
    return _projected(mixer.out_proj, mixer.norm, out, gate)


def olmo_hybrid(mixer: Any, layer: LinearOfLayer, hidden: Tensor) -> Tensor:
    """A linear layer of OLMo-hybrid, [B, L, d]: projections and convolutions of their own."""
    names = ("q", "k", "v")
    inputs = [(getattr(mixer, f"{x}_proj")(hidden), getattr(mixer, f"{x}_conv1d")) for x in names]
    gates = mixer.a_proj(hidden), mixer.b_proj(hidden)
    out = layer.run(
        inputs, (mixer.key_dim, mixer.key_dim, mixer.value_dim), gates, mixer, allow_neg_eigval=mixer.allow_neg_eigval
    )
    return _projected(mixer.o_proj, mixer.o_norm, out, mixer.g_proj(hidden))


def _projected(projection: nn.Module, norm: nn.Module, out: Tensor, gate: Tensor) -> Tensor:
    """Norm and gate per head, then the output projection."""
    normed = norm(out.flatten(0, 2), gate.reshape(-1, out.shape[-1]))
    projected: Tensor = projection(normed.reshape(*out.shape[:2], -1))
    return projected


Mixer = Callable[[Any, LinearOfLayer, Tensor], Tensor]

MIXERS: dict[str, Mixer] = {"olmo_hybrid": olmo_hybrid, "qwen3_5_text": qwen3_5, "qwen3_next": qwen3_next}
"""By ``model_type``: what a linear layer computes, from its module, its state and its input."""
