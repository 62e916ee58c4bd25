"""Tokenizers by name: an existing one, plain bytes, or a byte-level BPE trained on the documents."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterable
from pathlib import Path

import tokenizers as backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from refine_verl.config import DataError, is_made_of_documents
from refine_verl.config.hub import LFS_POINTER, is_lfs_pointer, local_files_only, why_not
from refine_verl.data.sources import nearest_paths

logger = logging.getLogger(__name__)

EOS_TOKEN = "<|endoftext|>"
SMALLEST_BPE = 257  # 256 bytes and the end-of-sequence token


def load_tokenizer(
    spec: str,
    corpus_texts: Iterable[str] | None = None,
    out_dir: str | Path | None = None,
    *,
    key: str = "tokenizer",
) -> PreTrainedTokenizerBase:
    """Load or make a tokenizer.

    Args:
        spec: a directory or hub id; `bytes` (token i is byte i, 256 is end-of-sequence); or `bpe:SIZE`, a
            byte-level BPE of SIZE entries (bytes and end-of-sequence among them) trained on `corpus_texts`.
        corpus_texts: documents for `bpe:SIZE` (see `prepare.iterate_split_texts`); not read otherwise.
        out_dir: where a tokenizer made here is saved, so that `AutoTokenizer` loads it; None saves nothing.
        key: what named it, for messages.

    Raises:
        DataError: nothing loadable at `spec`, a SIZE that makes no sense, or no text to train on.
    """
    if spec == "bytes":
        vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
        return _finish(_byte_level(models.BPE(vocab=vocabulary, merges=[])), out_dir)
    if is_made_of_documents(spec):
        return _finish(_train_bpe(spec, corpus_texts, key), out_dir)
    try:
        return AutoTokenizer.from_pretrained(spec, trust_remote_code=False, local_files_only=local_files_only(spec))
    except Exception as error:  # the loader raises many unrelated types; all mean "no tokenizer there"
        path = Path(spec).expanduser()
        if path.is_dir():
            raise DataError(f"{key}={spec}: {_why_no_tokenizer(path, error)}") from error
        reason = why_not(spec) if isinstance(error, OSError) else str(error)
        raise DataError(
            f"{key}={spec}: this tokenizer is neither a directory nor a hub id that can be loaded: {reason}."
            f"{nearest_paths(path)} Without network access give a local directory, or use bytes or bpe:SIZE."
        ) from error


def _why_no_tokenizer(directory: Path, error: Exception) -> str:
    for file in sorted(directory.glob("*token*.json")):
        if is_lfs_pointer(file):
            return f"{file.name} {LFS_POINTER}"
    files = ", ".join(sorted(item.name for item in directory.iterdir())[:12]) or "nothing"
    return (
        f"no tokenizer can be loaded from this directory: {' '.join(str(error).split())} The directory holds: {files}. "
        "It needs tokenizer.json and tokenizer_config.json (save_pretrained writes them)."
    )


def open_model_tokenizer(
    given: str | None,
    own: str,
    vocabulary: int,
    *,
    keys: tuple[str, str],
    corpus_texts: Iterable[str] | None = None,
    cure: str = "",
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, which every command gets through here.

    Args:
        given: the one that was asked for; None takes the model's.
        own: where the model is.
        vocabulary: tokens that the model predicts.
        keys: what names a tokenizer, and what names the model, for messages.
        corpus_texts: see `load_tokenizer`; None: there are no documents to train one on.
        cure: what helps against one of too many tokens, if not the model's own.

    Raises:
        DataError: nothing that can be loaded, or a tokenizer of more tokens than the model predicts.
    """
    source, key = (own, keys[1]) if given is None else (given, keys[0])
    try:
        if corpus_texts is None:
            tokenizer = load_finished_tokenizer(source, key=key)
        else:
            tokenizer = load_tokenizer(source, corpus_texts, key=key)
    except DataError as error:
        other = f" Or name another tokenizer with {keys[0]}=DIR_OR_HUB_ID or {keys[0]}=bytes." if given is None else ""
        raise DataError(f"{error}{other}") from error
    if len(tokenizer) > vocabulary:
        other = f"name it with {keys[0]}=DIR" if given is None else f"leave {keys[0]} out"
        raise DataError(
            f"{key}: {source} has {len(tokenizer)} tokens, but the model predicts only {vocabulary}. "
            + (cure or f"Take the tokenizer that the model was trained with: {other}.")
        )
    return tokenizer


def _train_bpe(spec: str, corpus_texts: Iterable[str] | None, key: str) -> backend.Tokenizer:
    if not re.fullmatch(r"bpe:\d+", spec) or int(spec[4:]) < SMALLEST_BPE:
        raise DataError(
            f"{key}={spec}: write bpe:SIZE with SIZE at least {SMALLEST_BPE} (256 bytes and "
            "end-of-sequence), for example bpe:4096."
        )
    size = int(spec[4:])
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = iter(corpus_texts or ())
    first = next(texts, None)
    if first is None:
        raise DataError(f"{key}={spec}: it is trained on documents, but there are none: set data.train_files.")
    tokenizer.train_from_iterator(itertools.chain([first], texts), trainer)
    if tokenizer.get_vocab_size() < size:
        logger.warning(
            "tokenizer bpe:%d has only %d entries: the documents hold no more repeated pairs",
            size,
            tokenizer.get_vocab_size(),
        )
    return tokenizer


def _byte_level(model: models.Model) -> backend.Tokenizer:
    tokenizer = backend.Tokenizer(model)
    # Words are split before merging also where nothing is merged: the model caches words, which is faster.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS_TOKEN])
    return tokenizer


def _finish(tokenizer: backend.Tokenizer, out_dir: str | Path | None) -> PreTrainedTokenizerBase:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
    )
    if out_dir is None:
        return wrapped
    wrapped.save_pretrained(str(out_dir))
    return AutoTokenizer.from_pretrained(str(out_dir), trust_remote_code=False)


def load_finished_tokenizer(name: str, *, key: str = "tokenizer") -> PreTrainedTokenizerBase:
    """`load_tokenizer` where there are no documents to train one on.

    Raises:
        DataError: nothing loadable there, or `bpe:SIZE`, which would have to be trained first.
    """
    if is_made_of_documents(name):
        raise DataError(
            f"{key}={name} would be trained on a run's own documents. Give the tokenizer's directory (a run saves it "
            "with its model), a hub id, or bytes."
        )
    return load_tokenizer(name, key=key)
