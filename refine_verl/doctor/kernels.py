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

LENGTHS = (150, 3)
"""More than two chunks with a ragged last one; and shorter than the convolution is wide."""
LIMITS = {"cpu": 1e-4, "cuda": 3e-2}
"""Largest relative error (norm of the difference over norm): float32 on the CPU, bf16 inputs on a GPU."""
BATCH, HEADS, WIDTH = 2, 2, 32
FIX = (
    'pip install --force-reinstall "flash-linear-attention>=0.6,<0.7" and a Triton that belongs to this torch. Do not '
    "train with wrong gradients: the loss goes down anyway, only not as far."
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
        try:
            error, where = largest_error(kernel, reference, make, device)
        except Exception as problem:  # a kernel that does not compile raises what its compiler raises
            detail = f"{type(problem).__name__}: {str(problem)[:200]}"
            yield Finding(f"kernel {name}", FAIL, detail, FIX)
            continue
        seen = f"largest relative error {error:.1e} ({where}) on {device}, limit {LIMITS[device]:.0e}"
        good = error <= LIMITS[device]  # a NaN is not
        yield Finding(f"kernel {name}", OK if good else FAIL, seen, "" if good else FIX)


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
