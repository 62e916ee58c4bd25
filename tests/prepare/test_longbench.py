"""LongBench's files as prompts: templates, lengths, what is left out, and what is refused."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refine_verl.data.prompts import PromptDataset, PromptSettings, prepare_prompts
from refine_verl.prepare.__main__ import main
from refine_verl.prepare.longbench import DEFAULT_TASKS, TASKS, make_row
from refine_verl.scoring import TASKS as SCORED

RECORDS = [
    {"_id": "a1", "context": "short {input} {x}", "input": "Q1", "answers": ["one", "longer one"], "all_classes": None},
    {"_id": "a2", "context": "long " * 300, "input": "Q2", "answers": ["two"], "all_classes": None},
]


@pytest.fixture
def official(tmp_path):
    directory = tmp_path / "data"
    directory.mkdir()
    for task in DEFAULT_TASKS:
        classes = ["one", "two"] if task == "trec" else None
        rows = [json.dumps({**record, "all_classes": classes}) for record in RECORDS]
        (directory / f"{task}.jsonl").write_text("\n".join(rows) + "\n")
    return directory


def test_the_papers_twelve(official, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["longbench", "--input", str(official), "--out", str(out), "--tokenizer", "bytes"]) == 0
    assert sorted(path.stem for path in out.glob("*.parquet")) == sorted(DEFAULT_TASKS)
    assert len(DEFAULT_TASKS) == 12 and set(TASKS) <= set(SCORED)
    row = pq.read_table(out / "hotpotqa.parquet").to_pylist()[0]
    ask = "Answer the question based on the given passages. Only give me the answer and do not output any other words."
    # Braces in the text are text.
    passages = "The following are given passages.\nshort {input} {x}"
    assert row["prompt"] == f"{ask}\n\n{passages}\n\n{ask}\n\nQuestion: Q1\nAnswer:"
    assert row["answers"] == ["one", "longer one"]
    assert (row["id"], row["task"], row["max_gen_tokens"]) == ("hotpotqa:a1", "hotpotqa", 32)
    assert row["prompt_length"] == len(row["prompt"])
    assert row["max_answer_length"] == len(" longer one")
    assert row["total_length"] == row["prompt_length"] + row["max_answer_length"]
    assert pq.read_table(out / "trec.parquet").to_pylist()[0]["all_classes"] == ["one", "two"]
    assert "qmsum" in capsys.readouterr().out


def test_prompts_of_single_tasks():
    record = {"context": "C", "input": "I", "answers": ["a"], "_id": "x"}
    prompts = {task: make_row(task, record, "here")["prompt"] for task in TASKS}
    assert prompts["repobench-p"] == "Please complete the code given below. \nCINext line of code:"
    assert prompts["lcc"] == "Please complete the code given below. \nCNext line of code:"
    assert prompts["trec"].endswith("examples of questions.\n\nC\nI")
    assert prompts["triviaqa"].endswith("some examples.\n\nC\n\nI")
    assert prompts["qasper"].count('"unanswerable"') == 4
    for task in ("multi_news", "gov_report"):
        assert prompts[task].endswith("\n\nSummary:") and "I\n" not in prompts[task]
    assert len({prompts[task] for task in TASKS}) == len(TASKS) - 2  # three tasks ask for passages alike


def test_length_filter(official, tmp_path, capsys):
    arguments = ["longbench", "--input", str(official), "--tokenizer", "bytes", "--tasks", "qmsum"]
    row = make_row("qmsum", RECORDS[0], "here")
    total = len(row["prompt"]) + len(" longer one")
    for length, kept in ((total, ["qmsum:a1"]), (total - 1, []), (100_000, ["qmsum:a1", "qmsum:a2"])):
        out = tmp_path / f"out{length}"
        assert main([*arguments, "--length", str(length), "--out", str(out)]) == 0
        assert pq.read_table(out / "qmsum.parquet").column("id").to_pylist() == kept
    assert "qmsum" in capsys.readouterr().out


def test_without_a_tokenizer_nothing_is_counted(official, tmp_path):
    assert main(["longbench", "--input", str(official), "--out", str(tmp_path / "out"), "--tasks", "lcc"]) == 0
    rows = pq.read_table(tmp_path / "out" / "lcc.parquet").to_pylist()
    assert [row["total_length"] for row in rows] == [None, None]


def test_parquet_and_finished_tasks(official, tmp_path, monkeypatch):
    records = [json.loads(line) for line in (official / "lcc.jsonl").read_text().splitlines()]
    (official / "lcc.jsonl").unlink()
    pq.write_table(pa.Table.from_pylist(records), official / "lcc.parquet")
    arguments = ["longbench", "--input", str(official), "--out", str(tmp_path / "out"), "--tasks", "lcc", "qasper"]
    from refine_verl.prepare import longbench

    write, written = longbench.write_table, []

    def stop_at_second(output, name, *rest):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(name)
        return write(output, name, *rest)

    monkeypatch.setattr(longbench, "write_table", stop_at_second)
    assert main(arguments) == 130
    assert [path.name for path in (tmp_path / "out").glob("*.parquet")] == ["lcc.parquet"]
    monkeypatch.setattr(
        longbench, "write_table", lambda output, name, *rest: written.append(name) or write(output, name, *rest)
    )
    assert main(arguments) == 0
    assert written == ["lcc.parquet", "qasper.parquet"]


def test_refusals_come_before_anything_is_written(official, tmp_path, capsys):
    out = str(tmp_path / "out")
    (official / "qmsum.jsonl").unlink()
    (official / "lcc.jsonl").write_text(json.dumps({**RECORDS[0], "answers": []}) + "\n")
    (official / "trec.jsonl").write_text(json.dumps({"input": "x", "answers": ["x"]}) + "\n")
    cases = [
        (["--input", str(official)], "holds no qmsum.jsonl"),
        (["--input", str(official), "--tasks", "hotpotq"], "unknown task 'hotpotq'"),
        (["--input", str(official), "--tasks", "lcc"], "lcc.jsonl, line 1: 'answers' holds []"),
        (["--input", str(official), "--tasks", "trec"], "trec.jsonl, line 1: column 'context' is missing"),
        (["--input", str(official / "lcc.jsonl"), "--tasks", "lcc"], "is a file; give the directory"),
        (["--input", str(official), "--length", "5"], "length: 5 counts tokens: give --tokenizer"),
        (["--input", str(official), "--length", "0", "--tokenizer", "bytes"], "length: must be at least 1, got 0"),
    ]
    for arguments, message in cases:
        assert main(["longbench", "--out", out, *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_written_files_go_into_validation(official, tmp_path, bytes_tokenizer):
    out = tmp_path / "out"
    main(["longbench", "--input", str(official), "--out", str(out)])
    settings = PromptSettings(val_files=str(out), cache_dir=str(tmp_path / "cache"), id_key="id")
    prepared = prepare_prompts(settings, "validation", bytes_tokenizer)
    assert prepared.statistics.tasks == dict.fromkeys(sorted(DEFAULT_TASKS), 2)
    rows = [PromptDataset(prepared.path)[index] for index in range(len(DEFAULT_TASKS) * 2)]
    assert {row["id"].split(":")[0] for row in rows} == set(DEFAULT_TASKS)
    assert {row["task"]: row["max_new_tokens"] for row in rows}["multi_news"] == 512
    assert [row["classes"] for row in rows if row["task"] == "trec"] == [["one", "two"]] * 2


def test_tasks_may_come_one_after_another(official, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["longbench", "--input", str(official), "--out", str(out)]
    assert main([*arguments, "--tasks", "lcc"]) == 0
    before = (out / "lcc.parquet").read_bytes()
    assert main([*arguments, "--tasks", "trec", "lcc"]) == 0
    assert (out / "lcc.parquet").read_bytes() == before and (out / "trec.parquet").exists()
    (official / "lcc.jsonl").write_text(json.dumps(RECORDS[0]) + "\n")
    capsys.readouterr()
    assert main([*arguments, "--tasks", "lcc"]) == 2
    assert "holds lcc.parquet made from another input" in capsys.readouterr().err
