"""Where the files of tasks lie in the data directory, and one message for all that are not there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from refine_verl.config import DataError
from refine_verl.data.readers import TABLES
from refine_verl.data.sources import FileSource, resolve_sources
from refine_verl.evaluate.samples import Unit
from refine_verl.evaluate.settings import EvaluateSettings

_SUFFIX = f"(?:{'|'.join(map(re.escape, TABLES))})"
_RULER = re.compile(r"(ruler_squadqa|ruler_hotpotqa)(?:_(.+))?_(\d+)_\d+_test" + _SUFFIX)


def check_data_dir(settings: EvaluateSettings, groups: Iterable[str]) -> None:
    """Refuse a data directory that is not there, or that was not given and is needed.

    Raises:
        DataError: names the groups that need it.
    """
    if settings.data_dir:
        folder = Path(settings.data_dir).expanduser()
        if not folder.is_dir():
            raise DataError(f"data_dir={folder}: no such directory.")
        return
    if needing := [group for group in groups if group != "ruler_niah"]:  # needles are made
        verb = "needs" if len(needing) == 1 else "need"
        raise DataError(f"data_dir is not set, and {', '.join(needing)} {verb} files. Give data_dir=DIR.")


def refuse_missing(missing: Sequence[str]) -> None:
    """Refuse to start with files missing; all of them in one message.

    Args:
        missing: for each file (or files of one command) which task lacks it, where it was looked for, how to get it.

    Raises:
        DataError: there are some.
    """
    if not missing:
        return
    listed = missing if len(missing) == 1 else ["files are missing:", *(f"- {text}" for text in missing)]
    cure = "Or name only tasks and lengths whose files are there, with tasks= and lengths=."
    raise DataError("\n".join([*listed, cure]))  # lines end with commands: to be copied as they are


def find_longbench(settings: EvaluateSettings, tasks: Sequence[str], missing: list[str]) -> dict[Unit, Path]:
    """The file of each LongBench task; what is not there is added to ``missing``.

    Raises:
        DataError: there are several for one task.
    """
    folders = _folders(settings, "longbench")
    found: dict[Unit, Path] = {}
    without = []
    for task in tasks:
        stem = re.compile(rf"{re.escape(task)}(_\d+)?{_SUFFIX}")
        files = [path for folder in folders for path in sorted(folder.glob(f"{task}*")) if stem.fullmatch(path.name)]
        if files:
            found[Unit("longbench", task, None)] = _only(files, task)
        else:
            without.append(task)
    if without:
        missing.append(
            f"longbench: no file for {', '.join(without)}: {_where(folders, f'{without[0]}.parquet')}. Make "
            f"{'it' if len(without) == 1 else 'them'} from LongBench's data with: python -m refine_verl.prepare "
            f"longbench --input Xnhyacinth/LongBench --tasks {' '.join(without)} --out {shlex.quote(str(folders[-1]))}"
        )
    return found


def find_ruler_qa(
    settings: EvaluateSettings, tasks: Sequence[str], model_type: str, missing: list[str]
) -> dict[Unit, Path]:
    """The test file of each RULER question answering task at each length; ``missing`` as in `find_longbench`.

    Raises:
        DataError: there are several for one task and none is named after the model's type.
    """
    folders = _folders(settings, "ruler")
    files: dict[tuple[str, int], list[tuple[str, Path]]] = {}
    for path in [*sorted(folders[0].glob("ruler_*")), *sorted(folders[1].glob("**/ruler_*"))]:
        if match := _RULER.fullmatch(path.name):
            files.setdefault((match[1], int(match[3])), []).append((match[2] or "", path))
    found = {}
    for task in tasks:
        for length in settings.lengths:
            choice = files.get((task, length), [])
            if not choice:
                missing.append(_no_ruler_file(settings, folders, task, length))
                continue
            named = [path for name, path in choice if name and model_type.startswith(name)]
            chosen = _only(named or [path for _, path in choice], f"{task} at {length} tokens")
            found[Unit("ruler_qa", task, length)] = chosen
    return found


def _no_ruler_file(settings: EvaluateSettings, folders: Sequence[Path], task: str, length: int) -> str:
    source, original = {
        "ruler_squadqa": ("squad", "dev-v2.0.json"),
        "ruler_hotpotqa": ("hotpotqa", "hotpotqa/hotpot_qa:distractor:validation"),
    }[task]
    return (
        f"ruler_qa: no test file for {task} at {length} tokens: "
        f"{_where(folders, f'{task}_{length}_200_test.parquet')}. "
        f"Make it with: python -m refine_verl.prepare ruler_qa --source {source} --input {original} "
        f"--tokenizer {shlex.quote(settings.tokenizer or settings.model)} --length {length} --train 0 --test 200 "
        f"--out {shlex.quote(f'{folders[-1]}/{source}_{length}')}"
    )


def find_documents(settings: EvaluateSettings, missing: list[str]) -> list[FileSource]:
    """Files with documents for next-token accuracy; ``missing`` as in `find_longbench`.

    Raises:
        DataError: a directory without files that can be read.
    """
    folder = _folders(settings, "ntp")[-1]
    if not folder.is_dir():
        missing.append(
            f"ntp: no directory {folder}. Put documents there (parquet or jsonl with a column text, or txt), for "
            "example with: python -m refine_verl.prepare documents --input FILES --tokenizer "
            f"{shlex.quote(settings.tokenizer or settings.model)} --min-tokens {max(settings.lengths)} "
            f"--out {shlex.quote(str(folder))}"
        )
        return []
    sources = resolve_sources((str(folder),), key="data_dir", default_split="validation")
    return [source for source in sources if isinstance(source, FileSource)]


def _folders(settings: EvaluateSettings, name: str) -> list[Path]:
    """Where files of a kind may lie: in the data directory, or in the folder of that name in it."""
    folder = Path(settings.data_dir).expanduser()
    return [folder, folder / name]


def _where(folders: Sequence[Path], name: str) -> str:
    return f"there is neither {name} in {folders[-1]} nor in {folders[0]}"


def _only(files: Sequence[Path], what: str) -> Path:
    if len(files) > 1:
        raise DataError(f"several files for {what}: {', '.join(map(str, files))}. Leave one of them in data_dir.")
    return files[0]
