"""REFINE for verl: reinforcement learning on next-sequence prediction for fast-weight language models.

Importing the package loads nothing heavy; see ``refine_verl.config`` for the settings,
``python -m refine_verl.main --help`` for the command line, :func:`refine_verl.adapt` for test-time training in Python
and :func:`refine_verl.remember` for documents as states.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refine_verl.adaptation import AdaptSettings, adapt

    remember: Any

__version__ = "0.1.0"
__all__ = ["AdaptSettings", "__version__", "adapt", "remember"]


def end_while_importing(*_: object) -> None:
    """SIGINT before a command has begun: one line and exit code 130, where Python would print what it was importing."""
    os.write(2, b"interrupted\n")
    os._exit(130)


def _is_our_command() -> bool:
    """Whether this process is `python -m refine_verl...`."""
    words = sys.orig_argv
    return any(
        word == "-m" and name.split(".")[0] == "refine_verl" for word, name in zip(words, words[1:], strict=False)
    )


if (
    _is_our_command()
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler  # ignored in what a script puts in the background
):
    # `command.front.run_command` takes it back
    signal.signal(signal.SIGINT, end_while_importing)


def __getattr__(name: str) -> Any:
    """Load torch, transformers and fla only for those who adapt or remember."""
    if name in ("adapt", "AdaptSettings"):
        from refine_verl import adaptation

        return getattr(adaptation, name)
    if name == "remember":
        from importlib import import_module

        return import_module("refine_verl.remember")  # a module that can be called
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
