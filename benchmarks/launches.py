"""How many kernels a step launches, counted where there is no GPU.

    python -m benchmarks.launches
    python -m benchmarks.launches --family gated_deltanet --length 4096 --json launches.json

fla's own layers and operators run on CPU tensors of a narrow model. Where they would launch a Triton kernel, the launch
is counted and nothing is executed, so what they hand on is zeros. Operations of PyTorch are executed and counted, but
for those that launch nothing: views, and tensors without content. Backward passes and rewards are included; the
optimiser, and the addition of gradients to those of other micro-batches, are not.

How wide a model is changes no count, the length only by the number of pieces, and the vocabulary by the chunks of the
LM head, so these two are real by default. Operations on indices, which a GPU run makes on its host, are counted too.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import KernelInterface

from benchmarks.step_cost import Bench, Preset
from refine_verl.config import NSPSettings
from refine_verl.kernels import patch
from refine_verl.models import head

WIDTH = 64
FAMILIES = {
    "delta_net": {"num_heads": 1},
    "gated_deltanet": {"num_heads": 1, "head_dim": 64, "expand_v": 1.0},
}
"""What a narrow model of each family needs in its configuration."""

MEASURED = ("forward", "sft", "rollout", "update", "two-phase", "fused")

NOTHING_LAUNCHED = ("_unsafe_view", "lift_fresh", "_local_scalar_dense")
"""Operations of PyTorch without a kernel that neither make a tensor without content nor say that they return a view."""


@dataclass
class Counts:
    """What one document cost.

    Attributes:
        model_passes: calls of the trunk.
        layer_calls: calls of its layers, those of activation checkpointing in the backward pass included.
        operator_calls: calls of fla's operators from a state to a state, by its layers and by forks inside them.
        triton: launches of Triton kernels.
        aten: operations of PyTorch that launch a kernel.
    """

    model_passes: int = 0
    layer_calls: int = 0
    operator_calls: int = 0
    triton: int = 0
    aten: int = 0

    @property
    def launches(self) -> int:
        """All of them."""
        return self.triton + self.aten

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def to_json(self) -> dict[str, int]:
        """All numbers."""
        return {**asdict(self), "launches": self.launches}


class _Operations(TorchDispatchMode):
    """Counts operations of PyTorch; tensors without content get zeros, since no kernel will write them."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if "empty" in name:
            pytree.tree_map_only(torch.Tensor, torch.Tensor.zero_, result)
        elif name not in NOTHING_LAUNCHED and not _is_view(func):
            self.counter.add("aten")
        return result


def _is_view(func: Any) -> bool:
    returned = [value.alias_info for value in func._schema.returns]
    return func.is_view or any(alias is not None and not alias.is_write for alias in returned)


class Counter:
    """Counts what happens in a `counting` block."""

    def __init__(self) -> None:
        self.counts = Counts()

    def add(self, name: str) -> None:
        """One more."""
        setattr(self.counts, name, getattr(self.counts, name) + 1)

    def launch(self, *args: Any, **kwargs: Any) -> None:
        """Stands for a launch of a Triton kernel."""
        self.add("triton")

    def take(self) -> Counts:
        """What has been counted since the last time."""
        taken, self.counts = self.counts, Counts()
        return taken

    def around(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, counted. Its signature stays: operators are asked for their arguments."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.add(name)
            return function(*args, **kwargs)

        return call


@contextlib.contextmanager
def counting(model: nn.Module) -> Iterator[Counter]:
    """Count what happens inside the block; Triton kernels are not executed there."""
    counter = Counter()
    trunk: Any = model.base_model
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.fla_kernels())
        stack.enter_context(mock.patch.object(head, "chunk_elements", lambda _, of=head.chunk_elements: of("cuda")))
        for target in patch.OPERATORS:
            path = target.replace(":", ".")
            published = functools.reduce(getattr, path.split(".")[1:], importlib.import_module("fla"))
            stack.enter_context(mock.patch(path, counter.around(published, "operator_calls")))
        # once more: what is wrapped from here on are the counted ones
        stack.enter_context(patch.fla_kernels())
        stack.enter_context(mock.patch.object(KernelInterface, "__getitem__", lambda *_: counter.launch))
        stack.enter_context(_counted_calls(trunk, counter, "model_passes"))
        for layer in trunk.layers:
            stack.enter_context(_counted_calls(layer, counter, "layer_calls"))
        stack.enter_context(mock.patch.object(torch.Tensor, "backward", _backward_in_autocast(torch.Tensor.backward)))
        stack.enter_context(_Operations(counter))
        yield counter


def _backward_in_autocast(backward: Callable[..., None]) -> Callable[..., None]:
    """fla's backward passes go back to the autocast of their forward pass, but know that of GPUs alone."""

    def call(*args: Any, **kwargs: Any) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            backward(*args, **kwargs)

    return call


@contextlib.contextmanager
def _counted_calls(module: nn.Module, counter: Counter, name: str) -> Iterator[None]:
    module.__dict__["forward"] = counter.around(module.forward, name)
    yield
    del module.__dict__["forward"]


def narrow(family: str, layers: int, length: int, vocabulary: int, checkpointing: str, device: str = "cpu") -> Bench:
    """One document and a narrow model of a family, with autocast to bf16.

    Args:
        family: one of `FAMILIES`.
        layers, length, vocabulary: of the model and its document.
        checkpointing: ``model.activation_checkpointing``.
        device: where; `measure` needs the CPU.
    """
    model = {"hidden_size": WIDTH, "num_hidden_layers": layers, "vocab_size": vocabulary, **FAMILIES[family]}
    preset = Preset(
        model, length, 1, 1, device=device, activation_checkpointing=checkpointing, rounds=1, prefix_rounds=0,
        model_type=family, bf16=True,
    )  # fmt: skip
    return Bench(preset, NSPSettings())


def measure(bench: Bench) -> dict[str, Counts]:
    """What each kind of step costs per document; `MEASURED` says which."""
    found: dict[str, Counts] = {}
    with counting(bench.actor) as counter:
        bench.actor(mode="score", documents=bench.documents)
        found["forward"] = counter.take()
        bench.backward("sft", None)
        found["sft"] = counter.take()
        bench.optimizer.zero_grad()
        written = bench.write("fork")
        found["rollout"] = counter.take()
        bench.backward("fork", written)
        found["update"] = counter.take()
        found["two-phase"] = found["rollout"] + found["update"]
        bench.optimizer.zero_grad()
        bench.backward("fused", None)
        found["fused"] = counter.take()
    return {name: found[name] for name in MEASURED}


def table(found: dict[str, Counts]) -> str:
    """The counts as text."""
    names = ["model_passes", "layer_calls", "operator_calls", "triton", "aten", "launches"]
    lines = [f"{'':<10}" + "".join(f"{name.replace('_', ' '):>16}" for name in names)]
    for kind, counts in found.items():
        numbers = counts.to_json()
        lines.append(f"{kind:<10}" + "".join(f"{numbers[name]:>16,}" for name in names))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="delta_net")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--length", type=int, default=16384, help="tokens of the document")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--checkpointing", choices=("none", "layer"), default="none")
    parser.add_argument("--json", type=Path, help="also write the counts to this file")
    arguments = parser.parse_args()
    settings = {name: value for name, value in vars(arguments).items() if name != "json"}
    found = measure(narrow(**settings))
    print(table(found))
    if arguments.json:
        counts = {kind: counts.to_json() for kind, counts in found.items()}
        arguments.json.write_text(json.dumps({"settings": settings, "counts": counts}, indent=2) + "\n")


if __name__ == "__main__":
    main()
