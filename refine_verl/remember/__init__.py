"""Documents as states of a model: read once, asked often, saved, read on, forked.

The package is its own function: `refine_verl.remember(model, documents)`. `python -m refine_verl.remember` needs a
module of that name, and Python binds it in `refine_verl`, so the two have to be one object. Loads nothing heavy before
it is called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

_EXPORTS = {"Memory": "memory", "Answer": "memory", "Document": "files", "load": "memory", "remember": "memory"}


class _Remember(ModuleType):
    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.remember(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        if name not in _EXPORTS:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"{self.__name__}.{_EXPORTS[name]}"), name)


sys.modules[__name__].__class__ = _Remember
