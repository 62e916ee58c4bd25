"""DeltaNet and Gated DeltaNet as vLLM runs them, on its own gated-delta-net layer.

What a model lacks is given to the layer as constants: DeltaNet's decay is exp(-exp(A_log) softplus(0)) = 1 with
A_log = -100, and without an output gate the gate is sigmoid(0) = 1/2 and the norm's weight twice as large.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFunc,
    MambaStateCopyFuncCalculator,
    MambaStateDtypeCalculator,
    MambaStateShapeCalculator,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsAttentionFree, SupportsLoRA
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.utils import WeightsMapper, maybe_prefix

from refine_verl.serving.configs import LayerSettings, has_decay, layer_settings, mlp_size

PARTS = {
    "q_proj": ("in_proj_qkvz", 0),
    "k_proj": ("in_proj_qkvz", 1),
    "v_proj": ("in_proj_qkvz", 2),
    "g_proj": ("in_proj_qkvz", 3),
    "b_proj": ("in_proj_ba", 0),
    "a_proj": ("in_proj_ba", 1),
    "q_conv1d": ("conv1d", 0),
    "k_conv1d": ("conv1d", 1),
    "v_conv1d": ("conv1d", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
"""Modules of fla that are a part of one of vLLM's: which, and which part."""

RENAMED = {"o_proj": "out_proj", "o_norm": "norm"}


def _packed() -> dict[str, list[str]]:
    """Of vLLM's modules that have parts, fla's names of these in their order; convolutions take no adapter."""
    found: dict[str, list[str]] = {}
    for name, (target, _) in sorted(PARTS.items(), key=lambda item: item[1]):
        if target != "conv1d":
            found.setdefault(target, []).append(name)
    return found


NO_DECAY = -100.0
"""A_log of a state that does not decay: exp(-exp(-100) log 2) is 1 in every floating-point type."""


