"""RULER's needles in a haystack: made once per tokenizer, length and seed by lm-evaluation-harness, then frozen.

The harness makes them anew in every run, from Python's global random state, so that what else a run evaluates changes
them. Here each file depends on its own name only, and on the harness's version; its hash lies beside it.
"""

from __future__ import annotations

import hashlib
import io
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from refine_verl.config import ConfigError, DataError
from refine_verl.data.cache import default_cache_dir, make_key
from refine_verl.data.sources import resolve_sources
from refine_verl.data.tokenize import tokenizer_fingerprint
from refine_verl.evaluate.console import INSTALL, require_lm_eval
from refine_verl.evaluate.samples import NIAH_TOKENS
from refine_verl.evaluate.settings import EvaluateSettings
from refine_verl.record.files import write_atomically

FOLDER = "ruler_niah"
ESSAYS = "paul_graham_essays"
_WORDS = {"type_needle_k": "words", "type_needle_v": "numbers"}
KINDS: dict[str, dict[str, Any]] = {
    "niah_single_1": {"type_haystack": "repeat", **_WORDS},
    "niah_single_2": {"type_haystack": "essay", **_WORDS},
    "niah_single_3": {"type_haystack": "essay", "type_needle_k": "words", "type_needle_v": "uuids"},
    "niah_multikey_1": {"type_haystack": "essay", **_WORDS, "num_needle_k": 4},
    "niah_multikey_2": {"type_haystack": "needle", **_WORDS},
    "niah_multikey_3": {"type_haystack": "needle", "type_needle_k": "uuids", "type_needle_v": "uuids"},
    "niah_multivalue": {"type_haystack": "essay", **_WORDS, "num_needle_v": 4},
    "niah_multiquery": {"type_haystack": "essay", **_WORDS, "num_needle_q": 4},
}
"""What the harness's tasks of these names pass to its generator."""


def needle_folder(settings: EvaluateSettings) -> Path:
    """Where frozen needles and the essays lie: `ruler_niah` in the data directory, or in the cache without one."""
    base = Path(settings.data_dir).expanduser() if settings.data_dir else default_cache_dir()
    return base / FOLDER


