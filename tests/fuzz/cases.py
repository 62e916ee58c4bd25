"""A case: a command, what is wrong with its input, and what it has to say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from fuzz.world import World

COMMANDS = {"posttrain": "main", "ttt": "main"}
"""The command of a base that is not named after it."""

_NOTHING = object()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One thing wrong.

    Attributes:
        id: for a person, unique.
        base: which arguments it goes with (`World.base`), and so which command.
        changed: arguments in place of those of the same key; `{inputs}`, `{model}` and `{root}` are filled in.
        make: writes the files it needs into `World.inputs`, or `World.here`.
        names: what a refusal must name, one of them at least.
        may_act: going ahead is right as well.
        must_act: only going ahead is right.
        says: what one that goes ahead must say, one of them at least.
        key, value: what the configuration that runs must then hold.
        front: by the command itself; else what it does behind its command line, which is quicker.
        always: in every run of the tests, not only where it is drawn.
    """

    id: str
    base: str
    changed: tuple[str, ...] = ()
    make: Callable[[World], None] | None = None
    names: tuple[str, ...] = ()
    may_act: bool = False
    must_act: bool = False
    says: tuple[str, ...] = ()
    key: str = ""
    value: Any = _NOTHING
    front: bool = False
    always: bool = False

    @property
    def command(self) -> str:
        return COMMANDS.get(self.base, self.base)

    def arguments(self, world: World) -> list[str]:
        """The command line."""
        places = {"inputs": str(world.inputs), "model": str(world.model), "root": str(world.root)}
        changed = list(self.changed)
        for name, place in places.items():
            changed = [item.replace(f"{{{name}}}", place) for item in changed]
        keys = {item.partition("=")[0].lstrip("+~") for item in changed}
        return [item for item in world.base(self.base) if item.partition("=")[0] not in keys] + changed

    @property
    def has_value(self) -> bool:
        return self.value is not _NOTHING
