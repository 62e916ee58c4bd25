"""Needles: made by the harness's generator with the harness's own arguments, once, and frozen."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from reference.evaluate_files import TEXT, write_jsonl

pytest.importorskip("lm_eval")
nltk = pytest.importorskip("nltk")

from refine_verl.config.refusals import DataError  # noqa: E402
from refine_verl.data.tokenizers import load_tokenizer  # noqa: E402
from refine_verl.evaluate import needles  # noqa: E402
from refine_verl.evaluate.__main__ import main  # noqa: E402
from refine_verl.evaluate.settings import EvaluateSettings  # noqa: E402

# Tokens are bytes here: a needle, the question and 128 tokens of answer take 500 of them.
LENGTH = 768


def settings_for(folder: Path, **values: Any) -> EvaluateSettings:
    given = {"model": "m", "out": "o", "tasks": ["ruler_niah"], "lengths": [LENGTH], "niah_samples": 3}
    return EvaluateSettings(**{**given, "data_dir": str(folder), **values})


def splitter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence splitter in the place and format of NLTK's own, which cannot be downloaded here."""
    target = folder / "nltk_data/tokenizers/punkt_tab/english"
    target.mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(folder / "nltk_data"), *nltk.data.path])  # it writes nowhere else
    trainer = nltk.tokenize.punkt.PunktTrainer(TEXT * 20)
    nltk.tokenize.punkt.save_punkt_params(trainer.get_params(), dir=str(target))


def test_the_arguments_are_the_harnesss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with needles._generator(settings_for(tmp_path)):
        from lm_eval.tasks.ruler import niah_utils
    seen: dict[str, Any] = {}

    def capture(haystack: Any, **given: Any) -> list[Any]:
        seen.update(given)
        return []

    monkeypatch.setattr(niah_utils, "generate_samples", capture)
    monkeypatch.setattr(niah_utils, "get_haystack", lambda type_haystack: type_haystack)
    monkeypatch.setattr(niah_utils, "get_tokenizer", lambda name: None)
    monkeypatch.setattr(niah_utils, "download_dataset", list)
    for task, kind in needles.KINDS.items():
        seen.clear()
        getattr(niah_utils, task)(tokenizer="x")
        assert seen.pop("template") == niah_utils.TEMPLATE
        assert [seen.pop(name) for name in ("max_seq_length", "num_samples", "TOKENIZER")] == [4096, 500, None]
        assert seen == kind, task


def test_frozen_once(tmp_path: Path) -> None:
    settings, tokenizer = settings_for(tmp_path), load_tokenizer("bytes")
    state = random.getstate()
    path = needles.frozen_needles(settings, "niah_single_1", LENGTH, tokenizer)
    assert random.getstate() == state
    first = path.read_bytes()
    random.random()
    path.unlink()
    assert needles.frozen_needles(settings, "niah_single_1", LENGTH, tokenizer).read_bytes() == first
    other = needles.frozen_needles(settings_for(tmp_path, seed=1), "niah_single_1", LENGTH, tokenizer)
    assert other != path and other.read_bytes() != first
    rows = pq.read_table(path).to_pylist()
    assert len(rows) == 3
    for row in rows:
        assert row["prompt"].endswith("mentioned in the provided text is") and row["answer"][0] in row["prompt"]
        assert len(row["prompt"]) + 128 <= LENGTH + 80  # the prefix of the answer is not counted by the harness
    path.write_bytes(first[:-1] + b"x")
    with pytest.raises(DataError, match="its sha256 differs"):
        needles.missing_files(settings, ["niah_single_1"], tokenizer)


def test_what_essays_need_is_named(tmp_path: Path) -> None:
    settings, tokenizer = settings_for(tmp_path), load_tokenizer("bytes")
    essays, splitter = needles.missing_files(settings, ["niah_single_1", "niah_multivalue"], tokenizer)
    assert re.search(r"niah_multivalue hide .* no .*paul_graham_essays.parquet .*to_parquet", essays)
    write_jsonl(tmp_path / "ruler_niah/paul_graham_essays.jsonl", [{"text": TEXT * 40}])
    assert needles.missing_files(settings, ["niah_multivalue"], tokenizer) == [splitter]
    assert re.search(r"nltk_data/tokenizers/punkt_tab.*nltk.download\('punkt_tab'", splitter)
    assert needles.missing_files(settings, ["niah_single_1"], tokenizer) == []
    assert not list((tmp_path / "ruler_niah").glob("*.parquet"))


def test_without_a_data_directory_needles_lie_in_the_cache(
    tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needles, "default_cache_dir", lambda: tmp_path / "cache")
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.ruler.prepare_niah", raising=False)  # it prints when imported
    command = [f"model={model_dir}", "tasks=niah_single_1", f"lengths=[{LENGTH}]", "niah_samples=2"]
    assert main([*command, f"out={tmp_path}/out"]) == 0
    assert len(list((tmp_path / "cache/ruler_niah").glob("niah_single_1_*.parquet"))) == 1
    assert "Downloaded" not in capsys.readouterr().out  # nothing was


@pytest.mark.slow
def test_all_four_kinds(
    tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    splitter(tmp_path, monkeypatch)
    monkeypatch.undo()
    write_jsonl(tmp_path / "ruler_niah/paul_graham_essays.jsonl", [{"text": TEXT * 40}])
    # The harness starts with 500 words of an essay and takes 500 less where they are too many.
    command = [f"model={model_dir}", "tasks=ruler_niah", f"data_dir={tmp_path}", "lengths=[4096]", "niah_samples=2"]
    assert main([*command, f"out={tmp_path}/out", "limit=1"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("S-NIAH 4K", "MK-NIAH 4K", "MQ-NIAH 4K", "MV-NIAH 4K"))
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert [row["metric"] for row in results] == ["string_match_all"] * 4
    record = json.loads((tmp_path / "out/samples/niah_multivalue_4096.jsonl").read_text())
    assert len(record["references"]) == 4
    made = sorted((tmp_path / "ruler_niah").glob("*.parquet*"))
    assert len(made) == 8
