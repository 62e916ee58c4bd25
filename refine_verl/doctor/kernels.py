"""Do the kernels in use compute the right gradients on this device?

fla's releases before 0.6 returned wrong gradients on some GPUs and for short segments, without a word. So values and
all gradients are compared with plain recurrences here, token by token, on the device that would train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from refine_verl.doctor.findings import FAIL, OK, WARN, Finding
from refine_verl.kernels.versions import Installed, doubt, installed, why_not_trainable
from refine_verl.models.hybrid import SharedKeys
from refine_verl.models.hybrid.attention import AttentionOfLayer, AttentionPlan

LENGTHS = (150, 3)
"""More than two chunks with a ragged last one; and shorter than the convolution is wide."""
LIMITS = {"cpu": 1e-4, "cuda": 3e-2}
"""Largest relative error (norm of the difference over norm): float32 on the CPU, bf16 inputs on a GPU."""
BATCH, HEADS, WIDTH = 2, 2, 32
FORKED_AT = (1, 37, 100)
"""After so many tokens of a document the rows branch off that attend to its keys."""
FIX = (
    'pip install --force-reinstall "flash-linear-attention>=0.6,<0.7" and a Triton that belongs to this torch. Do not '
    "train with wrong gradients: the loss goes down anyway, only not as far."
)

FIX_ATTENTION = (
    "reinstall torch, in the build for this device: attention of hybrids is its scaled_dot_product_attention. Other "
    "models do not use it."
)

Inputs = dict[str, Tensor]
Rule = Callable[[Inputs], tuple[Tensor, Tensor]]


def sequential_delta_rule(x: Inputs) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} + beta_t k_t (v_t - (a_t S_{t-1})^T k_t)^T, o_t = S_t^T q_t / sqrt(K); a_t = exp(g_t) or 1.

    Args:
        x: q, k, v [B, T, H, K], beta [B, T, H], maybe g [B, T, H] and state [B, H, K, V].

    Returns:
        o [B, T, H, V] and the last state.
    """
    q, k = (torch.nn.functional.normalize(x[name], dim=-1) for name in ("q", "k"))
    state, outputs = x["state"], []
    for t in range(q.shape[1]):
        if "g" in x:
            state = state * x["g"][:, t].exp()[..., None, None]
        error = x["v"][:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], error * x["beta"][:, t, :, None])
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, dim=1), state


def sequential_convolution(x: Inputs) -> tuple[Tensor, Tensor]:
    """y_t = sum_w weight[:, w] x_{t - W + 1 + w}; ``state`` [B, D, W] holds the last W inputs before the first."""
    width = x["weight"].shape[1]
    padded = torch.cat([x["state"].transpose(1, 2), x["x"]], dim=1)
    rows = [(padded[:, t + 1 : t + 1 + width] * x["weight"].t()).sum(1) for t in range(x["x"].shape[1])]
    return torch.stack(rows, dim=1), padded[:, -width:].transpose(1, 2)


def sequential_attention(x: Inputs) -> tuple[Tensor, Tensor]:
    """Rows one by one: row r sees the first ``FORKED_AT[r]`` tokens of a document, and its own up to the one that asks.

    Args:
        x: q [R T, H, D] and k, v [R T, H / 2, D] of the rows, keys and values [S, H / 2, D] of the document.

    Returns:
        [R T, H, D], and keys and values of the rows' tokens, as they are kept.
    """
    repeated = {name: x[name].repeat_interleave(2, dim=1) for name in ("k", "v", "keys", "values")}
    asking, outputs = x["q"].unflatten(0, (len(FORKED_AT), -1)), []
    for row, place in enumerate(FORKED_AT):
        own = slice(row * asking.shape[1], (row + 1) * asking.shape[1])
        keys = torch.cat([repeated["keys"][:place], repeated["k"][own]])
        values = torch.cat([repeated["values"][:place], repeated["v"][own]])
        for t, query in enumerate(asking[row]):
            seen = place + t + 1
            scores = torch.einsum("hd,shd->hs", query, keys[:seen]) * query.shape[-1] ** -0.5
            outputs.append(torch.einsum("hs,shd->hd", scores.softmax(-1), values[:seen]))
    return torch.stack(outputs), torch.stack([x["k"], x["v"]])


def check_triton() -> Iterator[Finding]:
    """Whether fla trains gated models on these GPUs with the Triton that is here."""
    have = installed()
    for index in range(torch.cuda.device_count()):
        yield triton_on(f"GPU {index}, triton", torch.cuda.get_device_capability(index), have)


def triton_on(name: str, capability: tuple[int, int], have: Installed) -> Finding:
    """The finding about one GPU."""
    gated = SimpleNamespace(model_type="gated_deltanet")
    if refused := why_not_trainable(gated, capability, have):
        return Finding(name, FAIL, *_said_and_cure(refused))
    if doubtful := doubt(gated, capability, have):
        return Finding(name, WARN, *_said_and_cure(doubtful))
    return Finding(name, OK, f"{have.triton}, TileLang {'usable' if have.tilelang else 'not usable, nor needed'}")


def _said_and_cure(message: str) -> tuple[str, str]:
    said, _, cure = message.partition(". ")
    return said, cure


