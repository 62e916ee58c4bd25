"""LaCT one token at a time, written from its definition and nothing else.

Plain loops over layers, heads, tokens and feature blocks; no batching, no chunked form, no cache. The fast weights
of a head are f_W(u) = W1 (silu(W0 u) * (W2 u)); before token t = C, 2C, ... they take a step on the inner loss
L = -sum_t <f_W(k_t), v_t> over the C tokens before it. That gradient comes from autograd, not from a closed form.

What a step of the method is, is a method of :class:`SequentialLaCT`: a test that wants to see a mistake caught
overrides it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NS_COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
BASE_LEARNING_RATE = 1e-3
DEFAULTS: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attn_heads": 32,
    "num_lact_heads": 4,
    "inter_multi": 1,
    "qkv_bias": False,
    "attn_qk_norm": False,
    "lact_chunk_size": 2048,
    "window_size": 2048,
    "use_muon": False,
    "lr_dim": 1,
    "qkv_silu": True,
    "no_v_silu": False,
    "learnable_ttt_scale": True,
    "use_momentum": True,
    "ttt_prenorm": False,
    "ttt_nope": False,
    "w0_w2_low_rank": -1,
    "rope_theta": 1e4,
    "hidden_ratio": 4,
    "intermediate_size": None,
    "norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_fused_kernel": False,
    "vocab_size": 32000,
}
"""Published default of every field that decides what a forward pass computes or what the parameters are."""
Matrices = tuple[Tensor, Tensor, Tensor]


def parameter_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of all parameters; ``config`` gives what differs from DEFAULTS."""
    c = {**DEFAULTS, **config}
    d, heads, vocabulary = c["hidden_size"], c["num_lact_heads"], c["vocab_size"]
    width = c["intermediate_size"] or 256 * -(-int(d * c["hidden_ratio"] * 2 / 3) // 256)
    fast, rank = d // heads, c["w0_w2_low_rank"]
    inner = int(fast * c["inter_multi"])
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (d,),
        "mlp_norm.weight": (d,),
        "mlp.gate_proj.weight": (width, d),
        "mlp.up_proj.weight": (width, d),
        "mlp.down_proj.weight": (d, width),
        "attn.qkv.weight": (3 * d, d),
        "attn.o_proj.weight": (d, d),
        "attn.w1": (heads, fast, inner),
        "attn.qk_scale": (d, 2),
        "attn.qk_offset": (d, 2),
        "attn.lr_proj.weight": (3 * heads * c["lr_dim"], d),
        "attn.lr_proj.bias": (3 * heads * c["lr_dim"],),
        "attn.ttt_norm.weight": (fast,),
    }
    for name in ("attn.w0", "attn.w2"):
        if rank > 0:
            layer |= {f"{name}.w_left": (heads, inner, rank), f"{name}.w_right": (heads, rank, fast)}
        else:
            layer[name] = (heads, inner, fast)
    if c["qkv_bias"]:
        layer["attn.qkv.bias"] = (3 * d,)
    if c["attn_qk_norm"]:
        layer |= {"attn.q_norm.weight": (d,), "attn.k_norm.weight": (d,)}
    for wanted, name in ((c["learnable_ttt_scale"], "ttt_scale_proj"), (c["use_momentum"], "momentum_proj.0")):
        if wanted:
            layer |= {f"attn.{name}.weight": (heads, d), f"attn.{name}.bias": (heads,)}
    shapes: dict[str, tuple[int, ...]] = {"model.embeddings.weight": (vocabulary, d), "model.norm.weight": (d,)}
    layers = range(c["num_hidden_layers"])
    shapes |= {f"model.layers.{i}.{name}": shape for i in layers for name, shape in layer.items()}
    return shapes if c["tie_word_embeddings"] else {**shapes, "lm_head.weight": (vocabulary, d)}