def needle_file(settings: EvaluateSettings, task: str, length: int, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Name of the file with the needles of a task at a length."""
    key = make_key(tokenizer_fingerprint(tokenizer))[:10]
    return needle_folder(settings) / f"{task}_{length}_{settings.niah_samples}_seed{settings.seed}_{key}.parquet"


def missing_files(settings: EvaluateSettings, tasks: list[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What needles that are not made yet need and lack: essays, NLTK's sentence splitter (and how to get them).

    Raises:
        DataError: a frozen file that changed.
        ConfigError: lm-evaluation-harness is not installed.
    """
    unmade = set()
    for task in tasks:
        for length in settings.lengths:
            path = needle_file(settings, task, length, tokenizer)
            if path.exists():
                _verify(path)
            else:
                unmade.add(task)
    if not unmade:
        return []
    require_lm_eval()
    hidden = sorted(task for task in unmade if KINDS[task]["type_haystack"] == "essay")
    missing = []
    with _generator(settings):  # also where nothing is hidden in essays: it refuses what is not installed
        import nltk

        if hidden and not _essay_file(settings).exists():
            missing.append(_no_essays(settings, hidden))
        try:
            if hidden:
                nltk.data.find("tokenizers/punkt_tab")
        except LookupError:
            folder = _nltk_folder(settings)
            missing.append(
                f"ruler_niah: NLTK's sentence splitter is missing: there is no {folder}/tokenizers/punkt_tab. Where "
                'the network can be reached, get it with: python -c "import nltk; '
                f"nltk.download('punkt_tab', download_dir='{folder}')\""
            )
    return missing


def frozen_needles(settings: EvaluateSettings, task: str, length: int, tokenizer: PreTrainedTokenizerBase) -> Path:
    """The file with the needles of a task at a length, made where it is not there yet.

    Raises:
        DataError: the file has changed, or the length leaves no room for a needle.
    """
    path = needle_file(settings, task, length, tokenizer)
    if path.exists():
        _verify(path)
        return path
    rows = [
        {
            "index": sample["index"],
            "prompt": f"{sample['input']} {sample['gen_prefix']}",
            "answer": [str(answer) for answer in sample["outputs"]],
            "max_gen_tokens": NIAH_TOKENS,
            "max_seq_length": length,
            "task": task,
        }
        for sample in _generate(settings, task, length, tokenizer)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, compression="zstd")
    write_atomically(_hash_file(path), f"{hashlib.sha256(file.getvalue()).hexdigest()}  {path.name}\n")
    write_atomically(path, file.getvalue())
    return path


def _generate(
    settings: EvaluateSettings, task: str, length: int, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    kind = KINDS[task]["type_haystack"]
    before = random.getstate()
    with _generator(settings) as ruler:
        from lm_eval.tasks.ruler.niah_utils import TEMPLATE

        haystack = _essay_words(settings) if kind == "essay" else ruler.get_haystack(type_haystack=kind)
        random.seed(f"{settings.seed} {task} {length}")
        try:
            return list(
                ruler.generate_samples(
                    haystack,
                    TOKENIZER=tokenizer,
                    max_seq_length=length,
                    template=TEMPLATE,
                    num_samples=settings.niah_samples,
                    **KINDS[task],
                )
            )
        except ValueError as error:
            raise DataError(
                f"{task} cannot be made at {length} tokens: {error} Raise lengths, or leave this one out."
            ) from error
        finally:
            random.setstate(before)


@contextmanager
def _generator(settings: EvaluateSettings) -> Iterator[Any]:
    """The harness's module. It fetches the sentence splitter when it is imported, which only essays need."""
    try:
        import nltk
        import wonderwords  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError("tasks", f"ruler_niah needs {error.name}, which is not installed: {INSTALL}") from error
    local = str(_nltk_folder(settings))
    if local not in nltk.data.path:
        nltk.data.path.insert(0, local)
    with mock.patch.object(nltk, "download", lambda *_: False):
        with redirect_stdout(io.StringIO()):  # "Downloaded punkt_tab", which it now says without having done so
            import lm_eval.tasks.ruler.prepare_niah as ruler

        with mock.patch.object(ruler, "tqdm", lambda rows, **_: rows):
            yield ruler


def _nltk_folder(settings: EvaluateSettings) -> Path:
    """Beside the needles: in ``data_dir``, or in the cache where it is not set."""
    return needle_folder(settings).parent / "nltk_data"


def _essay_file(settings: EvaluateSettings) -> Path:
    """Where the essays are; where they are looked for first, if they are nowhere."""
    places = [needle_folder(settings) / f"{ESSAYS}{end}" for end in (".parquet", ".jsonl")]
    return next(filter(Path.exists, places), places[0])


def _no_essays(settings: EvaluateSettings, tasks: list[str]) -> str:
    path = _essay_file(settings)
    return (
        f"ruler_niah: {', '.join(tasks)} hide their needles in essays, and there is no {path} (or .jsonl) "
        'with a column text. Where the hub can be reached, make it with: python -c "from datasets import '
        f"load_dataset; load_dataset('baber/paul_graham_essays', split='train').to_parquet('{path}')\". "
        "Without essays only niah_single_1, niah_multikey_2 and niah_multikey_3 can be made: tasks=niah_single_1."
    )


def _essay_words(settings: EvaluateSettings) -> list[str]:
    path = _essay_file(settings)
    if not path.exists():
        raise DataError(f"{path} is no longer there.")
    texts = []
    for source in resolve_sources((str(path),), key="data_dir", default_split="train"):
        for record in source.records():
            if not isinstance(record.columns.get("text"), str):
                raise DataError(f"{record.where} has no text in a column text.")
            texts.append(record.columns["text"])
    return re.sub(r"\s+", " ", " ".join(texts)).split(" ")


def _hash_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _verify(path: Path) -> None:
    cure = f"Delete {path} to have it made again; results with it do not compare with earlier ones."
    try:
        wanted = _hash_file(path).read_text().split()[0]
    except (OSError, IndexError) as error:
        raise DataError(f"{path} has no hash in {_hash_file(path).name} beside it. {cure}") from error
    if hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
        raise DataError(f"{path} is not the file that was made: its sha256 differs from the one beside it. {cure}")