def check_kernels() -> Iterator[Finding]:
    """One finding per kernel."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, kernel, reference, make in _cases():
        fix = FIX_ATTENTION if kernel is _attention else FIX
        try:
            error, where = largest_error(kernel, reference, make, device)
        except Exception as problem:  # a kernel that does not compile raises what its compiler raises
            detail = f"{type(problem).__name__}: {str(problem)[:200]}"
            yield Finding(f"kernel {name}", FAIL, detail, fix)
            continue
        seen = f"largest relative error {error:.1e} ({where}) on {device}, limit {LIMITS[device]:.0e}"
        good = error <= LIMITS[device]  # a NaN is not
        yield Finding(f"kernel {name}", OK if good else FAIL, seen, "" if good else fix)


def largest_error(kernel: Rule, reference: Rule, make: Callable[[int], Inputs], device: str) -> tuple[float, str]:
    """The largest relative error of outputs, last state and every gradient, and which it is."""
    worst, where = 0.0, "nothing"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for length in LENGTHS:
        # both start from numbers that the low precision can hold
        given = {name: value.to(dtype).to(device) for name, value in make(length).items()}
        got = _with_gradients(kernel, {n: v.float() if n in ("state", "g") else v for n, v in given.items()})
        wanted = _with_gradients(reference, {name: value.double() for name, value in given.items()})
        for name, value in wanted.items():
            error = ((got[name].double() - value).norm() / value.norm().clamp_min(1e-6)).item()
            if not error <= worst:
                worst, where = error, f"{name}, {length} tokens"
    return worst, where


def _with_gradients(rule: Rule, inputs: Inputs) -> Inputs:
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    out, last = rule(leaves)
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64, device=out.device)
    for part in (out, last):
        weights = torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part.device)
        loss = loss + (part.double() * weights).sum()
    loss.backward()
    found = {f"gradient of {name}": value.grad for name, value in leaves.items() if value.grad is not None}
    return {"output": out.detach(), "last state": last.detach(), **found}


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _delta_inputs(length: int, gated: bool = False) -> Inputs:
    shape = (BATCH, length, HEADS, WIDTH)
    inputs = {name: _random(shape, seed) for seed, name in enumerate(("q", "k", "v"))}
    inputs |= {"beta": _random(shape[:3], 3).sigmoid(), "state": _random((BATCH, HEADS, WIDTH, WIDTH), 4)}
    return inputs | {"g": -_random(shape[:3], 5).exp() * 0.1} if gated else inputs


def _convolution_inputs(length: int) -> Inputs:
    return {
        "x": _random((BATCH, length, WIDTH), 0),
        "weight": _random((WIDTH, 4), 1),
        "state": _random((BATCH, WIDTH, 4), 2),
    }


def _attention_inputs(length: int) -> Inputs:
    rows, before = len(FORKED_AT) * length, FORKED_AT[-1]
    shapes = {"q": (rows, HEADS), "k": (rows, HEADS // 2), "v": (rows, HEADS // 2)}
    shapes |= {"keys": (before, HEADS // 2), "values": (before, HEADS // 2)}
    return {name: _random((*shape, WIDTH), seed) for seed, (name, shape) in enumerate(shapes.items())}


def _attention(x: Inputs) -> tuple[Tensor, Tensor]:
    shared = SharedKeys(tuple(((0, 0, place),) for place in FORKED_AT), (((x["keys"], x["values"]),),))
    length = len(x["q"]) // len(FORKED_AT)
    plan = AttentionPlan.of(shared, [length] * len(FORKED_AT), x["q"].device)
    layer = AttentionOfLayer(plan, shared.layers[0])
    out = layer(x["q"][None], x["k"][None], x["v"][None], WIDTH**-0.5)
    assert layer.made is not None
    return out[0], torch.stack(layer.made)


def _cases() -> Iterator[tuple[str, Rule, Rule, Callable[[int], Inputs]]]:
    """(name, kernel in use, reference, inputs). The names are looked up where the models look them up."""
    import fla.layers.delta_net as delta
    import fla.layers.gated_deltanet as gated
    import fla.modules.causal_conv1d.ops as convolution

    from refine_verl.kernels import ensure_kernels

    ensure_kernels()

    def delta_rule(kernel: Callable[..., tuple[Tensor, Tensor]]) -> Rule:
        def rule(x: Inputs) -> tuple[Tensor, Tensor]:
            given = {name: value for name, value in x.items() if name != "state"}
            return kernel(**given, initial_state=x["state"], output_final_state=True, use_qk_l2norm_in_kernel=True)

        return rule

    def short_convolution(x: Inputs) -> tuple[Tensor, Tensor]:
        return convolution.causal_conv1d(
            x=x["x"], weight=x["weight"], initial_state=x["state"], output_final_state=True
        )

    rules = (delta_rule(delta.chunk_delta_rule), delta_rule(gated.chunk_gated_delta_rule))
    yield "delta rule", rules[0], sequential_delta_rule, _delta_inputs
    yield "gated delta rule", rules[1], sequential_delta_rule, lambda length: _delta_inputs(length, gated=True)
    yield "short convolution", short_convolution, sequential_convolution, _convolution_inputs
    yield "attention of hybrids", _attention, sequential_attention, _attention_inputs
