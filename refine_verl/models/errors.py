"""What is wrong with a model."""

from __future__ import annotations


class ModelError(ValueError):
    """A model that cannot be trained: what is wrong with it and what would work."""
