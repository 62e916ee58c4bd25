"""`engine=vllm` without vLLM: an engine that answers with this package's own passes stands in for it."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from reference.evaluate_files import TEXT, write_jsonl, write_parquet
from reference.on_vllm import write_lora
from reference.served import StandIn, stand_in
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from refine_verl.config import ConfigError, DataError, ModelError
from refine_verl.evaluate import run as evaluate_run
from refine_verl.evaluate.__main__ import main
from refine_verl.evaluate.model import find_model, load_evaluated
from refine_verl.evaluate.served import ServedModel, require_served_adapter
from refine_verl.models.lora import open_adapter

LENGTH = 128
CONTEXT = TEXT * 4


@pytest.fixture(autouse=True)
def vllm_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"{CONTEXT} {n}?", "answer": ["e", "zz"], "task": "ruler_squadqa"} for n in (5, 11, 2)]
    rows.append({"prompt": f"{TEXT} 7?", "answer": ["e"], "task": "ruler_squadqa"})
    write_parquet(folder / f"ruler/ruler_squadqa_delta_net_{LENGTH}_4_test.parquet", rows)
    write_jsonl(folder / "ntp/documents.jsonl", [{"text": TEXT[n:] + TEXT} for n in (0, 3, 9)])
    write_parquet(folder / "short_context/wikitext/test.parquet", [{"page": TEXT * 2}, {"page": TEXT[:30]}])
    return folder


def command(model: Path, data: Path, out: Path, *more: str, tasks: str = "ruler_squadqa,ntp") -> list[str]:
    keys = [f"model={model}", f"tasks={tasks}", f"data_dir={data}", f"out={out}", "batch_size=2"]
    return [*keys, *([f"lengths={LENGTH}"] if "ntp" in tasks or "ruler" in tasks else []), *more]


def files(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(out.glob("samples/*.jsonl")):
        found[path.stem] = [json.loads(line) for line in path.read_text().splitlines()]
    return found


def test_the_same_files_and_scores(model_dir: Path, data: Path, tmp_path: Path) -> None:
    for engine in ("own", "vllm"):
        assert main(command(model_dir, data, tmp_path / engine, f"engine={engine}")) == 0
    own, mine = files(tmp_path / "own"), files(tmp_path / "vllm")
    assert own.keys() == mine.keys() and len(own) == 2
    # in the order of the data, with the tokens that were read
    assert own[f"ruler_squadqa_{LENGTH}"] == mine[f"ruler_squadqa_{LENGTH}"]
    read = [record["read_tokens"] for record in mine[f"ruler_squadqa_{LENGTH}"]]
    assert read[0] > 300 and read[1:3] == [3, 2]
    results = [json.loads((tmp_path / engine / "results.json").read_text()) for engine in ("own", "vllm")]
    for one, other in zip(*(result.pop("results") for result in results), strict=True):
        assert other.pop("value") == pytest.approx(one.pop("value"), rel=1e-4)
        assert other.pop("stderr") == pytest.approx(one.pop("stderr"), rel=1e-3)
        assert one == other
    assert results[0] | {"engine": "vllm"} == results[1]  # the weights' sha256, too
    (settings,) = StandIn.started
    assert (settings.sequences, settings.keep_states, settings.tokens) == (2, True, len(f"{CONTEXT} 11?") + 32)


@pytest.fixture(scope="module")
def adapter(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(tmp_path_factory.mktemp("kept") / "a", model_dir, seed=5)


def test_an_adapter(model_dir: Path, adapter: Path, data: Path, tmp_path: Path) -> None:
    for engine in ("own", "vllm"):
        assert main(command(model_dir, data, tmp_path / engine, f"engine={engine}", f"adapter={adapter}")) == 0
    assert files(tmp_path / "own")[f"ruler_squadqa_{LENGTH}"] == files(tmp_path / "vllm")[f"ruler_squadqa_{LENGTH}"]
    results = [json.loads((tmp_path / engine / "results.json").read_text()) for engine in ("own", "vllm")]
    assert results[0]["model_sha256"] == results[1]["model_sha256"] and results[1]["adapter"] == str(adapter)
    (settings,) = StandIn.started
    assert (settings.adapter, settings.adapter_rank) == (str(adapter), 4)


def test_adapters_that_are_not_served(
    model_dir: Path,
    other_dir: Path,
    adapter: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(adapter, changed)
    values = json.loads((changed / "adapter_config.json").read_text())
    (changed / "adapter_config.json").write_text(json.dumps(values | {"alpha_pattern": {"q_proj": 3}}))
    for model, place, reason in (
        (other_dir, adapter, "it was trained on other weights"),
        (model_dir, changed, r"vLLM cannot serve this adapter: .*alpha_pattern.*export adapter=.* out=MERGED"),
    ):
        assert main(command(model, data, tmp_path / "o", "engine=vllm", f"adapter={place}")) == 2
        error = capsys.readouterr().err
        assert re.search(f"adapter={place}: {reason}", " ".join(error.split())), error
    with pytest.raises(ModelError, match="it is for a qwen3_next, and those of delta_net and gated_deltanet were"):
        require_served_adapter(open_adapter(adapter), "qwen3_next")
    assert not StandIn.started and not (tmp_path / "o").exists()


def test_an_engine_that_ends_and_the_rest(
    model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(model_dir, data, tmp_path / "o", "engine=vllm", tasks="ruler_squadqa")
    monkeypatch.setattr(StandIn, "ends_after", 2)
    assert main(arguments) == 1
    assert "vLLM's engine ended" in capsys.readouterr().err
    assert len(files(tmp_path / "o")[f"ruler_squadqa_{LENGTH}"]) == 2
    monkeypatch.setattr(StandIn, "ends_after", None)
    assert main(arguments) == 0
    assert len(StandIn.asked) == 4 and len({tuple(ids) for ids in StandIn.asked}) == 4
    starts = len(StandIn.started)
    assert main(arguments) == 0 and len(StandIn.started) == starts  # nothing is left to ask: no engine
    assert main(command(model_dir, data, tmp_path / "own", tasks="ruler_squadqa")) == 0
    wanted = files(tmp_path / "own")[f"ruler_squadqa_{LENGTH}"]
    got = files(tmp_path / "o")[f"ruler_squadqa_{LENGTH}"]
    assert [{**record, "read_tokens": 0} for record in got] == [{**record, "read_tokens": 0} for record in wanted]
    capsys.readouterr()
    assert main(command(model_dir, data, tmp_path / "o", tasks="ruler_squadqa")) == 2
    assert 'another engine (engine: "vllm" there, "own" now)' in capsys.readouterr().err


def test_results_from_before_there_was_a_choice_go_on(model_dir: Path, data: Path, tmp_path: Path) -> None:
    arguments = command(model_dir, data, tmp_path / "o", "limit=1", tasks="ruler_squadqa")
    assert main(arguments) == 0
    run = tmp_path / "o/run.json"
    run.write_text(json.dumps({key: value for key, value in json.loads(run.read_text()).items() if key != "engine"}))
    assert main(arguments) == 0
    assert main([*arguments, "engine=vllm"]) == 2


def test_longer_than_vllm_may_be_asked_for(
    model_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longest = len(f"{CONTEXT} 11?") + 32
    refused = command(model_dir, data, tmp_path / "o", "engine=vllm", f"max_model_len={longest - 1}")
    assert main(refused) == 2
    said = capsys.readouterr().err
    assert f"ruler_squadqa_{LENGTH}, sample" in said and f"needs {longest} tokens" in said
    assert not StandIn.started and not (tmp_path / "o").exists()
    assert main(command(model_dir, data, tmp_path / "o", "engine=vllm", f"max_model_len={longest}")) == 0
    assert main(command(model_dir, data, tmp_path / "w", "engine=vllm", "max_model_len=65", tasks="wikitext")) == 2
    assert "wikitext needs 66 tokens" in capsys.readouterr().err


def test_nothing_is_shared_where_that_is_asked(model_dir: Path, data: Path, tmp_path: Path) -> None:
    arguments = command(model_dir, data, tmp_path / "o", "engine=vllm", "share_contexts=false", tasks="ruler_squadqa")
    assert main(arguments) == 0
    assert [settings.keep_states for settings in StandIn.started] == [False]
    records = files(tmp_path / "o")[f"ruler_squadqa_{LENGTH}"]
    assert all(record["read_tokens"] == record["prompt_tokens"] for record in records)


def test_weights_that_are_no_numbers(
    model_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][0, 0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert main(command(model, data, tmp_path / "o", "engine=vllm")) == 2
    assert f"model={model}: lm_head.weight holds NaN or infinity" in capsys.readouterr().err
    assert not StandIn.started and not (tmp_path / "o").exists()


def test_stop_texts_and_temperature(model_dir: Path) -> None:
    prompts, own = [list(TEXT[:n].encode()) for n in (30, 41)], load_evaluated(find_model(str(model_dir)))
    with ServedModel(find_model(str(model_dir))) as model:
        model.require_room("all of it", 64)
        plain = own.write(prompts, [12, 12])
        assert model.write(prompts, [12, 12]) == plain
        stop = plain[0][3:5]
        assert model.write(prompts, [12, 12], stops=(stop,)) == own.write(prompts, [12, 12], stops=(stop,))
        assert model.write(prompts[:1], [12], stops=(stop,)) == [plain[0][: plain[0].index(stop)]]
        with pytest.raises(ConfigError, match="temperature: sampled answers"):
            model.write(prompts, [12, 12], temperature=1.0)
        with pytest.raises(DataError, match="a prompt needs 101 tokens.* max_model_len=64"):
            model.write([prompts[0] * 3], [11])
        assert model.stop_tokens == own.stop_tokens and model.stop_tokens


def test_not_installed(
    model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from refine_verl.serving import engine

    monkeypatch.setattr(evaluate_run, "require_vllm", engine.require_vllm)
    monkeypatch.setattr(engine, "installed_vllm", lambda: None)
    assert main(command(model_dir, data, tmp_path / "o", "engine=vllm")) == 2
    assert "engine: vLLM is not installed here. Install it into an environment" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_the_harness_is_asked_for_vllm_where_it_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    from refine_verl.evaluate import console
    from refine_verl.serving import engine

    monkeypatch.setattr(engine, "installed_vllm", lambda: ("vllm", "0.27.1"))
    monkeypatch.setattr("sys.argv", ["refine-lm-eval", "run", "--model", "vllm", "--model_args", "pretrained=x"])
    assert console.main() == 2
    assert "error: model: vllm 0.27.1 is installed, and 0.28.0 was tried." in capsys.readouterr().err


def test_arguments_of_the_harnesss_model(model_dir: Path, other_dir: Path, adapter: Path, tmp_path: Path) -> None:
    from refine_verl.evaluate.lm_vllm import _checked

    made: list[Any] = []

    def make(self: Any, pretrained: str, **arguments: Any) -> None:
        if "bad" in arguments:
            raise ValueError(
                "1 validation error for ModelConfig\n  Value error, no such thing. [type=value_error, x=1]"
            )
        made.append((pretrained, arguments))

    checked = _checked(make)
    checked(None, str(model_dir), ttt="none", dtype="bfloat16")
    assert made == [(str(model_dir), {"dtype": "bfloat16"})]
    with pytest.raises(ConfigError, match="ttt: vLLM serves weights as they are"):
        checked(None, str(model_dir), ttt="refine")
    with pytest.raises(ConfigError, match="pretrained: is missing"):
        checked(None)
    with pytest.raises(ModelError, match=rf"^pretrained={model_dir}: no such thing\.$"):
        checked(None, str(model_dir), bad=1)
    made.clear()
    checked(None, str(model_dir), adapter=str(adapter))
    checked(None, str(model_dir), lora_local_path=str(adapter), max_lora_rank=64)
    assert made == [(str(model_dir), {"lora_local_path": str(adapter), "max_lora_rank": room}) for room in (8, 64)]
    with pytest.raises(ConfigError, match="adapter: and lora_local_path are the same"):
        checked(None, str(model_dir), adapter=str(adapter), lora_local_path=str(adapter))
    with pytest.raises(DataError, match="adapter: .*nowhere is no directory"):
        checked(None, str(model_dir), adapter=str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=f"lora_local_path={adapter}: it was trained on other weights"):
        checked(None, str(other_dir), lora_local_path=str(adapter))


def test_room_of_the_harnesss_model(model_dir: Path, tmp_path: Path) -> None:
    """The configuration's max_position_embeddings is no limit of a model without positions; states are float32."""
    from refine_verl.evaluate.lm_vllm import _room

    assert _room(str(model_dir), {"max_model_len": 512}) == {"hf_overrides": {"max_position_embeddings": 512}}
    assert _room(str(model_dir), {"max_length": "512"}) == {"hf_overrides": {"max_position_embeddings": 512}}
    assert _room(str(model_dir), {}) == {}
    assert _room(str(tmp_path / "none"), {"max_model_len": 512}) == {}  # vLLM says that there is none
    AutoConfig.for_model("qwen3_next").save_pretrained(tmp_path)
    assert _room(str(tmp_path), {"max_model_len": 512}) == {"mamba_ssm_cache_dtype": "float32"}
    assert _room(str(tmp_path), {"mamba_ssm_cache_dtype": "bfloat16"}) == {}


def test_from_where_on_vllm_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    answers = importlib.import_module("benchmarks.answers")
    size, other = answers.Size(8, 10), answers.Size(16, 10)

    def timed(batch: int, own: float, vllm: float, at: Any = size) -> Any:
        return answers.Timed(batch, at, [9.0, own, own], [vllm, 9.0, vllm], 1.0)

    rows = [timed(1, 1.0, 0.5), timed(4, 1.0, 2.0), timed(8, 4.0, 2.0), timed(16, 4.0, 1.0), timed(1, 1.0, 2.0, other)]
    assert answers.pays_from(rows, size) == 8  # it is slower at 4, so the 1 does not count
    assert answers.pays_from(rows, other) is None
    assert [row.ratio for row in rows] == [2.0, 0.5, 2.0, 4.0, 0.5]
    # 80 tokens in 4 s and in 2 s: each saves 1/40 s
    assert answers.tokens_until_start_is_paid(rows[2], 10.0) == pytest.approx(400)
    assert answers.tokens_until_start_is_paid(rows[1], 10.0) is None
