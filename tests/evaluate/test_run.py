"""The command from end to end on made-up rows in the published formats, with a tiny DeltaNet over bytes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference.evaluate_files import TEXT, write_jsonl, write_parquet
from transformers import AutoModelForCausalLM

from refine_verl.adaptation import adapt
from refine_verl.config import ConfigError
from refine_verl.data.tokenizers import load_tokenizer
from refine_verl.evaluate.__main__ import main
from refine_verl.evaluate.files import find_documents
from refine_verl.evaluate.model import EvaluatedModel
from refine_verl.evaluate.results import Results
from refine_verl.evaluate.samples import read_documents
from refine_verl.evaluate.settings import EvaluateSettings
from refine_verl.models import load_model
from refine_verl.scoring import score

LENGTH = 128


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"index": n, "prompt": f"{TEXT[n:]}\nQuestion: {n}?\nAnswer:", "answer": ["e", "zz"], "task": "ruler_squadqa"}
        for n in (5, 11, 2)
    ]
    write_parquet(folder / f"ruler/ruler_squadqa_delta_net_{LENGTH}_3_test.parquet", rows)
    write_parquet(folder / f"ruler/ruler_squadqa_lact_{LENGTH}_3_test.parquet", rows[:1])
    long = {"prompt": TEXT * 3, "answers": ["City"], "max_gen_tokens": 4, "task": "trec"}
    write_parquet(
        folder / "longbench/trec_16384.parquet",
        [long, *({**long, "prompt": f"{TEXT[:n]} Type:"} for n in (20, 33, 41))],
    )
    write_jsonl(folder / "ntp/documents.jsonl", [{"text": TEXT[n:] + TEXT} for n in (0, 3, 9)] + [{"text": TEXT[:40]}])
    return folder


def run(model: Path, data: Path, out: Path, *more: str, tasks: str = "ruler_squadqa,trec,ntp") -> dict[str, Any]:
    arguments = [f"model={model}", f"tasks={tasks}", f"data_dir={data}", f"out={out}", f"lengths={LENGTH}", *more]
    assert main([*arguments, "batch_size=2"]) == 0
    return json.loads((out / "results.json").read_text())


def lines(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"samples/{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(model_dir: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs") / "plain"
    return out, run(model_dir, data, out)


def row(results: dict[str, Any], metric: str) -> dict[str, Any]:
    return next(entry for entry in results["results"] if entry["metric"] == metric)


def test_next_token_accuracy_is_that_of_plain_passes(finished: tuple[Path, dict[str, Any]], model_dir: Path) -> None:
    out, results = finished
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    losses, hits = [], []
    for start in (0, 3, 9):
        ids = torch.tensor([list((TEXT[start:] + TEXT).encode())[:LENGTH]])
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        losses.append(-log_probs.gather(1, ids[0, 1:, None]).mean().item())
        hits.append((log_probs.argmax(-1) == ids[0, 1:]).float().mean().item())
    loss, accuracy = row(results, "ntp_loss"), row(results, "ntp_accuracy")
    assert loss["value"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert loss["stderr"] == pytest.approx(np.std(losses, ddof=1) / np.sqrt(3), rel=1e-3)
    assert accuracy["value"] == pytest.approx(np.mean(hits), abs=1e-6)
    assert (loss["samples"], loss["left_out"]) == (3, 1)  # one document is too short
    assert [record["ntp_loss"] for record in lines(out, f"ntp_{LENGTH}")] == pytest.approx(losses, rel=1e-4)


def test_answers_are_those_of_the_model(finished: tuple[Path, dict[str, Any]], model_dir: Path) -> None:
    out, results = finished
    model: Any = load_model(model_dir)
    records = lines(out, f"ruler_squadqa_{LENGTH}")
    assert len(records) == 3  # those of the model's own family
    for n, record in zip((5, 11, 2), records, strict=True):
        prompt = list(f"{TEXT[n:]}\nQuestion: {n}?\nAnswer:".encode())
        with adapt(model, [prompt], {"method": "none"}) as session:
            ids = session.generate(max_new_tokens=32)[0].tolist()
        wanted = bytes(i for i in ids if i < 256).decode(errors="replace")
        assert record["prediction"] == wanted
        assert record["substring_match"] == score("ruler_squadqa", wanted, ["e", "zz"])["substring_match"]
    assert row(results, "substring_match")["value"] == np.mean([record["substring_match"] for record in records])


def test_longbench_leaves_out_what_is_too_long(finished: tuple[Path, dict[str, Any]]) -> None:
    entry = row(finished[1], "class_match")
    assert (entry["samples"], entry["left_out"]) == (3, 1)


def test_what_is_left_out_is_said_below_the_table(
    model_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(model_dir, data, tmp_path / "o")
    shown, written = capsys.readouterr().out, (tmp_path / "o/results.md").read_text()
    for line in (
        "Left out of the samples that were read, because they are longer than the last of lengths: TC 1 of 4.",
        f"Left out of the documents that were read, because they are shorter than the length: at {LENGTH} 1 of 4.",
    ):
        assert line in shown.splitlines() and f"|\n\n{line}\n" in written
    assert shown.count("Left out") == 2


def test_a_length_counts_documents_until_it_has_its_own(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "ntp/documents.jsonl", [{"text": "a" * n} for n in (10, 4, 12)])
    settings = EvaluateSettings(model="m", out="o", tasks=["ntp"], data_dir=str(tmp_path), lengths=[8, 12], limit=1)
    units = list(read_documents(find_documents(settings, []), settings, load_tokenizer("bytes")))
    assert [(unit.length, unit.left_out) for unit in units] == [(8, 0), (12, 2)]


def test_what_a_run_leaves(finished: tuple[Path, dict[str, Any]]) -> None:
    out, results = finished
    assert {path.name for path in out.iterdir()} == {"results.json", "results.md", "run.json", "samples"}
    assert results["convention"] == "paper" and results["versions"]["torch"] == torch.__version__
    text = (out / "results.md").read_text()
    assert "## LongBench (Table 5)" in text and "| Model | SQuADQA 128 |" in text


def test_finished_samples_are_not_asked_again(
    model_dir: Path, data: Path, tmp_path: Path, finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    write = EvaluatedModel.write

    def counting(self: EvaluatedModel, prompts: Any, *rest: Any, **more: Any) -> list[str]:
        asked.append(len(prompts))
        return write(self, prompts, *rest, **more)

    monkeypatch.setattr(EvaluatedModel, "write", counting)
    run(model_dir, data, tmp_path / "o", "limit=2", tasks="ruler_squadqa")
    assert sum(asked) == 2
    path = tmp_path / f"o/samples/ruler_squadqa_{LENGTH}.jsonl"
    path.write_text(path.read_text()[:-30])  # killed while it wrote the second line
    results = run(model_dir, data, tmp_path / "o", tasks="ruler_squadqa")
    assert sum(asked) == 2 + 2
    mine, whole = lines(tmp_path / "o", path.stem), lines(finished[0], path.stem)
    assert mine == whole and results["results"][0] == row(finished[1], "substring_match")


def test_tasks_are_added(model_dir: Path, data: Path, tmp_path: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    for task in ("trec", "ntp", "ruler_squadqa", "trec"):
        results = run(model_dir, data, tmp_path / "o", tasks=task)
    by_name = {(entry["task"], entry["metric"]): entry for entry in results["results"]}
    assert len(results["results"]) == 4
    assert by_name == {(entry["task"], entry["metric"]): entry for entry in finished[1]["results"]}
    assert "## RULER QA" in (tmp_path / "o/results.md").read_text()


def test_tasks_without_a_convention_go_with_either(
    model_dir: Path, data: Path, tmp_path: Path, finished: tuple[Path, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o"
    assert run(model_dir, data, out, tasks="ntp")["convention"] is None
    assert main(["compare", str(finished[0]), str(out)]) == 0
    assert run(model_dir, data, out, "convention=lm_eval", tasks="trec")["convention"] == "lm_eval"
    assert run(model_dir, data, out, tasks="ntp")["convention"] == "lm_eval"
    assert json.loads((out / "run.json").read_text())["convention"] == "lm_eval"
    capsys.readouterr()
    arguments = [f"model={model_dir}", f"data_dir={data}", f"out={out}", f"lengths={LENGTH}"]
    assert main([*arguments, "tasks=trec"]) == 2
    assert 'another convention (convention: "lm_eval" there, "paper" now)' in capsys.readouterr().err


def test_another_model_does_not_go_on_in_the_same_directory(
    other_dir: Path, data: Path, finished: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = finished[0]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    arguments = [f"model={other_dir}", "tasks=trec", f"data_dir={data}", f"out={out}", f"lengths={LENGTH}"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert re.search(rf'another model \(model: "[^"]*" there, "{other_dir}" now\)', said), said
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_another_adapter_is_named(tmp_path: Path) -> None:
    plain = {"engine": "own", "model": "m", "model_sha256": "1", "tokenizer": "m", "convention": None}
    adapted = {**plain, "adapter": "a", "model_sha256": "2"}
    for name, identity in (("plain", plain), ("adapted", adapted)):
        Results(str(tmp_path / name), identity).save("task", [])
        Results(str(tmp_path / name), identity)
    Results(str(tmp_path / "adapted"), {**adapted, "adapter": "moved/a"})  # with the same weights
    for name, identity, said in (
        ("adapted", plain, 'another adapter (adapter: "a" there, null now)'),
        ("adapted", {**adapted, "adapter": "b", "model_sha256": "3"}, 'another adapter (adapter: "a" there, "b" now)'),
        ("plain", adapted, 'another adapter (adapter: null there, "a" now)'),
        ("adapted", {**plain, "model": "n"}, 'another model (model: "m" there, "n" now, adapter: "a" there, null now)'),
        ("plain", {**plain, "model_sha256": "3"}, "another model (model: its content has changed)"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            Results(str(tmp_path / name), identity)


def test_settings_that_differ_are_named(
    model_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["ttt=refine", "adapt.nsp.chunks=2", "adapt.lr=0.01"]
    run(model_dir, data, tmp_path / "o", *keys, "limit=1", tasks="ruler_squadqa")
    capsys.readouterr()
    arguments = [f"model={model_dir}", "tasks=ruler_squadqa", f"data_dir={data}", f"out={tmp_path}/o", *keys[:1]]
    assert main([*arguments, f"lengths={LENGTH}", "adapt.nsp.chunks=3", "adapt.lr=0.02"]) == 2
    said = capsys.readouterr().err
    assert "another adapt (adapt.nsp.chunks: 2 there, 3 now, adapt.lr: 0.01 there, 0.02 now)" in said


def test_finished_samples_do_not_leave_the_score(
    model_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o"
    run(model_dir, data, out, tasks="ruler_squadqa,trec")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    arguments = [f"model={model_dir}", f"data_dir={data}", f"out={out}"]
    for task, keys, said in (
        ("ruler_squadqa", [f"lengths={LENGTH}", "limit=1"], f"3 finished samples of ruler_squadqa_{LENGTH}, and 1 of"),
        ("trec", ["lengths=50"], "3 finished samples of trec, and 2 of them are asked for now"),
    ):
        capsys.readouterr()
        assert main([*arguments, f"tasks={task}", *keys]) == 2
        assert said in capsys.readouterr().err
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    results = run(model_dir, data, out, "limit=1", tasks="ntp")["results"]
    chosen = {entry["task"]: (entry["samples"], entry["settings"]) for entry in results}
    assert chosen == {
        "ruler_squadqa": (3, {"limit": None}),
        "trec": (3, {"limit": None, "max_tokens": LENGTH}),
        "ntp": (1, {"limit": 1}),
    }


def test_test_time_training(model_dir: Path, data: Path, tmp_path: Path, finished: tuple[Path, Any]) -> None:
    adapt_keys = ("adapt.lr=0.05", "adapt.nsp.chunks=2", "adapt.steps=2")
    for method in ("sft", "refine"):
        out = tmp_path / method
        keys = adapt_keys if method == "refine" else adapt_keys[:1]
        results = run(model_dir, data, out, f"ttt={method}", *keys, tasks="ruler_squadqa")
        assert results["ttt"] == method and results["adapt"]["lr"] == 0.05
        plain = [record["prediction"] for record in lines(finished[0], f"ruler_squadqa_{LENGTH}")]
        assert [record["prediction"] for record in lines(out, f"ruler_squadqa_{LENGTH}")] != plain


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["tasks=ruler_hotpotqa"], "no test file for ruler_hotpotqa at 128 tokens.*prepare ruler_qa --source hotpotqa"),
        (["tasks=qasper"], "no file for qasper.*prepare longbench"),
        (["tasks=ntp", "lengths=[9999]"], "no document of .* has 9999 tokens; the longest has"),
        (["tasks=niah_multikey_1"], r"niah_multikey_1 hide their needles in essays.*paul_graham_essays.parquet"),
        (["tasks=piqa"], r"no file for piqa.*load_dataset\(\"baber/piqa\", split=\"validation\"\)"),
        (["tasks=trec", "data_dir=/nowhere"], "data_dir=/nowhere: no such directory"),
        (["tasks=trec", "model=/nowhere"], "error: model[=:] ?/nowhere: no such directory"),
        (
            ["tasks=piqa", "lengths=128"],
            "lengths: has no effect on these tasks: it is about ruler_qa and ruler_niah and",
        ),
        (["tasks=trec", "ttt=sft", "adapt.lrr=1"], "adapt.lrr: unknown key.*'lr'"),
        (["tasks=trec", "ttt=none", "adapt.lr=1"], "adapt: has no effect with ttt=none"),
    ],
)
def test_refused(
    keys: list[str], message: str, model_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    usual = {"model": model_dir, "data_dir": data, "out": out}
    if "tasks=piqa" not in keys:  # which takes no lengths
        usual["lengths"] = LENGTH
    given = {key: value for key, value in usual.items() if not any(item.startswith(f"{key}=") for item in keys)}
    assert main([*(f"{key}={value}" for key, value in given.items()), *keys]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: "), error
    assert re.search(message, error), error
    assert not out.exists()


def test_commands_to_copy_hold_paths_with_spaces(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "my data"
    folder.mkdir()
    arguments = [f"model={model_dir}", "tasks=ruler_squadqa,qasper,piqa,ntp", f"data_dir={folder}", f"out={tmp_path}/o"]
    assert main(arguments) == 2
    items = capsys.readouterr().err.splitlines()[1:-1]
    commands = [shlex.split(item[item.index("python -m" if "-m" in item else "python -c") :]) for item in items]
    places = [command[command.index("--out") + 1] for command in commands if "--out" in command]
    assert len(commands) == 6 and {Path(place).parent.name for place in places} == {"my data", "ruler"}
    (script,) = [command[2] for command in commands if command[1] == "-c"]
    compile(script, "script", "exec")
    assert str(folder) in script


def test_all_missing_files_at_once(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = "ruler_qa,qasper,trec,piqa,fda,ntp"
    arguments = [f"model={model_dir}", f"tasks={tasks}", f"data_dir={tmp_path}", f"out={tmp_path}/o"]
    assert main([*arguments, "lengths=4096,8192"]) == 2
    first, *items, last = capsys.readouterr().err.splitlines()
    assert first == "error: files are missing:" and "tasks=" in last
    wanted = [
        *(f"ruler_{name} at {n} tokens.*--length {n}" for name in ("squadqa", "hotpotqa") for n in (4096, 8192)),
        "longbench: no file for qasper, trec.*--tasks qasper trec",
        "no file for fda.*to_parquet",
        "no file for piqa.*to_parquet",
        "ntp: no directory .*prepare documents",
    ]
    assert len(items) == len(wanted)
    for item, pattern in zip(items, wanted, strict=True):
        assert item.startswith("- ") and re.search(pattern, item), item


def test_groups_that_need_a_data_directory(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for tasks, said in (
        ("ntp", "data_dir is not set, and ntp needs files"),
        ("piqa,niah_single_1,ruler_qa", "data_dir is not set, and ruler_qa, short_context need files"),
    ):
        assert main([f"model={model_dir}", f"tasks={tasks}", f"out={tmp_path}/o"]) == 2
        assert said in capsys.readouterr().err


def test_two_files_for_one_task(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("trec.jsonl", "trec_512.jsonl"):
        write_jsonl(tmp_path / name, [{"prompt": "a", "answers": ["City"]}])
    arguments = [f"model={model_dir}", "tasks=trec", f"data_dir={tmp_path}", f"out={tmp_path}/o"]
    assert main(arguments) == 2
    assert "several files for trec" in capsys.readouterr().err


def test_comparison(
    model_dir: Path,
    other_dir: Path,
    data: Path,
    tmp_path: Path,
    finished: tuple[Path, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = finished[0]
    run(other_dir, data, tmp_path / "b")
    capsys.readouterr()
    assert main(["compare", str(first), str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert "ntp 128 ntp_loss" in shown and "95 % interval" in shown
    run(other_dir, data, tmp_path / "few", "limit=2", tasks="trec")
    assert main(["compare", str(first), str(tmp_path / "few")]) == 2
    assert "they are not the same ones" in capsys.readouterr().err
    run(model_dir, data, tmp_path / "lm", "convention=lm_eval", tasks="trec")
    assert main(["compare", str(first), str(tmp_path / "lm")]) == 2
    assert "their numbers do not compare" in capsys.readouterr().err
    assert main(["compare", str(first), str(tmp_path)]) == 2
    assert main(["compare", str(first)]) == 2


def test_an_average_without_an_interval_says_why(
    model_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": f"{TEXT} Question?", "answers": ["e"]}
    write_jsonl(tmp_path / "data/qasper.jsonl", [row])
    write_jsonl(tmp_path / "data/hotpotqa.jsonl", [row, row])
    for name in "ab":
        run(model_dir, tmp_path / "data", tmp_path / name, tasks="qasper,hotpotqa")
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    note = "No interval for the average of longbench: of a single sample (QR) there is none."
    assert note in capsys.readouterr().out.splitlines()
