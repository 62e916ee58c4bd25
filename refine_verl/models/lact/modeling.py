"""LaCT language models: sliding-window attention and fast weights side by side in every layer.

Parameters carry the names and shapes of the published checkpoints. Tokens of all sequences are concatenated,
[tokens, d], without padding: what is not there cannot be written into the memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from refine_verl.models.lact.attention import Pair, attend, rotary_table, rotate
from refine_verl.models.lact.attention_plan import Plan, plan_attention
from refine_verl.models.lact.configuration import LaCTConfig
from refine_verl.models.lact.fast_weights import ChunkTokens, FastWeights, Matrices, initial_weights
from refine_verl.models.lact.scan import Keep, ScanPlan, keep_fast, keep_open, plan_keep, plan_scan, scan
from refine_verl.models.lact.state import LaCTCache, LaCTState, LayerState
from refine_verl.models.lact.take import Layout
from refine_verl.nsp.entropy import accumulation_dtype

BASE_RATE = 1e-3
_QK_EPSILON = 1e-5
_TTT_EPSILON = 1e-5


@dataclass(frozen=True)
class LayerTrace:
    """All a layer computed that a state may be made of: rotated k and v [tokens, H, D], open tokens, fast weights."""

    k: Tensor
    v: Tensor
    tokens: ChunkTokens
    lots: tuple[FastWeights, ...]


TakeStates = Callable[[LayerTrace], LayerState]
"""From all a layer computed to its states at places that are known."""


@dataclass(frozen=True)
class Pass:
    """What all layers need to know of one pass; everything that depends on lengths and positions alone.

    Attributes:
        scan: plan of the fast weights.
        attention: plan of the window, None for W = 1.
        keep: how the state after it is made, None if nobody wants it.
        positions: of every token in its sequence, int64 [tokens].
        traced: whether layers hand out all they computed instead of the state after the last token.
        take: what is taken of that at once; None: all.
    """

    scan: ScanPlan
    attention: Plan | None
    keep: Keep | None
    positions: Tensor
    traced: bool
    take: TakeStates | None = None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in at least float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        precise = accumulation_dtype(x)
        return F.rms_norm(x.to(precise), self.weight.shape, self.weight.to(precise), self.eps).to(x.dtype)


class LowRankMatrix(nn.Module):
    """w_left w_right + identity / 2, per head."""

    def __init__(self, heads: int, rows: int, columns: int, rank: int, gain: float) -> None:
        super().__init__()
        self.w_left = nn.Parameter(torch.empty(heads, rows, rank))
        self.w_right = nn.Parameter(torch.empty(heads, rank, columns))
        self.gain = gain

    def forward(self, precise: bool) -> Tensor:
        """[heads, rows, columns]; ``precise``: in at least float32, whatever autocast says."""
        left, right = self.w_left, self.w_right
        if precise:
            with torch.autocast(left.device.type, enabled=False):
                product = left.to(accumulation_dtype(left)) @ right.to(accumulation_dtype(right))
        else:
            product = left @ right
        return product + 0.5 * torch.eye(*product.shape[1:], device=product.device, dtype=product.dtype)

    def reset(self) -> None:
        """Random factors, as published."""
        nn.init.normal_(self.w_left, std=self.gain / math.sqrt(self.w_left.shape[-1]))
        nn.init.normal_(self.w_right, std=self.gain / math.sqrt(self.w_right.shape[-1]))


class _Touch(torch.autograd.Function):
    """Passes x on and gives everything else a zero gradient.

    Whether rates and momentum (and with W = 1 keys) matter depends on the lengths of the documents; under FSDP all
    ranks have to reduce the gradients of the same parameters.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.shapes = [(other.shape, other.dtype) for other in others]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return (grad, *(grad.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.shapes))


