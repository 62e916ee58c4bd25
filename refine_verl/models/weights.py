"""Whether a checkpoint's weights fit the model of its configuration, from the headers of its files alone."""

from __future__ import annotations

import contextlib
import json
import logging
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging as transformers_logging

from refine_verl.config import ModelError
from refine_verl.config.hub import LFS_POINTER, is_lfs_pointer
from refine_verl.config.refusals import with_article

logger = logging.getLogger(__name__)

Headers = dict[Path, dict[str, list[int]]]
"""Shape of every tensor of every file."""

# What `from_pretrained` looks for, in its order; any other file is no checkpoint to it.
_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_SHOWN = 4


class Unusable(ValueError):
    """What is wrong with a model; `naming` says which one it is."""


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """What is found wrong inside is said of ``where``: the key that named the model, with its value.

    Raises:
        ModelError: something is.
    """
    try:
        yield
    except Unusable as problem:
        raise ModelError(f"{where}: {problem}") from problem.__cause__


def check_weights(path: str | Path, config: PretrainedConfig, *, key: str = "model.path") -> None:
    """Refuse weights that are damaged or do not fit, without reading or downloading them.

    The rules are those of ``from_pretrained``, asked on the meta device: renamed keys, tied embeddings, buffers and a
    missing prefix of the base model are judged by the loader itself. Of a hub id what the local cache
    holds is checked.

    Args:
        path: a model directory, or a hub id.
        config: of the model that is to be loaded from there.
        key: what named it, for messages.

    Raises:
        ModelError: no file that would be loaded, a shard that is not there, a damaged file, or keys or shapes other
            than the model's; names the file, the first keys and both shapes.
    """
    with naming(f"{key}={path}"):
        found = read_headers(path, config)
        if found is None:
            return
        headers = {name: torch.empty(shape, device="meta") for file in found.values() for name, shape in file.items()}
        report = _ask_the_loader(f"{key}={path}", config, headers)
        origin = {name: file for file, names in found.items() for name in names}
        if report is not None and (problems := describe_problems(report, origin)):
            raise misfit(config, problems)


def read_headers(path: str | Path, config: PretrainedConfig) -> Headers | None:
    """The shapes in the files that would be loaded; None where they are still to be downloaded.

    Raises:
        Unusable: files that are missing or damaged, or a config.json that says something else than they do:
            configurations that know how their fields show in a checkpoint have a ``check_weights``.
    """
    files = _local_files(Path(path), config) if Path(path).is_dir() else _cached_files(str(path))
    if files is None:
        return None
    headers = {file: _header(file) for file in files}
    check = getattr(config, "check_weights", None)
    try:
        if check is not None:
            check({name: shape for shapes in headers.values() for name, shape in shapes.items()})
    except ValueError as error:
        raise Unusable(
            f"configuration and weights contradict each other: {error}. Check that config.json belongs to these "
            "weights."
        ) from error
    return headers


def check_numbers(model: nn.Module) -> None:
    """Refuse weights that are no numbers: all that is computed from them would be none either.

    Raises:
        Unusable: names the first parameter that holds one.
    """
    for name, parameter in model.named_parameters():
        _require_numbers(name, parameter.detach())


def check_stored_numbers(path: str | Path, config: PretrainedConfig, *, key: str = "model.path") -> None:
    """`check_numbers` of the files of a model, tensor by tensor: for a run that starts, whose workers read them next.

    What is still to be downloaded is left to the workers.

    Raises:
        ModelError: names the first tensor that holds one.
    """
    for _ in stored_weights(path, config, key=key) or ():
        pass


def stored_weights(
    path: str | Path, config: PretrainedConfig, *, key: str = "model.path"
) -> Iterator[tuple[str, Tensor]] | None:
    """Name and values of every tensor in the files of a model, one after the other; None where they are still to be
    downloaded.

    Raises:
        ModelError: files that are missing or damaged; names the first tensor that is no numbers.
    """
    with naming(f"{key}={path}"):
        headers = read_headers(path, config)
    return None if headers is None else _numbers_in(headers, f"{key}={path}")


def _numbers_in(files: Iterable[Path], where: str) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with naming(where):
            for name, values in _stored(file):
                _require_numbers(name, values)
                yield name, values


def _require_numbers(name: str, values: Tensor) -> None:
    if values.is_meta or not values.numel() or not values.is_floating_point():
        return
    wide = values if values.dtype.itemsize > 1 else values.float()  # torch has no bounds of 8-bit numbers
    if not all(bound.isfinite() for bound in torch.aminmax(wide)):
        raise Unusable(f"{name} holds NaN or infinity. Take a checkpoint from before these weights were ruined.")


def misfit(config: PretrainedConfig, problems: str) -> Unusable:
    """The refusal of weights that do not fit; ``problems`` from `describe_problems`."""
    return Unusable(
        f"the weights do not fit {with_article(config.model_type)} of this configuration ({problems}). Loading "
        "them would leave parameters at random values; check that config.json belongs to these weights and that all of "
        "them are there."
    )


