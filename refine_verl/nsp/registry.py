"""Functions a configuration names: registered ones by their name, any other by its import path."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from refine_verl.config import did_you_mean

F = TypeVar("F", bound=Callable[..., Any])


def unknown_choice(setting: str, value: object, known: Iterable[str], otherwise: str = "") -> ValueError:
    """The error for a name not among `known`: lists them, and what is allowed `otherwise`; names the nearest."""
    names = sorted(known)
    return ValueError(
        f"unknown {setting} {value!r}. Allowed: {', '.join(names)}{otherwise}.{did_you_mean(value, names)}"
    )


class Registry(Generic[F]):
    """Functions of one kind, by name.

    Attributes:
        kind: what they are, for messages.
        functions: the registered ones.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.functions: dict[str, F] = {}

    def register(self, name: str) -> Callable[[F], F]:
        """Decorator: make a function known under `name`.

        Raises:
            ValueError: the name is no word (letters, digits, `_`, `-`), or has another owner.
        """
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(
                f"the name of a {self.kind} must be a non-empty word without '.' or ':', which are for import paths, "
                f"got {name!r}"
            )

        def register(function: F) -> F:
            owner = self.functions.get(name)
            if owner is not None and path_of(owner) != path_of(function):
                raise ValueError(
                    f"{self.kind} {name!r} already belongs to {path_of(owner)}: register {path_of(function)} under "
                    "another name"
                )
            self.functions[name] = function
            return function

        return register

    def find(self, name: str) -> F:
        """The function registered as `name`, or the one at the import path `name`.

        Args:
            name: a registered name, or `package.module.function` or `package.module:function`.

        Raises:
            ValueError: no such name (with the nearest known one), module or function, or it cannot be called.
        """
        if name in self.functions:
            return self.functions[name]
        if "." not in name and ":" not in name:
            otherwise = ", or the import path of a function (package.module.function)"
            raise unknown_choice(self.kind, name, self.functions, otherwise)
        module_name, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
        if not module_name or not attribute:
            raise ValueError(f"{self.kind} {name!r} is not a path of the form package.module.function")
        try:
            found: Any = importlib.import_module(module_name)
        except Exception as error:  # a user's module may fail in any way while it is imported
            raise ValueError(
                f"{self.kind} {name!r}: cannot import the module {module_name!r} ({type(error).__name__}: {error}); "
                "is its directory on PYTHONPATH?"
            ) from error
        for part in attribute.split("."):
            if not hasattr(found, part):
                public = [entry for entry in dir(found) if not entry.startswith("_")]
                missing = unknown_choice(f"function in {module_name}", part, public)
                raise ValueError(f"{self.kind} {name!r}: {missing}")
            found = getattr(found, part)
        if not callable(found):
            raise ValueError(f"{self.kind} {name!r} is a {type(found).__name__}, not a function")
        function: F = found
        return function


def path_of(function: Callable[..., object]) -> str:
    """Module and name of a function, for messages."""
    kind = type(function)
    return f"{getattr(function, '__module__', kind.__module__)}.{getattr(function, '__qualname__', kind.__qualname__)}"
