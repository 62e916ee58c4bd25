"""From an adapter and its model to a model directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from refine_verl.config import ConfigError, ModelError
from refine_verl.export.settings import ExportSettings
from refine_verl.models import load_model, open_model
from refine_verl.models.loading import DTYPES, import_external
from refine_verl.models.lora import merge_adapter, open_adapter
from refine_verl.record.checkpoint_files import being_saved, flushed, put_in_place


def export(settings: ExportSettings) -> Path:
    """Merge in float32, and write the result beside its place and rename it: all of it or nothing.

    Returns:
        The directory.

    Raises:
        ConfigError, DataError, ModelError: an adapter or a model that cannot be used, or of another base, or a
            directory that holds something; nothing is written then.
        OSError: it cannot be written.
    """
    out = Path(settings.out).expanduser().absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError("out", f"{out} is there already. Give a new or empty directory.")
    if settings.external_lib is not None:
        import_external(settings.external_lib)
    adapter = open_adapter(settings.adapter)
    base = settings.model or adapter.base
    if base is None:
        raise ConfigError("model", f"is not given, and {settings.adapter} does not name its model. Set model=DIR.")
    transformers_logging.disable_progress_bar()
    try:
        info = open_model(base, key="model")
    except ModelError as error:
        if settings.model is not None or Path(base).is_dir():
            raise
        raise ModelError(
            f"adapter={settings.adapter}: it names its model {base!r}, which is no directory here and cannot be read "
            "as a hub id. Give model=DIR."
        ) from error
    if not info.has_weights:
        raise ModelError(f"model={base}: it has no weights to merge an adapter into.")
    stored = getattr(info.config, "dtype", None) or torch.float32
    dtype = DTYPES[settings.dtype] if settings.dtype != "auto" else stored
    model: Any = merge_adapter(load_model(base, config=info.config, key="model"), adapter).to(dtype)
    tokenizer = _tokenizer(base)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = being_saved(out)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        for file in folder.iterdir():
            flushed(file)
        put_in_place(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return out


def _tokenizer(base: str) -> Any:
    """The model's, if it has one."""
    try:
        return AutoTokenizer.from_pretrained(base, local_files_only=Path(base).is_dir())
    except Exception:  # there is none, which transformers says with exceptions of many types
        return None