class LaCTAttention(nn.Module):
    """Window attention plus fast weights, both from the same q, k, v."""

    def __init__(self, config: LaCTConfig) -> None:
        super().__init__()
        self.config = config
        width, heads = config.hidden_size, config.num_lact_heads
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        if config.attn_qk_norm:
            self.q_norm, self.k_norm = RMSNorm(width, _QK_EPSILON), RMSNorm(width, _QK_EPSILON)
        self.o_proj = nn.Linear(width, width, bias=False)
        rows, columns, rank = config.fw_inner_dim, config.fw_head_dim, config.w0_w2_low_rank
        for name in ("w0", "w2"):
            if rank > 0:
                setattr(self, name, LowRankMatrix(heads, rows, columns, rank, config.fw_init_gain))
            else:
                setattr(self, name, nn.Parameter(torch.empty(heads, rows, columns)))
        self.w1 = nn.Parameter(torch.empty(heads, columns, rows))
        self.lr_proj = nn.Linear(width, 3 * heads * config.lr_dim)
        self.qk_scale = nn.Parameter(torch.ones(width, 2))
        self.qk_offset = nn.Parameter(torch.zeros(width, 2))
        if config.learnable_ttt_scale:
            self.ttt_scale_proj = nn.Linear(width, heads)
        self.ttt_norm = RMSNorm(columns, _TTT_EPSILON)
        if config.use_momentum:
            self.momentum_proj = nn.Sequential(nn.Linear(width, heads), nn.Sigmoid())

    def reset(self) -> None:
        """Random fast weights, as published."""
        nn.init.ones_(self.qk_scale)
        nn.init.zeros_(self.qk_offset)
        for weight in (self.w0, self.w1, self.w2):
            if isinstance(weight, nn.Parameter):
                nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[-1]))

    def forward(self, x: Tensor, run: Pass, state: LayerState) -> tuple[Tensor, LayerState | LayerTrace | None]:
        """x [tokens, d] -> the same, and what the pass asks for: a state, a trace or nothing."""
        config = self.config
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if config.attn_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        table = rotary_table(run.positions, config, q.dtype)
        tokens = self._tokens(x, k, v, table)
        fast_q = self._fast(q, 0, table)
        q, k, v = (part.unflatten(-1, (config.num_attn_heads, -1)) for part in (q, k, v))
        k = rotate(k, table)
        attended, after = attend(run.attention, state, config.window_size, rotate(q, table), k, v)
        initial = norms = None
        if run.scan.initial is not None or run.scan.segments is not None or torch.is_grad_enabled():
            initial, norms = self._initial()
        recalled, lots = scan(config, run.scan, state, initial, norms, fast_q, tokens)
        if torch.is_grad_enabled():
            assert initial is not None
            others = (tokens.rates, tokens.momentum, None if run.attention else tokens.k, *initial.used)
            recalled = _Touch.apply(recalled, *(part for part in others if part is not None and part.requires_grad))
        recalled = self.ttt_norm(recalled)
        if config.learnable_ttt_scale:
            recalled = recalled * F.silu(self.ttt_scale_proj(x)).unsqueeze(-1)
        out = self.o_proj(attended.flatten(1) + recalled.flatten(1))
        if run.traced:
            trace = LayerTrace(k, v, tokens, tuple(lots))
            return out, trace if run.take is None else run.take(trace)
        if run.keep is None:
            return out, None
        open_ = keep_open(run.keep, [*state.open, tokens])
        return out, replace(after, fast=keep_fast(run.keep, lots), open=open_)

    def _fast(self, x: Tensor, column: int, table: Pair) -> Tensor:
        """Fast queries (column 0) or keys (1), [tokens, h, d]: SiLU, length 1, then the rotation of the window."""
        config, dtype = self.config, x.dtype
        x = x * self.qk_scale[:, column] + self.qk_offset[:, column]
        if config.qkv_silu:
            x = F.silu(x)
        x = x.unflatten(-1, (config.num_lact_heads, -1))
        x = (x / (x.norm(dim=-1, keepdim=True) + 1e-5)).to(dtype)
        if not config.ttt_nope:
            turned = rotate(x.flatten(1).unflatten(-1, (config.num_attn_heads, -1)), table)
            x = turned.flatten(1).unflatten(-1, (config.num_lact_heads, -1))
        return x

    def _tokens(self, x: Tensor, k: Tensor, v: Tensor, table: Pair) -> ChunkTokens:
        config = self.config
        fast_v = F.silu(v) if config.qkv_silu and not config.no_v_silu else v
        raw = self.lr_proj(x)
        shift = BASE_RATE + math.log(-math.expm1(-BASE_RATE))  # softplus(shift) = BASE_RATE
        rates = F.softplus(raw.to(accumulation_dtype(raw)) + shift).unflatten(-1, (config.num_lact_heads, -1))
        momentum = None
        if config.use_momentum:
            momentum = self.momentum_proj(x)
            momentum = momentum.to(accumulation_dtype(momentum))
        return ChunkTokens(self._fast(k, 1, table), fast_v.unflatten(-1, (config.num_lact_heads, -1)), rates, momentum)

    def _initial(self) -> tuple[FastWeights, Matrices]:
        """The set every sequence starts with, and n_i."""
        precise = self.config.fp32_states
        w0, w2 = (w(precise) if isinstance(w, LowRankMatrix) else cast(Tensor, w) for w in (self.w0, self.w2))
        return initial_weights(self.config, (w0, self.w1, w2))


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: LaCTConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.mlp_dim
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return out


