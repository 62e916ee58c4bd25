"""Configuration of LaCT language models, field by field that of the published checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

_LAYER = re.compile(r"(?:model\.)?layers\.\d+\.attn\.(.+)$")
MUON_DTYPES = ("auto", "bfloat16", "float32")


class LaCTConfig(PretrainedConfig):
    """LaCT with SwiGLU fast weights f_W(u) = W1 (silu(W0 u) * (W2 u)).

    Names and defaults are the published ones; fields this class does not know are kept as attributes. Those that
    choose a kernel (``fuse_norm``, ``last_layer_fuse_norm``, ``fuse_swiglu``, ``fuse_cross_entropy``), the unused
    ``elementwise_affine`` and ``max_position_embeddings`` do not change what is computed here.

    Args:
        num_attn_heads: heads of the sliding-window attention.
        num_lact_heads: heads of the fast weights, each ``hidden_size / num_lact_heads`` wide.
        inter_multi: inner width of the fast weights in multiples of their width.
        lact_chunk_size: C, tokens between two updates of the fast weights.
        window_size: W, keys each query sees, itself included; None for all before it.
        use_muon: orthogonalise updates (five Newton-Schulz steps).
        lr_dim: learning rates per token, head and matrix: 1, or one per column.
        qkv_silu, no_v_silu: SiLU on the fast q, k, v; not on v.
        learnable_ttt_scale: a gate per token and head on what the fast weights return.
        use_momentum: carry updates over, by a factor that the tokens choose.
        ttt_prenorm: keep un-normalised weights beside the ones that are used.
        ttt_nope: no rotary embedding in the fast-weight path.
        w0_w2_low_rank: rank of the initial W0 and W2 (plus half the identity); not positive: dense.
        fw_init_gain: scale of the random low-rank factors.
        fp32_states: compute the initial fast weights in float32 under bf16 autocast, too. The fast weights that are
            carried are never kept in less than float32.
        use_fused_kernel: the published fused variant, which orthogonalises W0 and W2 together and, post-norm, divides
            by sqrt(|row|^2 + 1e-5).
        muon_dtype: precision of the Newton-Schulz step. ``auto``: bfloat16, as published, but float64 in a
            float64 model; ``bfloat16``: always; ``float32``: that of the fast weights, at least float32.
        compile_fast_weights: run the update of the fast weights through ``torch.compile``.

    Raises:
        ValueError: a value outside of what the model is defined for; names the field and what is allowed.
    """

    model_type = "lact_swiglu"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        hidden_size: int = 2048,
        num_hidden_layers: int = 24,
        num_attn_heads: int = 32,
        num_lact_heads: int = 4,
        inter_multi: float = 1,
        qkv_bias: bool = False,
        attn_qk_norm: bool = False,
        lact_chunk_size: int = 2048,
        window_size: int | None = 2048,
        use_muon: bool = False,
        lr_dim: int = 1,
        qkv_silu: bool = True,
        no_v_silu: bool = False,
        lr_parameterization: str = "mamba",
        learnable_ttt_scale: bool = True,
        use_momentum: bool = True,
        ttt_loss_type: str = "dot_product",
        ttt_prenorm: bool = False,
        ttt_nope: bool = False,
        w0_w2_low_rank: int = -1,
        rope_theta: float = 10000.0,
        max_position_embeddings: int = 2048,
        hidden_ratio: float | None = 4,
        intermediate_size: int | None = None,
        hidden_act: str = "swish",
        initializer_range: float = 0.006,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-6,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        tie_word_embeddings: bool = False,
        fuse_norm: bool = True,
        last_layer_fuse_norm: bool = True,
        fuse_swiglu: bool = True,
        fuse_cross_entropy: bool = True,
        vocab_size: int = 32000,
        fw_init_gain: float = 0.5,
        use_fused_kernel: bool = False,
        fp32_states: bool = False,
        muon_dtype: str = "auto",
        compile_fast_weights: bool = False,
        **kwargs: Any,
    ) -> None:
        own = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        special = ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")
        for name, value in own.items():
            if name not in special:
                setattr(self, name, value)
        super().__init__(**{name: own[name] for name in special}, **kwargs)
        self.check()

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return int(self.hidden_size // self.num_attn_heads)

    @property
    def fw_head_dim(self) -> int:
        """d_in = d_out of the fast weights."""
        return int(self.hidden_size // self.num_lact_heads)

    @property
    def fw_inner_dim(self) -> int:
        """d_h of the fast weights."""
        return int(self.fw_head_dim * self.inter_multi)

    @property
    def mlp_dim(self) -> int:
        """Width of the MLP."""
        if self.intermediate_size is not None:
            return int(self.intermediate_size)
        return 256 * -(-int(self.hidden_size * (self.hidden_ratio or 4) * 2 / 3) // 256)

    def check_weights(self, weights: Mapping[str, Sequence[int]]) -> None:
        """Refuse to load weights whose names and shapes contradict this configuration.

        Not told by weights, and so taken from the configuration: attention heads, muon, rotary embeddings, pre- or
        post-norm, SiLU, window, chunk and the rotary base.

        Args:
            weights: shape of every tensor of the checkpoint.

        Raises:
            ValueError: names every field that disagrees, with its value in the configuration and in the weights.
        """
        found = [(match[1], tuple(shape)) for name, shape in weights.items() if (match := _LAYER.search(name))]
        if not found:
            return
        told: dict[str, set[Any]] = {}
        heads = next((shape[0] for name, shape in found if name == "w1"), self.num_lact_heads)
        for name, shape in found:
            for field, value in _tells(self, name, shape, heads):
                told.setdefault(field, set()).add(value)
        names = {name for name, _ in found}
        told["attn_qk_norm"] = {"q_norm.weight" in names}
        told["use_momentum"] = {"momentum_proj.0.weight" in names}
        told["learnable_ttt_scale"] = {"ttt_scale_proj.weight" in names}
        told["qkv_bias"] = {"qkv.bias" in names}
        wrong = []
        for field, values in told.items():
            written = getattr(self, field)
            if field == "w0_w2_low_rank" and written <= 0:
                written = -1
            if values != {written}:
                seen = " or ".join(str(value) for value in sorted(values, key=str))
                wrong.append(f"{field} is {written} in the configuration and {seen} in the weights")
        if wrong:
            raise ValueError("; ".join(wrong))

    def check(self) -> None:
        """See the class for what is raised."""
        for name in ("num_attn_heads", "num_lact_heads"):
            heads = getattr(self, name)
            if heads < 1 or self.hidden_size % heads:
                raise ValueError(f"{name}={heads} does not divide hidden_size={self.hidden_size}")
        if self.head_dim % 2:
            raise ValueError(
                f"num_attn_heads={self.num_attn_heads} makes heads of {self.head_dim} features; rotary embeddings need "
                "an even number"
            )
        if self.lact_chunk_size < 1:
            raise ValueError(f"lact_chunk_size={self.lact_chunk_size}: at least 1 token")
        if self.window_size is not None and self.window_size < 1:
            raise ValueError(f"window_size={self.window_size}: at least 1, or null for all tokens before")
        columns = {self.fw_head_dim, self.fw_inner_dim}
        if self.lr_dim != 1 and columns != {self.lr_dim}:
            raise ValueError(
                f"lr_dim={self.lr_dim}: 1, or one rate per column of every fast weight; those have "
                f"{' and '.join(map(str, sorted(columns)))} columns"
            )
        for name, allowed in (
            ("lr_parameterization", ("mamba",)),
            ("ttt_loss_type", ("dot_product",)),
            ("muon_dtype", MUON_DTYPES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed: {', '.join(allowed)}")


def _tells(config: LaCTConfig, name: str, shape: tuple[int, ...], heads: int) -> list[tuple[str, Any]]:
    """What one tensor says of the configuration."""
    if name == "w1":
        _, width, inner = shape
        multiple: float = inner / width
        # a width that is no whole multiple is rounded down by the model
        same = int(width * config.inter_multi) == inner
        return [("num_lact_heads", heads), ("inter_multi", config.inter_multi if same else multiple)]
    if name in ("w0", "w2"):
        return [("w0_w2_low_rank", -1)]
    if name in ("w0.w_left", "w2.w_left"):
        return [("w0_w2_low_rank", shape[-1])]
    if name == "lr_proj.weight":
        return [("lr_dim", shape[0] // (3 * heads))]
    if name == "qkv.weight":
        return [("hidden_size", shape[1])]
    return []
