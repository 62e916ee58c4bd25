"""Files of documents, prompts, texts and metrics that are cut off, empty, or not what they are called."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from fuzz.cases import Case
from fuzz.world import World

Write = Callable[[Path], object]

_TEXT = "abcdefghijklmnopqrstuvwxyz" * 3
_ROWS = [{"text": _TEXT[n:] + _TEXT} for n in range(40)]
_PROMPTS = [{"prompt": f"What is {n}? {_TEXT}", "answers": ["it", "is"], "task": "hotpotqa"} for n in range(40)]


def _lines(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _parquet(path: Path, rows: list[dict[str, object]] = _ROWS) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def _two_columns_of_one_name(path: Path, name: str, values: list[object]) -> None:
    arrays = [pa.array(values), pa.array(values)]
    pq.write_table(pa.Table.from_arrays(arrays, names=[name, name]), path)


def _cut(path: Path, share: float) -> None:
    content = _parquet(path).read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def _altered(path: Path, seed: int) -> None:
    """Some bytes in the middle are others."""
    content = bytearray(_parquet(path).read_bytes())
    rng = random.Random(seed)
    for _ in range(8):
        content[rng.randrange(4, len(content) - 8)] ^= 0xFF
    path.write_bytes(bytes(content))


def _linked(path: Path) -> None:
    path.symlink_to(path.parent / "nothing.jsonl")


def _circle(path: Path) -> None:
    path.symlink_to(path)


DOCUMENT_FILES: dict[str, Write] = {
    "empty.jsonl": lambda p: p.write_bytes(b""),
    "empty.parquet": lambda p: p.write_bytes(b""),
    "empty.txt": lambda p: p.write_bytes(b""),
    "empty.jsonl.zst": lambda p: p.write_bytes(b""),
    "blank.txt": lambda p: p.write_bytes(b" \n\t\n"),
    "blank_lines.jsonl": lambda p: p.write_bytes(b"\n\n\n"),
    "cut_line.jsonl": lambda p: p.write_bytes(_lines(_ROWS)[:-30]),
    "array.jsonl": lambda p: p.write_bytes(b'[{"text": "a"}]\n'),
    "bare.jsonl": lambda p: p.write_bytes(b'"text"\n7\n'),
    "other_column.jsonl": lambda p: p.write_bytes(b'{"content": "abc"}\n'),
    "null_text.jsonl": lambda p: p.write_bytes(_lines([*_ROWS, {"text": None}])),
    "number_text.jsonl": lambda p: p.write_bytes(_lines([*_ROWS, {"text": 7}])),
    "list_text.jsonl": lambda p: p.write_bytes(_lines([*_ROWS, {"text": ["a"]}])),
    "empty_text.jsonl": lambda p: p.write_bytes(_lines([*_ROWS, {"text": ""}])),
    "surrogate.jsonl": lambda p: p.write_bytes(_lines(_ROWS) + b'{"text": "\\ud800"}\n'),
    "latin.jsonl": lambda p: p.write_bytes(_lines(_ROWS) + '{"text": "ü"}\n'.encode("latin-1")),
    "latin.txt": lambda p: p.write_bytes("ü".encode("latin-1") * 99),
    "utf16.txt": lambda p: p.write_bytes(_TEXT.encode("utf-16")),
    "utf16.jsonl": lambda p: p.write_bytes(_lines(_ROWS).decode().encode("utf-16")),
    "nul_bytes.jsonl": lambda p: p.write_bytes(b"\0" * 4096),
    "deep.jsonl": lambda p: p.write_bytes(b'{"text": ' + b"[" * 100_000 + b"\n"),
    "too_short.jsonl": lambda p: p.write_bytes(_lines([{"text": "a"}] * 9)),
    "too_few.jsonl": lambda p: p.write_bytes(_lines(_ROWS[:2])),
    "not_zst.jsonl.zst": lambda p: p.write_bytes(_lines(_ROWS)),
    "text_as.parquet": lambda p: p.write_bytes(_lines(_ROWS)),
    "cut_half.parquet": lambda p: _cut(p, 0.5),
    "cut_end.parquet": lambda p: _cut(p, 0.98),
    "altered_1.parquet": lambda p: _altered(p, 1),
    "altered_2.parquet": lambda p: _altered(p, 2),
    "numbers.parquet": lambda p: _parquet(p, [{"text": n} for n in range(40)]),
    "null_column.parquet": lambda p: _parquet(p, [{"text": None}] * 40),
    "null_row.parquet": lambda p: _parquet(p, [*_ROWS, {"text": None}]),
    "lists.parquet": lambda p: _parquet(p, [{"text": ["a"]}] * 40),
    "other_column.parquet": lambda p: _parquet(p, [{"content": "a"}] * 40),
    "two_columns.parquet": lambda p: _two_columns_of_one_name(p, "text", [_TEXT] * 40),
    "no_rows.parquet": lambda p: pq.write_table(pa.table({"text": pa.array([], pa.string())}), p),
    "lfs.parquet": lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    "lfs.jsonl": lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    "dangling.jsonl": _linked,
    "circle.jsonl": _circle,
    "folder.jsonl": lambda p: p.mkdir(),
    "table.csv": lambda p: p.write_text("text\nabc\n"),
    "no_suffix": lambda p: p.write_bytes(_lines(_ROWS)),
    "cut.jsonl.gz": lambda p: p.write_bytes(gzip.compress(_lines(_ROWS))[:-9]),
}
"""What documents are not."""

PROMPT_FILES: dict[str, Write] = {
    "empty.jsonl": lambda p: p.write_bytes(b""),
    "cut_line.jsonl": lambda p: p.write_bytes(_lines(_PROMPTS)[:-30]),
    "no_prompt.jsonl": lambda p: p.write_bytes(b'{"answers": ["a"], "task": "trec"}\n'),
    "null_prompt.jsonl": lambda p: p.write_bytes(b'{"prompt": null, "answers": ["a"], "task": "hotpotqa"}\n'),
    "empty_prompt.jsonl": lambda p: p.write_bytes(b'{"prompt": "", "answers": ["a"], "task": "hotpotqa"}\n'),
    "no_answers.jsonl": lambda p: p.write_bytes(b'{"prompt": "a", "task": "hotpotqa"}\n'),
    "empty_answers.jsonl": lambda p: p.write_bytes(b'{"prompt": "a", "answers": [], "task": "hotpotqa"}\n'),
    "number_answer.jsonl": lambda p: p.write_bytes(b'{"prompt": "a", "answers": 7, "task": "hotpotqa"}\n'),
    "null_answers.jsonl": lambda p: p.write_bytes(b'{"prompt": "a", "answers": [null], "task": "hotpotqa"}\n'),
    "unknown_task.jsonl": lambda p: p.write_bytes(_lines([{**row, "task": "nonsense"} for row in _PROMPTS])),
    "null_task.jsonl": lambda p: p.write_bytes(_lines([{**row, "task": None} for row in _PROMPTS])),
    "bad_length.jsonl": lambda p: p.write_bytes(
        b'{"prompt": "a", "answers": ["a"], "task": "hotpotqa", "max_gen_tokens": -3}\n'
    ),
    "text_length.jsonl": lambda p: p.write_bytes(
        b'{"prompt": "a", "answers": ["a"], "task": "hotpotqa", "max_gen_tokens": "x"}\n'
    ),
    "messages.jsonl": lambda p: p.write_bytes(
        b'{"prompt": [{"role": "user", "content": "a"}], "answers": ["a"], "task": "hotpotqa"}\n'
    ),
    "too_long.jsonl": lambda p: p.write_bytes(_lines([{**_PROMPTS[0], "prompt": _TEXT * 9}] * 8)),
    "plain.txt": lambda p: p.write_text("abc"),
    "two_columns.parquet": lambda p: _two_columns_of_one_name(p, "prompt", [_TEXT] * 8),
    "two_answers.jsonl": lambda p: p.write_bytes(
        b'{"prompt": "a", "answer": "a", "answers": ["b"], "task": "hotpotqa"}\n'
    ),
    "struct.parquet": lambda p: _parquet(p, [{"prompt": {"a": 1}, "answers": ["a"], "task": "hotpotqa"}] * 8),
    "folder.parquet": lambda p: p.mkdir(),
    "dangling.jsonl": _linked,
    "table.csv": lambda p: p.write_text("prompt\nabc\n"),
}
"""What prompts with answers are not."""

TEXT_FILES: dict[str, Write] = {
    "empty.txt": lambda p: p.write_bytes(b""),
    "blank.txt": lambda p: p.write_bytes(b"  \n"),
    "latin.txt": lambda p: p.write_bytes("ü".encode("latin-1") * 99),
    "short.txt": lambda p: p.write_bytes(b"a"),
    "folder.txt": lambda p: p.mkdir(),
    "dangling.txt": _linked,
}
"""What a text to inspect is not."""

METRICS: dict[str, Write] = {
    "missing": lambda p: None,
    "empty": lambda p: p.write_bytes(b""),
    "garbage": lambda p: p.write_bytes(b"nonsense\nnonsense\n"),
    "not_utf8": lambda p: p.write_bytes(b"\xff\xfe\x00" * 50),
    "array": lambda p: p.write_bytes(b"[1, 2]\n[1, 2]\n"),
    "text_step": lambda p: p.write_bytes(b'{"step": "x", "a": 1}\n{"step": 2, "a": 1}\n'),
    "no_step": lambda p: p.write_bytes(b'{"a": 1}\n{"a": 1}\n'),
    "text_value": lambda p: p.write_bytes(b'{"step": 1, "a": "x"}\n{"step": 2, "a": 1}\n'),
    "folder": lambda p: p.mkdir(),
    "huge_step": lambda p: p.write_bytes(b'{"step": 1e400, "a": 1}\n{"step": 2, "a": 1}\n'),
}
"""What metrics.jsonl is not."""

MAY_ACT = ("altered_1.parquet", "altered_2.parquet", "utf16.txt", "two_answers.jsonl", "text_value")
"""Whether these can be told from sound files depends on where the harm is."""


def file_cases() -> list[Case]:
    """Each file for each command that reads its kind."""
    cases = [
        _case("main", name, write, "data.train_files={inputs}/" + name, mentions=("data.train_files",))
        for name, write in DOCUMENT_FILES.items()
    ]
    plain = {name: write for name, write in DOCUMENT_FILES.items() if name not in ("too_short.jsonl", "too_few.jsonl")}
    cases += [_prepare(name, write) for name, write in plain.items()]
    cases += [
        _case("main", name, write, "data.val_files={inputs}/" + name, mentions=("data.val_files",))
        for name, write in list(plain.items())[::4]
    ]
    for base, key in (("posttrain", "data.train_files"), ("ttt", "data.val_files")):
        some = PROMPT_FILES.items() if base == "posttrain" else list(PROMPT_FILES.items())[::3]
        cases += [_case(base, name, write, f"{key}={{inputs}}/{name}", mentions=(key,)) for name, write in some]
    cases += [_evaluate(name, write) for name, write in plain.items() if name.endswith((".jsonl", ".parquet"))]
    cases += [_case("inspect", name, write, f"text={{inputs}}/{name}") for name, write in TEXT_FILES.items()]
    cases += [_report(name, write) for name, write in METRICS.items()]
    return [*cases, *_readable()]


def _case(base: str, name: str, write: Write, changed: str, mentions: tuple[str, ...] = ()) -> Case:
    return Case(
        id=f"{base}: {changed.partition('=')[0]} is {name}",
        base=base,
        changed=(changed,),
        make=lambda world: write(world.inputs / name),
        names=(name, *(mentions if name in ("too_few.jsonl", "too_short.jsonl", "no_rows.parquet") else ())),
        may_act=name in MAY_ACT,
    )


def _prepare(name: str, write: Write) -> Case:
    options = ("documents", "--input", "{inputs}/" + name, "--tokenizer", "bytes", "--min-tokens", "8", "--out", "out")
    return Case(
        id=f"prepare: --input is {name}",
        base="prepare",
        changed=options,
        make=lambda world: write(world.inputs / name),
        names=(name, "--input"),
        may_act=name in MAY_ACT,
    )


def _evaluate(name: str, write: Write) -> Case:
    def make(world: World) -> None:
        (world.inputs / "ntp").mkdir()
        write(world.inputs / "ntp" / name)

    return Case(
        id=f"evaluate: ntp reads {name}",
        base="evaluate",
        changed=("data_dir={inputs}",),
        make=make,
        names=(name, "ntp"),
        may_act=name in MAY_ACT,
    )


def _report(name: str, write: Write) -> Case:
    def make(world: World) -> None:
        (world.inputs / "run").mkdir()
        write(world.inputs / "run" / "metrics.jsonl")

    return Case(
        id=f"report: metrics are {name}",
        base="report",
        changed=("{inputs}/run",),
        make=make,
        names=("run",),
        may_act=name in MAY_ACT,
    )


def _readable() -> list[Case]:
    """Kinds of files that are common and have to be read, or said to be left out."""

    def zipped(world: World) -> None:
        (world.inputs / "documents.jsonl.gz").write_bytes(gzip.compress(_lines(_ROWS)))

    def linked_folder(world: World) -> None:
        (world.inputs / "all").mkdir()
        (world.inputs / "all" / "documents.jsonl").write_bytes(_lines(_ROWS))
        (world.inputs / "elsewhere").mkdir()
        (world.inputs / "elsewhere" / "more.jsonl").write_bytes(_lines(_ROWS[:30]))
        (world.inputs / "all" / "linked").symlink_to(world.inputs / "elsewhere")

    def byte_order_mark(world: World) -> None:
        (world.inputs / "documents.jsonl").write_bytes(b"\xef\xbb\xbf" + _lines(_ROWS))

    def windows_lines(world: World) -> None:
        (world.inputs / "documents.jsonl").write_bytes(_lines(_ROWS).replace(b"\n", b"\r\n"))

    def spaces(world: World) -> None:
        (world.inputs / "my own ü").mkdir()
        (world.inputs / "my own ü" / "documents.jsonl").write_bytes(_lines(_ROWS))

    made = {
        "documents.jsonl.gz": (zipped, "data.train_files={inputs}/documents.jsonl.gz"),
        "a folder of a linked folder": (linked_folder, "data.train_files={inputs}/all"),
        "a byte order mark": (byte_order_mark, "data.train_files={inputs}/documents.jsonl"),
        "lines of Windows": (windows_lines, "data.train_files={inputs}/documents.jsonl"),
        "a folder with spaces": (spaces, "data.train_files='{inputs}/my own ü'"),
    }
    return [
        Case(
            id=f"main: reads {name}",
            base="main",
            changed=(changed,),
            make=make,
            must_act=True,
            says=("70 documents", "symbolic link") if make is linked_folder else ("40 documents",),
            always=True,
        )
        for name, (make, changed) in made.items()
    ]