def describe_problems(report: Mapping[str, Any], origin: Mapping[str, Path] | None = None) -> str:
    """Missing keys, unexpected keys and wrong shapes of a loading report, or an empty string if all is well.

    Args:
        report: the ``output_loading_info`` of ``from_pretrained``.
        origin: the file of each key, to name it.
    """

    def where(name: str) -> str:
        return f" in {origin[name].name}" if origin and name in origin else ""

    def listing(title: str, items: list[str]) -> str:
        more = f", ... ({len(items)} in all)" if len(items) > _SHOWN else ""
        return f"{title}: {', '.join(items[:_SHOWN])}{more}"

    parts = []
    if missing := sorted(map(str, report.get("missing_keys", ()))):
        files = sorted({file.name for file in origin.values()}) if origin else []
        parts.append(listing("missing keys", missing) + (f", not in {_few(files)}" if files else ""))
    if unexpected := sorted(map(str, report.get("unexpected_keys", ()))):
        parts.append(listing("unexpected keys", [f"{name}{where(name)}" for name in unexpected]))
    if wrong := sorted(report.get("mismatched_keys", ()), key=lambda item: str(item[0])):
        shapes = [
            f"{name} is {list(saved)}{where(str(name))} and {list(wanted)} in the model"
            for name, saved, wanted in wrong
        ]
        parts.append(listing("wrong shapes", shapes))
    return "; ".join(parts)


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} ... {names[-1]}"


# The files


def _local_files(directory: Path, config: PretrainedConfig) -> list[Path]:
    named = getattr(config, "transformers_weights", None)
    for name in [named] if named else _NAMES:
        file = directory / name
        if file.is_file():
            if not name.endswith(".index.json"):
                return [file]
            shards = [directory / shard for shard in _shards(file)]
            missing = [shard.name for shard in shards if not shard.is_file()]
            if missing:
                raise Unusable(
                    f"{name} lists {len(shards)} files, but {len(missing)} of them are not there: {_few(missing)}. Is "
                    "the download complete?"
                )
            return shards
    raise Unusable(
        f"no weights by a name that transformers loads ({named or ', '.join(_NAMES)}). Is the download complete? "
        "Random weights are made by a run from a preset, such as model=tiny_deltanet."
    )


def _cached_files(hub_id: str) -> list[Path] | None:
    """The weights of a hub id if they were downloaded before; None leaves them to the loader."""

    def cached(name: str) -> Path | None:
        found = try_to_load_from_cache(hub_id, name)
        return Path(found) if isinstance(found, str) else None

    if single := cached("model.safetensors"):
        return [single]
    if index := cached("model.safetensors.index.json"):
        shards = [cached(name) for name in _shards(index)]
        return [shard for shard in shards if shard is not None] if None not in shards else None
    return None


def _shards(index: Path) -> list[str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        return sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(index, f"no weight_map can be read from it: {error!r}") from error


def _header(file: Path) -> dict[str, list[int]]:
    """Shape of every tensor; the library also compares the length of the file with what the header promises."""
    if file.suffix != ".safetensors":
        return {name: list(values.shape) for name, values in _unpickled(file, "meta").items()}
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(file, str(error)) from error


def _stored(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and values of every tensor of a file whose header is sound, one after the other."""
    if file.suffix != ".safetensors":
        yield from _unpickled(file, "cpu").items()
        return
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            yield name, opened.get_tensor(name)


def _unpickled(file: Path, device: str) -> dict[str, Tensor]:
    """The tensors of a pickle, read as the loader does: no code of it runs, and values stay in the file until used."""
    archive = zipfile.is_zipfile(file)  # old versions of torch wrote one pickle behind the other
    try:
        held = torch.load(file, map_location=device, weights_only=True, mmap=archive)
    except UnpicklingError as error:
        if archive:
            raise Unusable(
                f"{file} holds more than tensors, and its code would run when it is loaded ({_first_line(error)}). "
                "Take weights in safetensors."
            ) from error
        raise _damaged(file, "it is no archive of weights, or its end is missing") from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise _damaged(file, _first_line(error)) from error
    if not isinstance(held, dict) or not all(isinstance(values, Tensor) for values in held.values()):
        raise Unusable(f"{file} is no table of tensors. Is it the weights of a model?")
    return held


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _damaged(file: Path, reason: str) -> Unusable:
    if is_lfs_pointer(file):
        return Unusable(f"{file} {LFS_POINTER}")
    size = file.stat().st_size if file.exists() else 0
    return Unusable(f"{file} is damaged or incomplete ({reason}; it has {size} bytes). Download or copy it again.")


# The loader


def _ask_the_loader(where: str, config: PretrainedConfig, headers: dict[str, Tensor]) -> dict[str, Any] | None:
    """What ``from_pretrained`` says of these keys and shapes; None if it cannot load from the meta device."""
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    own = [name for name in getattr(model_class, "_tied_weights_keys", None) or () if name in headers]
    if own and getattr(config, "tie_word_embeddings", False):
        # the loader would compare values, and there are none on the meta device
        headers = {name: values for name, values in headers.items() if name not in own}
        logger.warning(
            "%s: config.json ties %s to the embeddings, and the weights hold it as well: where the two differ, that of "
            "the weights is used",
            where,
            ", ".join(own),
        )
    try:
        with _quiet_transformers():
            _, report = model_class.from_pretrained(
                None,
                config=config,
                state_dict=headers,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # a model's own initialisation may need real tensors; the workers check again
        logger.warning("%s: its weights are checked only when they are loaded (%s)", where, error)
        return None
    assert isinstance(report, dict)
    return report


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the loader's own report and progress bar."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
