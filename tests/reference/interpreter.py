"""fla's real Triton kernels on the CPU: what Triton's interpreter needs to run them.

`prepare` has to be called in a process of its own that was started with ``TRITON_INTERPRET=1``, before fla is imported.
Nothing here changes what a kernel computes: tuning takes the last configuration, masks of integers become booleans,
a loop's index, a Python int when interpreted, gets the method ``to`` that it has on a GPU, and two operators lose the
assertion that they are not given float32.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process was started so that kernels are interpreted."""


REFUSE_FLOAT32 = (
    "fla.layers.delta_net:chunk_delta_rule",
    "fla.layers.gated_deltaproduct:chunk_gated_delta_product",
)
"""Operators that assert that they are not given float32. bfloat16 cannot be interpreted."""


class LoopIndex(int):
    """An index that can be cast, as a kernel's can."""

    def to(self, dtype: Any) -> LoopIndex:
        return self


def kernel_range(*bounds: Any) -> Iterator[LoopIndex]:
    """``range`` for kernels, and for what stands beside them in fla's modules."""
    return map(LoopIndex, range(*bounds))


def one_configuration(autotuner: type) -> None:
    """Tune nothing: of a kernel's configurations keep the last, in fla the one with the largest blocks.

    The fewer blocks, the less there is to interpret.
    """
    original = autotuner.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(original).bind(self, *args, **kwargs)
        given.arguments["configs"] = given.arguments["configs"][-1:]
        original(*given.args, **given.kwargs)

    autotuner.__init__ = init  # type: ignore[method-assign]


def boolean_masks(builder: type) -> None:
    """Masks may be integers, as on a GPU."""
    for name in ("create_masked_load", "create_masked_store"):
        original = getattr(builder, name)

        def masked(
            self: Any, pointers: Any, second: Any, third: Any, *rest: Any, _original: Any = original, _name: str = name
        ) -> Any:
            mask = second if _name == "create_masked_load" else third
            mask.data = mask.data.astype(bool)
            return _original(self, pointers, second, third, *rest)

        setattr(builder, name, masked)


def without_asserts(operator: Callable[..., Any]) -> Callable[..., Any]:
    """``operator`` compiled without its assertions."""
    function = inspect.unwrap(operator)
    code = compile(inspect.getsource(function), inspect.getfile(function), "exec", optimize=1)
    scope: dict[str, Any] = {}
    exec(code, function.__globals__, scope)
    return scope[function.__name__]


def prepare() -> None:
    """Make fla's kernels run interpreted, in this process."""
    import triton.runtime.autotuner
    import triton.runtime.interpreter

    one_configuration(triton.runtime.autotuner.Autotuner)
    boolean_masks(triton.runtime.interpreter.InterpreterBuilder)
    importlib.import_module("fla.models")
    for name, module in list(sys.modules.items()):
        if name.startswith(("fla.ops.", "fla.modules.")):
            vars(module)["range"] = kernel_range
    for target in REFUSE_FLOAT32:
        place, name = target.split(":")
        layer = importlib.import_module(place)
        setattr(layer, name, without_asserts(getattr(layer, name)))
