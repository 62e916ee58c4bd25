"""Keys of `python -m refine_verl.export`. Loads no torch."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from refine_verl.config import Settings, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings(Settings):
    """What is merged, and where it is written."""

    SECTION: ClassVar[str] = "export"

    adapter: str = option(dataclasses.MISSING, "directory of a LoRA adapter, as PEFT writes one", empty=False)
    out: str = option(dataclasses.MISSING, "new directory for the merged model", empty=False)
    model: str | None = option(
        None, "directory or hub id of the model it was trained on; null: the one that the adapter names", empty=False
    )
    dtype: str = option(
        "auto",
        "of what is written: that of the model's files, or",
        choices=("auto", "float32", "bfloat16"),
    )
    external_lib: str | None = option(None, "package to import first: one that registers a model and its adapter")