class LaCTBlock(nn.Module):
    """h + mixer(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, config: LaCTConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = LaCTAttention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, hidden: Tensor, run: Pass, state: LayerState) -> tuple[Tensor, LayerState | LayerTrace | None]:
        """hidden [tokens, d]; see :meth:`LaCTAttention.forward`."""
        mixed, after = self.attn(self.attn_norm(hidden), run, state)
        hidden = hidden + mixed
        return hidden + self.mlp(self.mlp_norm(hidden)), after


class LaCTPreTrainedModel(PreTrainedModel):
    config_class = LaCTConfig
    base_model_prefix = "model"
    _no_split_modules = ["LaCTBlock"]
    _input_embed_layer = "embeddings"
    _is_stateful = True
    # what the window attention runs on, so that asking for it by name is no error
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LaCTAttention | LowRankMatrix):
            module.reset()


@dataclass(frozen=True)
class Trunk:
    """What a pass over runs of tokens gives.

    Attributes:
        hidden: [tokens, d], after the final norm.
        state: after the last token of each run, None unless asked for.
        trace: of every layer, or what was taken of it; empty unless asked for.
        inner: [tokens, d] before each layer, empty unless asked for.
        plan: of the fast weights, None for a pass over nothing.
    """

    hidden: Tensor
    state: LaCTState | None
    trace: tuple[Any, ...]
    inner: tuple[Tensor, ...]
    plan: ScanPlan | None


class LaCTModel(LaCTPreTrainedModel):
    """The trunk: everything but the LM head."""

    def __init__(self, config: LaCTConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LaCTBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: LaCTCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Args:
        input_ids: [B, L], or ``inputs_embeds`` [B, L, d].
        attention_mask: [B, L] or longer, 0 for padding; padding changes nothing for the other tokens.
        past_key_values: what an earlier call returned; is written to if ``use_cache``.
        use_cache: whether to return the state; default: that of the configuration, but not in training.
        cu_seqlens: [runs + 1], borders of sequences packed into one row. With ``past_key_values``, one run per
            sequence of it.

        Raises:
            ValueError: neither or both of tokens and embeddings, or a layout that does not fit them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        batch = input_ids if input_ids is not None else inputs_embeds
        assert batch is not None
        layout = Layout.of(batch, attention_mask, cu_seqlens)
        hidden = layout.flatten(batch)
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training
        before = None if past_key_values is None else past_key_values.state
        done = self.run(
            self.embeddings(hidden) if inputs_embeds is None else hidden,
            layout.lengths,
            before,
            keep=use_cache,
            inner=bool(output_hidden_states),
        )
        if use_cache:
            past_key_values = LaCTCache() if past_key_values is None else past_key_values
            past_key_values.state = done.state
            past_key_values.seen_tokens += layout.shape[1]
        last = layout.unflatten(done.hidden)
        every = tuple(layout.unflatten(part) for part in done.inner)
        output = BaseModelOutputWithPast(
            last_hidden_state=last,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*every, last) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    def run(
        self,
        hidden: Tensor,
        lengths: Sequence[int],
        state: LaCTState | None = None,
        *,
        keep: bool = False,
        trace: bool = False,
        take: Callable[[ScanPlan], TakeStates] | None = None,
        inner: bool = False,
    ) -> Trunk:
        """The layers over embeddings [tokens, d] of runs of ``lengths``, from a state with one row per run.

        With ``trace`` all that states are made of is handed out, or what ``take`` of the plan makes of it, per layer.

        Raises:
            ValueError: the state has another number of rows.
        """
        state = LaCTState.empty(len(lengths), len(self.layers)) if state is None else state
        if state.rows != len(lengths):
            raise ValueError(f"a state of {state.rows} sequences cannot go on with {len(lengths)} runs of tokens")
        if not sum(lengths):
            return Trunk(self.norm(hidden), state, (), (), None)
        run = plan_pass(self.config, state, lengths, keep, trace, hidden.device)
        if take is not None:
            run = replace(run, take=take(run.scan))
        before, after = [], []
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            if inner:
                before.append(hidden)
            hidden, result, *_ = layer(hidden, run, layer_state)
            after.append(result)
        made = None
        if run.keep is not None:
            made = LaCTState(run.keep.where, tuple(part for part in after if isinstance(part, LayerState)))
        traces = tuple(after) if trace else ()
        return Trunk(self.norm(hidden), made, traces, tuple(before), run.scan)


def plan_pass(
    config: LaCTConfig, state: LaCTState, lengths: Sequence[int], keep: bool, trace: bool, device: torch.device
) -> Pass:
    """Work out what depends on lengths and positions alone."""
    where, first = state.where, state.layers[0]
    attention, moved = plan_attention(where, lengths, first, config.window_size, keep, device)
    plan = plan_scan(where, lengths, len(first.fast), config.lact_chunk_size, device)
    kept = None
    if keep:
        sizes = [*(buffer.k.shape[0] for buffer in first.open), sum(lengths)]
        kept = plan_keep(moved, lengths, plan, sizes, config.lact_chunk_size, device)
    spans = zip(where.seen, lengths, strict=True)
    positions = torch.cat([torch.arange(seen, seen + length) for seen, length in spans]).to(device, non_blocking=True)
    return Pass(plan, attention, kept, positions, trace)


class LaCTForCausalLM(LaCTPreTrainedModel, GenerationMixin):
    """The trunk with an LM head; ``generate`` continues from the state and never reads a token twice."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: LaCTConfig) -> None:
        super().__init__(config)
        self.model = LaCTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first pass makes a LaCTCache

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: LaCTCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """See :meth:`LaCTModel.forward`.

        Args:
            labels: [B, L]; token t is scored against what t - 1 predicts, -100 is left out.
            logits_to_keep: the last so many positions only (0: all), or their indices.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = output.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        made = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=output.past_key_values, hidden_states=output.hidden_states
        )
        return made.to_tuple() if return_dict is False else made