def newton_schulz(matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Five steps towards the nearest orthogonal matrix of one [rows, columns] matrix.

    Args:
        matrix: what to orthogonalise.
        dtype: everything is rounded to it, bfloat16 in the published form; None: the matrix's own.

    Returns:
        Same shape, in ``dtype``.
    """
    x = matrix if dtype is None else matrix.to(dtype)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.t()
    x = x / (x.norm() + 1e-7)
    for a, b, c in NS_COEFFICIENTS:
        gram = x @ x.t()
        x = a * x + (b * gram + (c * gram) @ gram) @ x
    return x.t() if tall else x


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis."""
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def l2_normalise(x: Tensor) -> Tensor:
    """``x / (|x| + 1e-5)`` of one vector."""
    return x / (x.square().sum().sqrt() + 1e-5)


def row_norms(matrix: Tensor) -> Tensor:
    """Length of each row, [rows, 1]."""
    return matrix.square().sum(dim=1, keepdim=True).sqrt()


def swiglu(weights: Matrices, u: Tensor) -> Tensor:
    """f_W(u) = W1 (silu(W0 u) * (W2 u)) of one vector."""
    w0, w1, w2 = weights
    return w1 @ (F.silu(w0 @ u) * (w2 @ u))


class SequentialLaCT:
    """Logits of one sequence.

    Args:
        config: published fields that differ from DEFAULTS.
        parameters: a state dict with the published names. Those that need a gradient get one.
        ns_dtype: precision of the Newton-Schulz steps; None: that of the fast weights.
        rope_dtype: precision of angles, sines and cosines; the published code takes float32.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        parameters: Mapping[str, Tensor],
        ns_dtype: torch.dtype | None = None,
        rope_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = {**DEFAULTS, **config}
        # the inner gradient needs autograd to see the fast weights, whoever calls
        self.parameters = {
            name: value if value.requires_grad else value.detach().requires_grad_()
            for name, value in parameters.items()
        }
        self.ns_dtype, self.rope_dtype = ns_dtype, rope_dtype

    def get(self, name: str) -> Any:
        return self.config[name]

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [T] -> logits [T, V] and hidden states after the final norm [T, d]."""
        eps = self.get("norm_eps")
        hidden = list(self.parameters["model.embeddings.weight"][tokens])
        for layer in range(self.get("num_hidden_layers")):
            p = self.layer_parameters(layer)
            mixed = self.mixer(p, [rms_norm(h, p["attn_norm.weight"], eps) for h in hidden])
            for t in range(len(hidden)):
                hidden[t] = hidden[t] + mixed[t]
                n = rms_norm(hidden[t], p["mlp_norm.weight"], eps)
                inner = F.silu(p["mlp.gate_proj.weight"] @ n) * (p["mlp.up_proj.weight"] @ n)
                hidden[t] = hidden[t] + p["mlp.down_proj.weight"] @ inner
        final = [rms_norm(h, self.parameters["model.norm.weight"], eps) for h in hidden]
        tied = self.get("tie_word_embeddings")
        head = self.parameters["model.embeddings.weight" if tied else "lm_head.weight"]
        return torch.stack([head @ h for h in final]), torch.stack(final)

    def layer_parameters(self, layer: int) -> dict[str, Tensor]:
        prefix = f"model.layers.{layer}."
        return {name.removeprefix(prefix): v for name, v in self.parameters.items() if name.startswith(prefix)}

    # The mixer: window attention plus memory, both from the same q, k, v

    def mixer(self, p: dict[str, Tensor], x: list[Tensor]) -> list[Tensor]:
        """Normalised hidden states of all tokens -> what the layer adds to them."""
        q, k, v = [], [], []
        for token in x:
            projected = p["attn.qkv.weight"] @ token
            if self.get("qkv_bias"):
                projected = projected + p["attn.qkv.bias"]
            query, key, value = projected.chunk(3)
            if self.get("attn_qk_norm"):
                query = rms_norm(query, p["attn.q_norm.weight"], 1e-5)
                key = rms_norm(key, p["attn.k_norm.weight"], 1e-5)
            q.append(query)
            k.append(key)
            v.append(value)
        attended = self.window_attention(q, k, v)
        recalled = self.memory(p, x, q, k, v)
        return [p["attn.o_proj.weight"] @ (attended[t] + recalled[t]) for t in range(len(x))]

    def window_attention(self, q: list[Tensor], k: list[Tensor], v: list[Tensor]) -> list[Tensor]:
        heads = self.get("num_attn_heads")
        q = [self.rotate(vector, t) for t, vector in enumerate(q)]
        k = [self.rotate(vector, t) for t, vector in enumerate(k)]
        outputs = []
        for t in range(len(q)):
            seen = [s for s in range(len(k)) if self.sees(t, s)]
            parts = []
            for query, keys, values in zip(
                q[t].chunk(heads),
                zip(*(k[s].chunk(heads) for s in seen), strict=True),
                zip(*(v[s].chunk(heads) for s in seen), strict=True),
                strict=True,
            ):
                scores = torch.stack([(query * key).sum() / query.shape[0] ** 0.5 for key in keys])
                weights = scores.softmax(0)
                parts.append(sum(weights[i] * values[i] for i in range(len(seen))))
            outputs.append(torch.cat(parts))
        return outputs

    def sees(self, t: int, s: int) -> bool:
        """Whether token t attends to token s: itself and the W-1 before it."""
        window = self.get("window_size")
        return s <= t and (window is None or t - s < window)

    def rotary_position(self, t: int) -> int:
        return t

    def rotate(self, x: Tensor, t: int) -> Tensor:
        """RoPE on a vector [hidden], in blocks of an attention head; pairs are (i, i + half a head)."""
        size = x.shape[0] // self.get("num_attn_heads")
        half = size // 2
        exponent = torch.arange(0, size, 2, dtype=self.rope_dtype) / size
        angle = self.rotary_position(t) * (1.0 / self.get("rope_theta") ** exponent)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        blocks = []
        for block in x.split(size):
            first, second = block[:half], block[half:]
            blocks += [first * cos - second * sin, first * sin + second * cos]
        return torch.cat(blocks)

    # The memory

    def memory(
        self, p: dict[str, Tensor], x: list[Tensor], q: list[Tensor], k: list[Tensor], v: list[Tensor]
    ) -> list[Tensor]:
        """What the fast weights say to every token, heads side by side."""
        heads = self.get("num_lact_heads")
        scale, offset = p["attn.qk_scale"], p["attn.qk_offset"]
        fast_q = [self.fast_qk(vector * scale[:, 0] + offset[:, 0], t) for t, vector in enumerate(q)]
        fast_k = [self.fast_qk(vector * scale[:, 1] + offset[:, 1], t) for t, vector in enumerate(k)]
        silu_v = self.get("qkv_silu") and not self.get("no_v_silu")
        fast_v = [F.silu(vector) if silu_v else vector for vector in v]
        outputs: list[list[Tensor]] = [[] for _ in x]
        for head in range(heads):
            mine = [[vector.chunk(heads)[head] for vector in vectors] for vectors in (fast_q, fast_k, fast_v)]
            rates = [self.learning_rates(p, token, head) for token in x]
            momenta = [self.token_momentum(p, token, head) for token in x]
            for t, y in enumerate(self.scan(self.initial_weights(p, head), *mine, rates, momenta)):
                z = rms_norm(y, p["attn.ttt_norm.weight"], 1e-5)
                if self.get("learnable_ttt_scale"):
                    gate = p["attn.ttt_scale_proj.weight"][head] @ x[t] + p["attn.ttt_scale_proj.bias"][head]
                    z = z * F.silu(gate)
                outputs[t].append(z)
        return [torch.cat(parts) for parts in outputs]

    def fast_qk(self, x: Tensor, t: int) -> Tensor:
        """SiLU, length 1 within each head, then the rotation of the window attention."""
        if self.get("qkv_silu"):
            x = F.silu(x)
        x = torch.cat([l2_normalise(part) for part in x.chunk(self.get("num_lact_heads"))])
        return x if self.get("ttt_nope") else self.rotate(x, t)

    def initial_weights(self, p: dict[str, Tensor], head: int) -> Matrices:
        def gate(name: str) -> Tensor:
            if f"attn.{name}" in p:
                return p[f"attn.{name}"][head]
            matrix = p[f"attn.{name}.w_left"][head] @ p[f"attn.{name}.w_right"][head]
            return matrix + 0.5 * torch.eye(*matrix.shape, dtype=matrix.dtype)

        return gate("w0"), p["attn.w1"][head], gate("w2")

    def learning_rates(self, p: dict[str, Tensor], token: Tensor, head: int) -> Matrices:
        """Of W0, W1, W2 at one token; each [lr_dim], over the columns of its matrix."""
        raw = p["attn.lr_proj.weight"] @ token + p["attn.lr_proj.bias"]
        base = torch.log(torch.expm1(torch.tensor(BASE_LEARNING_RATE, dtype=torch.float64))).item()
        lr0, lr1, lr2 = F.softplus(raw.chunk(self.get("num_lact_heads"))[head] + base).chunk(3)
        return lr0, lr1, lr2

    def token_momentum(self, p: dict[str, Tensor], token: Tensor, head: int) -> Tensor | None:
        if not self.get("use_momentum"):
            return None
        return torch.sigmoid(p["attn.momentum_proj.0.weight"][head] @ token + p["attn.momentum_proj.0.bias"][head])

    def chunk_to_absorb(self, t: int) -> range:
        """Tokens whose update happens right before token t is read."""
        size = self.get("lact_chunk_size")
        return range(t - size, t) if t > 0 and t % size == 0 else range(0)

    def scan(
        self,
        initial: Matrices,
        q: list[Tensor],
        k: list[Tensor],
        v: list[Tensor],
        rates: list[Matrices],
        momenta: list[Tensor | None],
    ) -> list[Tensor]:
        """One head over one sequence: f_W(q_t) with the fast weights in force at token t."""
        lengths = [row_norms(w) for w in initial]
        used, unnormalised = list(initial), list(initial)
        buffer: list[Tensor] | None = None
        outputs = []
        for t in range(len(q)):
            chunk = self.chunk_to_absorb(t)
            if chunk:
                weights = (used[0], used[1], used[2])
                step = [torch.zeros_like(w) for w in initial]
                for s in chunk:
                    for i, gradient in enumerate(inner_gradient(weights, k[s], v[s])):
                        step[i] = step[i] - rates[s][i][None, :] * gradient
                if self.get("use_momentum"):
                    step = self.add_momentum(step, buffer, [m for m in (momenta[s] for s in chunk) if m is not None])
                buffer = step
                updates = self.orthogonalised(step) if self.get("use_muon") else step
                for i in range(3):
                    unnormalised[i] = (unnormalised if self.get("ttt_prenorm") else used)[i] + updates[i]
                    used[i] = unnormalised[i] / self.divisor(unnormalised[i]) * lengths[i]
            outputs.append(swiglu((used[0], used[1], used[2]), q[t]))
        return outputs

    def orthogonalised(self, step: list[Tensor]) -> list[Tensor]:
        """Each on its own; W0 above W2 as one matrix in the published fused kernels."""
        if not self.get("use_fused_kernel"):
            return [newton_schulz(m, self.ns_dtype).to(m.dtype) for m in step]
        both = newton_schulz(torch.cat([step[0], step[2]]), self.ns_dtype).to(step[0].dtype)
        above, below = both.chunk(2)
        return [above, newton_schulz(step[1], self.ns_dtype).to(step[1].dtype), below]

    def divisor(self, matrix: Tensor) -> Tensor:
        """Length of each row and a little; the published fused post-norm kernel has the little inside the root."""
        if self.get("use_fused_kernel") and not self.get("ttt_prenorm"):
            return torch.sqrt(matrix.square().sum(dim=1, keepdim=True) + 1e-5)
        return row_norms(matrix) + 1e-5

    def add_momentum(self, step: list[Tensor], buffer: list[Tensor] | None, momenta: list[Tensor]) -> list[Tensor]:
        """G + mu M with mu the mean over the chunk's tokens."""
        mu = sum(momenta) / len(momenta)
        return step if buffer is None else [g + mu * m for g, m in zip(step, buffer, strict=True)]


def inner_gradient(weights: Matrices, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Gradient of one token's inner loss -<f_W(k), v> with respect to W0, W1, W2; itself differentiable."""
    loss = -(swiglu(weights, k) * v).sum()
    return torch.autograd.grad(loss, weights, create_graph=True)
