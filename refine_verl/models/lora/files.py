"""Adapters in files: directories as PEFT writes and reads them, and beside them what they belong to.

`adapter_config.json` and `adapter_model.safetensors` are PEFT's; `refine_adapter.json` says which base they were
trained on and what for. Directories that PEFT wrote without it are read, too. No pickle is written or read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from refine_verl.config import ConfigError, DataError, ModelError
from refine_verl.config.refusals import with_article
from refine_verl.models.lora.layers import _PART, ADAPTER, adapter_parameters, finish, has_adapters, whole_path
from refine_verl.record.checkpoint_files import being_saved, flushed, put_in_place
from refine_verl.record.files import write_atomically

logger = logging.getLogger(__name__)

FORMAT = "refine_verl.adapter 1"
CONFIG, WEIGHTS, NOTE = "adapter_config.json", "adapter_model.safetensors", "refine_adapter.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA adapter in a directory, whose files are what was written.

    Attributes:
        path: the directory.
        key: what named it, for messages.
        config: of PEFT.
        tensors: by their names in the file, on the CPU.
        note: what `refine_adapter.json` says; empty where PEFT alone wrote the directory.
    """

    path: Path
    key: str
    config: Any
    tensors: dict[str, Tensor]
    note: dict[str, Any]

    @property
    def base(self) -> str | None:
        """Directory or hub id of the model that it was trained on, as it was named then."""
        name = self.config.base_model_name_or_path
        return str(name) if name else None

    @property
    def num_bytes(self) -> int:
        """Size of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def base_fingerprint(model: nn.Module) -> str:
    """sha256 of a model's weights without its adapters, the same in float32, float64 and bfloat16.

    Values count as bfloat16 has them: a model may be loaded in another dtype than it was trained in. A tensor at a time
    on the host.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted((_in_base(name), tensor) for name, tensor in model.state_dict().items()):
        if f".{_PART}" in name:
            continue
        values = tensor.detach().cpu()
        if values.is_floating_point():
            values = values.float().to(torch.bfloat16)
        digest.update(f"{name} {tuple(values.shape)};".encode())
        digest.update(values.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _in_base(name: str) -> str:
    return name.replace(".base_layer.", ".")


def write_adapter(
    directory: str | Path,
    model: Any,
    fingerprint: str,
    *,
    about: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the adapters of a model to a directory, beside its place and renamed: all of it or nothing.

    Args:
        directory: replaced if it is there.
        model: with adapters of `add_adapters` or `apply_adapter`.
        fingerprint: `base_fingerprint` of its base.
        about: more for `refine_adapter.json`: what they were trained on.
        tensors: their whole values, where the model has shards only; None: the model's.

    Raises:
        ConfigError: there is something else at ``directory``.
        OSError: it cannot be written.
    """
    final = Path(directory).expanduser().absolute()
    if final.exists() and not (final / CONFIG).is_file() and not (final.is_dir() and not any(final.iterdir())):
        raise ConfigError("directory", f"{final} is there already, and is no adapter. Give a new or empty one.")
    found = adapter_parameters(model) if tensors is None else tensors
    whole = {name: value.detach().cpu().contiguous().clone() for name, value in found.items()}
    config = dataclasses.replace(model.peft_config[ADAPTER], inference_mode=True)
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)
    final.parent.mkdir(parents=True, exist_ok=True)
    folder = being_saved(final)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        config.save_pretrained(str(folder))
        try:
            save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{final / WEIGHTS} cannot be written: {error}") from error
        flushed(folder / CONFIG)
        record = flushed(folder / WEIGHTS)
        note: dict[str, Any] = {
            "format": FORMAT,
            "base": {
                "model_type": model.config.model_type,
                "name": config.base_model_name_or_path,
                "sha256": fingerprint,
            },
            "file_bytes": record.bytes,
            "file_sha256": record.sha256,
            **(about or {}),
        }
        write_atomically(folder / NOTE, json.dumps(note, indent=1, ensure_ascii=False) + "\n")
        put_in_place(folder, final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return final


def open_adapter(directory: str | Path, key: str = "adapter") -> Adapter:
    """Read a PEFT directory.

    Args:
        directory: with `adapter_config.json` and `adapter_model.safetensors`.
        key: what names it, for messages.

    Raises:
        DataError: no such directory, none of LoRA, parts that cannot be used here, or a file that is missing, cut off
            or altered.
    """
    path = Path(directory).expanduser().absolute()
    if not path.is_dir():
        raise DataError(f"{key}: {directory} is no directory.")
    if not (path / CONFIG).is_file():
        raise DataError(f"{key}: {directory} has no {CONFIG}; is it the directory of a PEFT adapter?")
    if not (path / WEIGHTS).is_file():
        raise DataError(
            f"{key}: {directory} has no {WEIGHTS}. Weights as a pickle (adapter_model.bin) are not read: it could run "
            "code. Save it again with a newer PEFT."
        )
    config, note = _config(path, key), _note(path, key)
    data = (path / WEIGHTS).read_bytes()
    if note and (len(data) != note["file_bytes"] or hashlib.sha256(data).hexdigest() != note["file_sha256"]):
        raise DataError(f"{key}: {path / WEIGHTS} is not the file that was written: it is cut off or was altered.")
    try:
        return Adapter(path=path, key=key, config=config, tensors=load(data), note=note)
    except SafetensorError as error:
        raise DataError(f"{key}: {path / WEIGHTS} is damaged or cut off ({error}).") from error


def _config(path: Path, key: str) -> Any:
    import peft

    try:
        values = json.loads((path / CONFIG).read_text())
        kind = values.get("peft_type")
        if kind != "LORA":
            raise DataError(f"{key}: {path} is an adapter of the kind {kind}, and LoRA is what can be read here.")
        config = peft.LoraConfig.from_peft_type(**values)
    except DataError:
        raise
    except Exception as error:  # PEFT's configurations check their values with exceptions of many types
        raise DataError(f"{key}: {path / CONFIG} cannot be read ({error}).") from error
    if config.modules_to_save:
        raise DataError(
            f"{key}: {path} also holds whole layers ({', '.join(config.modules_to_save)}; modules_to_save), which "
            "cannot be put in place here. Merge it with PEFT, and give the model that comes of it."
        )
    return config


def _note(path: Path, key: str) -> dict[str, Any]:
    if not (path / NOTE).is_file():
        return {}
    try:
        note: dict[str, Any] = json.loads((path / NOTE).read_text())
        if note["format"] != FORMAT:
            raise DataError(f"{key}: {path / NOTE} has the format {note['format']!r}; this version reads {FORMAT!r}.")
        for name in ("file_bytes", "file_sha256"):
            note[name]
        note["base"]["sha256"]
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{key}: {path / NOTE} is cut off or was altered ({error!r}).") from error
    return note


def refuse_other_base(adapter: Adapter, model: Any, fingerprint: Callable[[], str] | None = None) -> None:
    """Refuse an adapter that was trained on another model, or on other weights.

    Args:
        adapter: which one.
        model: without adapters.
        fingerprint: of its weights; None: they are looked at here.

    Raises:
        ModelError: says what differs.
    """
    where, about = f"{adapter.key}={adapter.path}", adapter.note.get("base")
    if about is None:
        logger.warning(
            "%s has no %s (it was not written by refine_verl), so that only the shapes of its layers say whether it "
            "belongs to this model",
            where,
            NOTE,
        )
        return
    kind = model.config.model_type
    if about["model_type"] != kind:
        raise ModelError(
            f"{where}: it was trained on {with_article(about['model_type'])}, and the model is {with_article(kind)}."
        )
    if about["sha256"] != (base_fingerprint(model) if fingerprint is None else fingerprint()):
        named = f" ({about['name']})" if about.get("name") else ""
        raise ModelError(
            f"{where}: it was trained on other weights{named}: another checkpoint, or the model has been trained "
            "since. Give the model that it was trained on."
        )


def apply_adapter(
    model: Any, adapter: Adapter, *, trains: bool = False, check: bool = True, base: str | None = None
) -> None:
    """Put an adapter from a file into a model, in place.

    Args:
        model: without adapters, and not an actor yet.
        adapter: of `open_adapter`.
        trains: its parameters are to be trained, and no others; otherwise they are fixed, and the model's own stay
            trainable, as those of a model without adapters are.
        check: look whether the model is its base; needs real weights.
        base: directory or hub id of the model, to be noted in files; None: as the adapter names it.

    Raises:
        ModelError: another base, or layers or shapes that the model does not have.
    """
    import peft

    where = f"{adapter.key}={adapter.path}"
    if check:
        refuse_other_base(adapter, model)
    own = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    head = model.get_output_embeddings()
    named = whole_path(base) or adapter.base
    config = dataclasses.replace(adapter.config, inference_mode=not trains, base_model_name_or_path=named)
    layers = {name.partition(f".{_PART}")[0].removeprefix("base_model.model.") for name in adapter.tensors}
    there = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if missing := sorted(layers - there):
        raise ModelError(f"{where}: the model has no linear layer {missing[0]} ({len(missing)} are missing in all).")
    if any(model.get_submodule(name) is head for name in layers):
        raise ModelError(
            f"{where}: it adapts the LM head, which is computed in chunks from its weight here. Merge it "
            "(python -m refine_verl.export), and give the model that comes of it."
        )
    with torch.random.fork_rng(devices=[]):
        peft.inject_adapter_in_model(config, model, ADAPTER)
    finish(model)  # before values come: in bf16 they would be rounded
    if not any(parameter.is_meta for parameter in adapter_parameters(model).values()):
        _fill(model, adapter, where)
    if not trains:
        for parameter, flag in own:
            parameter.requires_grad_(flag)


def _fill(model: Any, adapter: Adapter, where: str) -> None:
    import peft

    try:
        report: Any = peft.set_peft_model_state_dict(model, dict(adapter.tensors), ADAPTER)
    except RuntimeError as error:
        raise ModelError(f"{where}: its shapes are not those of the model ({' '.join(str(error).split())}).") from error
    missing = sorted(name for name in report.missing_keys if _PART in name)
    if missing or report.unexpected_keys:
        first = [*missing, *report.unexpected_keys][0]
        raise ModelError(f"{where}: its weights do not fit {CONFIG}: {first} is missing, or there without need.")


def merge_adapter(model: Any, adapter: Adapter) -> Any:
    """A model with an adapter's changes in its weights, and no adapter; by PEFT's own merge, in place.

    Raises:
        ModelError: see `apply_adapter`.
    """
    import peft

    if has_adapters(model):
        raise ModelError(f"{adapter.key}={adapter.path}: the model has adapters already.")
    refuse_other_base(adapter, model)
    try:
        wrapped = peft.PeftModel.from_pretrained(model, str(adapter.path))
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"{adapter.key}={adapter.path}: it cannot be put into the model ({' '.join(str(error).split())})."
        ) from error
    return wrapped.merge_and_unload()
