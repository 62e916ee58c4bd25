"""REFINE for verl: reinforcement learning on next-sequence prediction for fast-weight language models.

Importing the package loads nothing heavy; see ``refine_verl.config`` for the settings,
``python -m refine_verl.main --help`` for the command line and :func:`refine_verl.adapt` for test-time training in
Python.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refine_verl.adaptation import AdaptSettings, adapt

__version__ = "0.1.0"
__all__ = ["AdaptSettings", "__version__", "adapt"]


def __getattr__(name: str) -> Any:
    """Load torch, transformers and fla only for those who adapt."""
    if name in ("adapt", "AdaptSettings"):
        from refine_verl import adaptation

        return getattr(adaptation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
