"""What a file of `torch.save` may hold to be read: tensors, numbers, text and a few types, and no code.

A pickle names what is to be called while it is read. torch's `weights_only` calls nothing but what torch knows to be
safe, its own types of a shard included, and what is listed here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch.distributed.tensor  # noqa: F401 (from then on torch knows the types of its shards)
from torch.serialization import get_safe_globals, get_unsafe_globals_in_checkpoint, safe_globals

__all__ = ["only_safe_types", "unsafe_content"]

SAFE_TYPES: tuple[Any, ...] = (
    # an array: the state of numpy's random numbers
    np.empty(0).__reduce__()[0],
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
)
"""What a checkpoint needs beyond the types that torch knows."""

_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def only_safe_types() -> Iterator[None]:
    """Within, every `torch.load` of this process reads data only, whatever its caller asks for (as verl's do).

    Raises:
        pickle.UnpicklingError: from `torch.load`, for a file that needs any other type; it names the type.
    """
    with mock.patch.dict(os.environ, {_FORCE: "1"}), _safe_types_known():
        os.environ.pop(_FORCE_NOT, None)
        yield


def unsafe_content(file: Path) -> str | None:
    """Why :func:`only_safe_types` would not let a file be read, None if it would; nothing of it is executed.

    Raises:
        OSError: it cannot be read.
    """
    state = file.stat()
    return _unsafe_content(str(file), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)
def _unsafe_content(file: str, size: int, changed: int) -> str | None:
    """Looked through once per process."""
    try:
        with _safe_types_known():
            named = get_unsafe_globals_in_checkpoint(file)
    except OSError:
        raise
    except Exception as error:  # of the many ways in which a file can be no pickle of data
        return f"it is nothing that torch.save writes of tensors, numbers and text ({error or type(error).__name__})"
    return f"it needs {', '.join(sorted(named))}, which is not data" if named else None


@contextmanager
def _safe_types_known() -> Iterator[None]:
    known = get_safe_globals()
    with safe_globals([item for item in SAFE_TYPES if item not in known]):  # what others have added stays
        yield