class _Mixer(QwenGatedDeltaNetAttention):
    """vLLM's layer, whose convolution takes fla's three weights one after the other."""

    def __init__(self, settings: LayerSettings, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(settings, vllm_config, prefix, gqa_interleaved_layout=False)
        self.conv1d.weight.weight_loader = self._load_convolution

    def _load_convolution(self, param: nn.Parameter, loaded: Tensor, part: int) -> None:
        """Put the weights [channels, 1, width] of queries (0), keys (1) or values (2) in their place.

        vLLM's reloading hands over the parameter as ``param``, and would fill another one under any other name.
        """
        sizes = [size // self.tp_size for size in (self.key_dim, self.key_dim, self.value_dim)]
        expected = (sizes[part] * self.tp_size, 1, self.conv_kernel_size)
        if tuple(loaded.shape) != expected:
            raise ValueError(f"a convolution of {self.prefix} has the shape {tuple(loaded.shape)}, not {expected}")
        start = sum(sizes[:part])
        share = loaded[self.tp_rank * sizes[part] : (self.tp_rank + 1) * sizes[part]]
        param.data[start : start + sizes[part]].copy_(share)


class _Block(nn.Module):
    def __init__(self, config: PretrainedConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = _Mixer(layer_settings(config), vllm_config, prefix=f"{prefix}.attn")
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = LlamaMLP(config.hidden_size, mlp_size(config), "silu", prefix=f"{prefix}.mlp")

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual, hidden = hidden, self.attn_norm(hidden)
        else:
            hidden, residual = self.attn_norm(hidden, residual)
        hidden, residual = self.mlp_norm(self.attn(hidden), residual)
        return self.mlp(hidden), residual


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "inputs_embeds": 0})
class FastWeightModel(nn.Module):
    """The trunk: tokens [N] of all sequences of a batch, one after the other, to hidden states [N, d]."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embeddings = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            _Block(config, vllm_config, f"{prefix}.layers.{index}") for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        hidden = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        residual = None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        hidden, _ = self.norm(hidden, residual)
        return hidden


class FastWeightForCausalLM(nn.Module, HasInnerState, IsAttentionFree, SupportsLoRA):
    """A model of one of the two families, with weights named as fla names them, and adapters of PEFT likewise."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = _packed()
    # of adapters' names; weights go through `load_weights`
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_substr={f".attn.{name}.": f".attn.{target}." for name, target in RENAMED.items()}
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.model = FastWeightModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.config.vocab_size, self.config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        if self.config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embeddings)
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        self._from_checkpoint = vllm_config.load_config.load_format != "dummy"

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings [N, d] of tokens [N]."""
        return self.model.embeddings(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [N, d] of tokens [N]; vLLM holds the states and says in its context whose tokens they are."""
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits [N, V] of hidden states [N, d]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take weights by fla's names: all of them, or later, when they are updated, some.

        Returns:
            The parameters that were given something.

        Raises:
            ValueError: a weight that this model does not have; a checkpoint that lacks one.
        """
        parameters = dict(self.named_parameters())
        given: dict[str, set[int | None]] = {}
        for name, weight in self._completed(weights):
            place, part = _place(name)
            if place not in parameters:
                raise ValueError(f"{name}: a {self.config.model_type} as vLLM computes it has no such weight")
            parameter = parameters[place]
            load = getattr(parameter, "weight_loader", default_weight_loader)
            load(parameter, weight) if part is None else load(parameter, weight, part)
            given.setdefault(place, set()).add(part)
        if self._from_checkpoint:
            self._from_checkpoint = False
            _check_complete(parameters, given)
        return set(given)

    def _completed(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights, and constants for those of vLLM's layer that this model does not have."""
        settings = layer_settings(self.config)
        tied = self.config.tie_word_embeddings
        for name, weight in weights:
            if tied and name == "lm_head.weight":
                continue
            if tied and name == "model.embeddings.weight" and "lm_head.weight" in dict(self.named_parameters()):
                yield "lm_head.weight", weight  # while vLLM reloads, it takes the two apart
            yield name, 2 * weight if name.endswith(".attn.o_norm.weight") and not self.config.use_gate else weight
        heads, width = settings.linear_num_value_heads, settings.hidden_size
        for index in range(self.config.num_hidden_layers):
            layer = f"model.layers.{index}.attn"
            if not self.config.use_gate:
                yield f"{layer}.g_proj.weight", torch.zeros(heads * settings.linear_value_head_dim, width)
            if not has_decay(self.config):
                yield f"{layer}.a_proj.weight", torch.zeros(heads, width)
                yield f"{layer}.A_log", torch.full((heads,), NO_DECAY)
                yield f"{layer}.dt_bias", torch.zeros(heads)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, torch.dtype]:
        """Types of convolution states and recurrent states."""
        cache = vllm_config.cache_config
        return MambaStateDtypeCalculator.gated_delta_net_state_dtype(
            vllm_config.model_config.dtype, cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype
        )

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a sequence's convolution state and recurrent state in one layer on one device."""
        settings = layer_settings(vllm_config.model_config.hf_config)
        return MambaStateShapeCalculator.gated_delta_net_state_shape(
            vllm_config.parallel_config.tensor_parallel_size,
            settings.linear_num_key_heads,
            settings.linear_num_value_heads,
            settings.linear_key_head_dim,
            settings.linear_value_head_dim,
            settings.linear_conv_kernel_dim,
            vllm_config.num_speculative_tokens,
        )

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, MambaStateCopyFunc]:
        """How vLLM copies the two states for prefix caching."""
        return MambaStateCopyFuncCalculator.gated_delta_net_state_copy_func()


def _place(name: str) -> tuple[str, int | None]:
    """Where a weight of fla's goes: the name of vLLM's parameter, and the part of it (None: all)."""
    path, _, leaf = name.rpartition(".")
    path, _, module = path.rpartition(".")
    target, part = PARTS.get(module, (RENAMED.get(module, module), None))
    return ".".join(filter(None, [path, target, leaf])), part


def _check_complete(parameters: Iterable[str], given: dict[str, set[int | None]]) -> None:
    """vLLM does not look whether linear layers were given their weights, nor whether all parts of a weight came."""
    missing: list[str] = []
    for place in parameters:
        module, _, leaf = place.rpartition(".")
        path, _, module = module.rpartition(".")
        parts: dict[str, int | None] = {
            f"{path}.{name}.{leaf}": part for name, (target, part) in PARTS.items() if target == module
        }
        missing += [name for name, part in (parts or {place: None}).items() if part not in given.get(place, ())]
    if missing:
        raise ValueError(f"the checkpoint lacks {', '.join(sorted(missing))}")
