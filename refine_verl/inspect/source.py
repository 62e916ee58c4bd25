"""The model, the tokenizer and the text of an inspection, refused one by one before weights are read."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from refine_verl.config import ConfigError, NSPSettings
from refine_verl.data.tokenizers import open_model_tokenizer
from refine_verl.inspect.settings import STDIN, InspectSettings
from refine_verl.models import FastWeightActor, ModelInfo, load_model, make_actor, open_model
from refine_verl.models.adapters import adapter_for, check_selection, sizes
from refine_verl.models.loading import import_external
from refine_verl.models.lora import Adapter, apply_adapter
from refine_verl.nsp import check_functions


@dataclass(frozen=True)
class Text:
    """A tokenised text.

    Attributes:
        name: of the file, for titles.
        tokens: ids of the tokens to read.
        left_out: tokens behind `max_length`.
        tokenizer: what made them.
    """

    name: str
    tokens: list[int]
    left_out: int
    tokenizer: PreTrainedTokenizerBase


def check_out(out: str, text: str) -> Path:
    """The page's path, refused before anything is computed for it.

    Raises:
        ConfigError: a directory, the text itself, or a place where no file can be written.
    """
    path = Path(out).expanduser()
    if path.is_dir():
        raise ConfigError("out", f"{out} is a directory. Give a file in it, {path / 'page.html'} say.")
    if text != STDIN and path.exists() and path.samefile(Path(text).expanduser()):
        raise ConfigError("out", f"{out} is the text itself, which would be lost. Give another file.")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError("out", f"{out} cannot be written: {parent} is no directory that you may write to.")
    return path


def read_text(text: str) -> str:
    """The text at a path, or of standard input; line ends as they are.

    Raises:
        ConfigError: no such file, not readable, empty, or no UTF-8 (the message says where).
    """
    where = "standard input" if text == STDIN else text
    try:
        data = sys.stdin.buffer.read() if text == STDIN else Path(text).expanduser().read_bytes()
    except FileNotFoundError as error:
        raise ConfigError("text", f"{where}: no such file.") from error
    except IsADirectoryError as error:
        raise ConfigError("text", f"{where} is a directory. Give one text file.") from error
    except OSError as error:
        raise ConfigError("text", f"{where} cannot be read: {error.strerror}.") from error
    if not data:
        raise ConfigError("text", f"{where} is empty.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(
            "text",
            f"{where} is no UTF-8 text: byte 0x{data[error.start]:02X} at offset {error.start} (line {line}). Convert "
            "it, with iconv say; of parquet and jsonl files, write one document to a text file.",
        ) from error


def tokenize(name: str, text: str, tokenizer: PreTrainedTokenizerBase, max_length: int, nsp: NSPSettings) -> Text:
    """Tokenise as documents are tokenised for training.

    Raises:
        ConfigError: fewer than c + k tokens, or an end that is left out though the selection looks at it.
    """
    ids = tokenizer(text, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
    tokens = [int(token) for token in ids[:max_length]]
    if len(tokens) < nsp.shortest_document:
        cut = f" (max_length={max_length} cuts it)" if len(ids) > max_length else ""
        raise ConfigError(
            "text",
            f"{name} has {len(tokens)} tokens{cut}; refine.nsp.chunks={nsp.chunks} positions with "
            f"refine.nsp.rollout_length={nsp.longest_rollout} tokens after them need at least {nsp.shortest_document}. "
            "Give a longer text, or lower one of them.",
        )
    if nsp.selection == "query" and len(ids) > max_length:
        raise ConfigError(
            "max_length",
            f"{max_length} leaves out the end of {name} ({len(ids)} tokens), where refine.nsp.selection=query looks "
            f"for the question. Set it to {len(ids)} or more.",
        )
    return Text(name, tokens, len(ids) - len(tokens), tokenizer)


def read_inputs(settings: InspectSettings) -> tuple[ModelInfo, Text]:
    """Everything that can be refused without weights.

    Raises:
        ConfigError, DataError, ModelError: what cannot be used, and why.
    """
    if settings.external_lib is not None:
        import_external(settings.external_lib)
    check_functions(settings.nsp)
    content = read_text(settings.text)
    info = open_model(settings.model, key="model")
    check_functions(settings.nsp, *sizes(info.config))  # once more, at the model's width
    check_selection(settings.nsp, adapter_for(info.config))
    tokenizer = open_model_tokenizer(settings.tokenizer, settings.model, info.vocab_size, keys=("tokenizer", "model"))
    name = "standard input" if settings.text == STDIN else Path(settings.text).name
    return info, tokenize(name, content, tokenizer, settings.max_length, settings.nsp)


def load_actor(model: str, info: ModelInfo, adapter: Adapter | None = None) -> FastWeightActor:
    """The model as training sees it: float32 weights, and on a GPU bf16 matrix products.

    Raises:
        ModelError: an adapter of another model.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = load_model(model, config=info.config, key="model")
    if adapter is not None:
        apply_adapter(module, adapter)
    module = module.to(device).eval()
    return make_actor(module, autocast_dtype=torch.bfloat16 if device.type == "cuda" else None)
