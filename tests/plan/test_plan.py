"""The command: what it says of configurations, data, work and disk."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from reference.toy import InSegments, documents_of, draws_for, tiny_config

from refine_verl.command.keys import make_settings, take_keys
from refine_verl.compose.composition import compose_config
from refine_verl.compose.recipes import find_configs
from refine_verl.compose.validate import validate
from refine_verl.config import ConfigError, NSPSettings
from refine_verl.config.data import UNCUT, longest_possible
from refine_verl.data import DataError
from refine_verl.data.readers import COMPRESSIONS
from refine_verl.models import Branches, load_model, make_actor, snapshot_count
from refine_verl.plan import estimate, reading
from refine_verl.plan.__main__ import main
from refine_verl.plan.estimate import Shape, forward_tokens
from refine_verl.plan.memory import MemoryEstimate
from refine_verl.plan.options import PlanSettings, measured_throughput
from refine_verl.plan.origins import find_origins
from refine_verl.record.format import size_text

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

RUN = (
    "recipe=midtrain",
    "model=tiny_deltanet",
    "model.tokenizer=bytes",
    "model.config.vocab_size=257",
    "model.config.hidden_size=32",
    "model.config.num_hidden_layers=1",
    "data.train_files=docs.jsonl",
    "data.max_length=64",
    "data.train_batch_size=4",
    "refine.ppo_mini_batch_size=2",
    "trainer.n_gpus_per_node=1",
    "trainer.device=cpu",
)

READ_AHEAD = 0.15
"""Arrow is ahead by a chunk of 64 KiB, in a test that looks at 1 MiB instead of 8."""


def write_documents(lengths: list[int]) -> None:
    lines = [json.dumps({"text": "a" * length}) for length in lengths]
    Path("docs.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate of memory has tests of its own, and takes seconds."""
    from refine_verl.plan import memory

    phases = {"update": {"parameters": 4 * GIB, "activations": 6 * GIB}, "optimiser": {"parameters": 4 * GIB}}
    found = MemoryEstimate(parameters=GIB, trained=GIB, state_bytes=1, phases=phases)
    monkeypatch.setattr(memory, "estimate_memory", lambda *_: found)


def plan_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*RUN, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_reading_and_work(no_memory: None, capsys: pytest.CaptureFixture[str]) -> None:
    write_documents([10, 64, 64, 64, 64, 100, 30, 64, 64])
    plan = plan_of(capsys, "throughput=1000", "refine.nsp.chunks=2", "refine.nsp.rollout_length=3")
    # 100 is cut into 64 and 36
    assert plan["train"]["documents"] == 9 and plan["train"]["sequences"] == 10 and plan["train"]["too_short"] == 0
    tokens = 10 + 6 * 64 + 100 + 30
    assert plan["train"]["tokens"] == tokens and plan["validation"] is None
    work = plan["work"]
    assert work["steps"] == 100 and work["epochs"] == 50 and work["optimiser_steps_per_step"] == 2
    assert work["tokens_per_step"] == pytest.approx(4 * tokens / 10)
    assert plan["seconds_per_step"] == pytest.approx(4 * tokens / 10 / 1000)
    assert any("left out in every epoch" in text and "2 of them" in text for text in plan["warnings"])
    assert not Path("outputs").exists()


def test_pieces_are_passes(no_memory: None, capsys: pytest.CaptureFixture[str]) -> None:
    """16 rollouts of each of four documents: at once, and in pieces of one position."""
    write_documents([64] * 8)
    rollouts = [f"refine.nsp.{key}" for key in ("chunks=4", "rollouts_per_position=4", "rollout_length=3")]
    at_once, pieces = (
        plan_of(capsys, *rollouts, f"refine.nsp.rollouts_together={together}")["work"]["passes"] for together in (64, 5)
    )
    assert at_once == {"read": 4, "write": 3, "update": 4 * (1 + 1)}
    assert pieces == {"read": 4, "write": 4 * 4 * 3, "update": 4 * (1 + 4)}


def test_forks_that_do_not_fit_have_a_cure(
    no_memory: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from refine_verl.plan import memory

    write_documents([64] * 8)
    for state, shared, said in ((GIB // 8, 0, True), (GIB // 8, GIB // 8, False), (1, 0, False)):
        phases = {"update": {"states": 10 * GIB}}
        found = MemoryEstimate(parameters=GIB, trained=GIB, state_bytes=state, shared_bytes=shared, phases=phases)
        monkeypatch.setattr(memory, "estimate_memory", lambda *_, found=found: found)
        warnings = "\n".join(plan_of(capsys, "memory=8", "refine.nsp.rollouts_per_position=2")["warnings"])
        assert ("lower refine.nsp.rollouts_together (64), or" in warnings) is said


def test_states_are_counted_by_the_limit(no_memory: None, capsys: pytest.CaptureFixture[str]) -> None:
    """The worker's function, whatever the documents at hand have (`longest_possible`)."""
    write_documents([20] * 8)
    for limit, longest in ((64, 64), ("null", UNCUT)):
        shape = plan_of(capsys, f"data.max_length={limit}")["shape"]
        assert (shape["length"], shape["longest"]) == (20, longest)
    data = {"max_length": 5, "max_prompt_length": 7}
    assert longest_possible(data, "documents") == 5
    assert longest_possible(data, "prompts") == longest_possible(data, "ttt") == 7


def test_measured_gradients_are_planned(no_memory: None, capsys: pytest.CaptureFixture[str]) -> None:
    write_documents([64] * 8)
    keys = ("refine.gradient_snr_every=1", "refine.gradient_cosine=true")
    held = [plan_of(capsys, *keys[:count])["shape"]["gradients_held"] for count in range(3)]
    assert held == [0, 1, 2]


def test_tables(no_memory: None, capsys: pytest.CaptureFixture[str]) -> None:
    write_documents([64] * 8)
    assert main(list(RUN)) == 0
    shown = capsys.readouterr().out
    for text in ("command line", "recipe midtrain", "preset tiny_deltanet", "10.000", "give throughput="):
        assert text in shown


def write_lines(path: Path, lines: list[str]) -> None:
    with pa.output_stream(str(path), compression=COMPRESSIONS.get(path.suffix)) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())


def write_rows(path: Path, text: str, rows: int) -> None:
    """Equal documents with a column of metadata; json escapes what is not ASCII."""
    table = [{"meta": {"id": f"{row:06}"}, "text": text} for row in range(rows)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(table), path)
    else:
        write_lines(path, [json.dumps(row) for row in table])


@pytest.mark.parametrize("name", ["docs.jsonl", "docs.jsonl.zst", "docs.jsonl.gz", "docs.parquet"])
def test_a_sample_is_reckoned_up(name: str, no_memory: None, capsys: pytest.CaptureFixture[str]) -> None:
    text = "\u5b66\u4e60" * 10
    write_rows(Path(name), text, 200)
    file = f"data.train_files={name}"
    whole, part = plan_of(capsys, file), plan_of(capsys, file, "sample=20")
    assert part["train"]["estimated"] and not whole["train"]["estimated"]
    assert whole["train"]["documents"] == 200 and whole["train"]["longest"] == len(text.encode())
    for count in ("documents", "tokens", "sequences", "longest"):
        assert part["train"][count] == whole["train"][count], count  # all documents are equal: nothing is left to err


def test_a_sample_of_three(no_memory: None, capsys: pytest.CaptureFixture[str]) -> None:
    write_documents([64] * 64)
    assert plan_of(capsys, "sample=3")["train"]["documents"] == 64


def test_a_text_file_is_one_document(no_memory: None, capsys: pytest.CaptureFixture[str]) -> None:
    # longer than its text by the mark of the byte order
    Path("book.txt").write_bytes(b"\xef\xbb\xbf" + b"a" * 40)
    assert plan_of(capsys, "data.train_files=book.txt", "sample=1")["train"]["tokens"] == 40


def test_a_large_compressed_file_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, draws = tmp_path / "docs.jsonl.zst", random.Random(0)
    write_lines(path, [json.dumps({"text": draws.randbytes(1000).hex()}) for _ in range(1000)])
    path.write_bytes(path.read_bytes() * 4 + b"no zstd")
    monkeypatch.setattr(reading, "_RATIO_FROM", 1 << 20)
    assert reading._lines_more(path, 10, "zstd") == pytest.approx(400, rel=READ_AHEAD)
    monkeypatch.setattr(reading, "_RATIO_FROM", 1 << 30)
    with pytest.raises(DataError, match="docs.jsonl.zst is not a readable zstd-compressed file"):
        reading._lines_more(path, 10, "zstd")


def test_warnings_of_resources(
    no_memory: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_documents([64] * 8)
    usage = type("Usage", (), {"free": GIB})
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _: usage)
    plan = plan_of(capsys, "memory=8", "+model.config.max_position_embeddings=32", "refine.nsp.chunks=2")
    text = "\n".join(plan["warnings"])
    assert "10.0 GiB are needed at the peak (update), and a worker has 8.0 GiB" in text
    assert "trainer.max_actor_ckpt_to_keep" in text and "max_position_embeddings" in text
    # 1 Gi parameters, 12 bytes each, at steps 25, 50, 75, 100; and the model
    assert plan["disk"]["needed"] == (4 * 12 + 4) * GIB
    assert "4 checkpoints of 12.00 GiB, one more while it is written, and the final model need 52.0 GiB, and " in text
    kept = plan_of(capsys, "trainer.max_actor_ckpt_to_keep=1", "memory=80")
    # the new one is there before the old one goes
    assert kept["disk"]["checkpoints_kept"] == 1 and kept["disk"]["needed"] == 2 * 12 * GIB
    assert "are needed at the peak" not in "\n".join(kept["warnings"])


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from refine_verl.plan import memory

    found = MemoryEstimate(
        parameters=KIB, trained=KIB, state_bytes=2 * KIB, phases={"update": {"states": KIB, "rest": 3 * MIB}}
    )
    monkeypatch.setattr(memory, "estimate_memory", lambda *_: found)
    monkeypatch.setattr(estimate, "memory_here", lambda *_: 2 * MIB)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 40 * KIB}))


def test_little_is_not_said_in_gigabytes(little_memory: None, capsys: pytest.CaptureFixture[str]) -> None:
    write_documents([64] * 8)
    assert main(list(RUN)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        "Peak memory per process, MiB: 1,024 parameters",
        "a state of 2.0 KiB",
        "states 0.001",
        "sum 3.001",
        "3.0 MiB are needed at the peak (update), and a worker has 2.0 MiB",
        "checkpoints kept 4 of 12.000 KiB",
        "free 40.000 KiB at",
        "4 checkpoints of 12.00 KiB, one more while it is written, and the final model need 52.0 KiB",
    ):
        assert text in shown
    assert "GiB" not in shown


def test_sizes() -> None:
    sizes = {0: "0 bytes", 1023: "1,023 bytes", KIB: "1.0 KiB", 3 * MIB // 2: "1.5 MiB", 2000 * 1024 * GIB: "2.0 PiB"}
    assert {size: size_text(size) for size in sizes} == sizes


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["data.max_lenght=3"], "data.max_length"),
        (["throughput=fast"], "throughput"),
        (["throughput=1", "measured=x.json"], "measured="),
        (["measured=nothing.json"], "nothing.json"),
        (["refine.ppo_mini_batch_size=3"], "does not divide"),
        (["-m"], "one run"),
        (["--jsno"], "unknown option --jsno. Did you mean '--json'? See --help."),
        (["--al"], "unknown option --al. Did you mean '--all'? See --help."),
        (["--cfg", "jobb"], "'all'). See --help."),
        (["thrughput=100"], "thrughput: unknown key. Did you mean 'throughput'?"),
        (["memry=8"], "memry: unknown key. Did you mean 'memory'?"),
        (["mesured=x.json"], "mesured: unknown key. Did you mean 'measured'?"),
        (["datta=x"], "datta: unknown key. Did you mean 'data'?"),
        (["refine.nsp.chunks=2,4"], "refine.nsp.chunks: a plan takes one value at a time, got 2,4. Write refine"),
        (["refine.nsp.chunks=range(1,4)"], "refine.nsp.chunks: a plan takes one value at a time, got range(1,4)."),
    ],
)
def test_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_documents([64] * 8)
    assert main([*RUN, *arguments]) == 2
    said = capsys.readouterr().err
    assert says in said and "add -m" not in said and "--hydra-help" not in said


def test_neither_ray_nor_a_gpu_is_touched() -> None:
    write_documents([64] * 8)
    script = (
        "import sys; from refine_verl.plan import memory, __main__ as plan\n"
        "found = memory.MemoryEstimate(parameters=1, trained=1, state_bytes=1, phases={'a': {'b': 1}})\n"
        "memory.estimate_memory = lambda *_: found\n"
        "code = plan.main(sys.argv[1:])\n"
        "import ray; assert not ray.is_initialized(); sys.exit(code)"
    )
    command = [sys.executable, "-c", script, *RUN, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["work"]["steps"] == 100


# Where values come from


def origins_of(*overrides: str) -> dict[str, Any]:
    composed = compose_config(overrides)
    files = find_configs()
    valid = validate(composed, files)
    return {item.key: item for item in find_origins(composed, valid.config, files, overrides)}


def test_origins() -> None:
    variables = "+ray_kwargs.ray_init.runtime_env.env_vars"
    found = origins_of(*RUN, f"{variables}.WANDB_API_KEY=abc123", f"{variables}.openai_key=abc123")
    wanted = {
        "data.max_length": (64, "command line"),
        "refine.nsp.chunks": (8, "recipe midtrain"),
        "model.config.conv_size": (4, "preset tiny_deltanet"),
        "refine.nsp.anchor": ("prediction", "default"),
        "data.min_length": (13, "computed"),
    }
    for key, (value, source) in wanted.items():
        assert (found[key].value, found[key].source) == (value, source), key
    follower = found["actor_rollout_ref.actor.ppo_mini_batch_size"]
    assert follower.value == 2 and "refine.ppo_mini_batch_size" in follower.follows
    assert "abc123" not in str(found)


def test_the_last_recipe_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("refine:\n  nsp:\n    chunks: 4\n")
    monkeypatch.setenv("REFINE_RECIPES_PATH", str(tmp_path))
    found = origins_of("recipe=[midtrain,mine]", *RUN[1:])
    assert (found["refine.nsp.chunks"].value, found["refine.nsp.chunks"].source) == (4, "recipe mine")
    assert found["refine.nsp.rollout_length"].source == "recipe midtrain"


# Other phases

PROMPTS = ("model=tiny_deltanet", "model.tokenizer=bytes", "model.config.vocab_size=257", *RUN[4:6], *RUN[-2:])


def plan_of_prompts(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    rows = [json.dumps({"prompt": "p" * 60, "answer": "a" * 4}) for _ in range(8)]
    Path("prompts.jsonl").write_text("\n".join(rows) + "\n")
    capsys.readouterr()
    assert main([*PROMPTS, "--json", "data.task=qasper", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_prompts_without_rollouts_have_none_in_the_plan(no_memory: None, capsys: pytest.CaptureFixture[str]) -> None:
    sft = plan_of_prompts(capsys, "recipe=ttt_sft", "data.val_files=prompts.jsonl")
    assert set(sft["work"]["passes"]) == {"update"} and sft["shape"]["with_rollouts"] is False
    files = ("data.train_files=prompts.jsonl", "data.train_batch_size=4", "refine.ppo_mini_batch_size=4")
    none = plan_of_prompts(capsys, "recipe=posttrain_sft", *files)["work"]
    assert none["optimiser_steps_per_step"] == 0 and none["passes"] == {"update": 0}


def test_passes_at_test_time(no_memory: None, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("recipe=ttt", "data.val_files=prompts.jsonl")
    once = plan_of_prompts(capsys, *files)["work"]
    assert (once["steps"], once["optimiser_steps_per_step"]) == (1, 2)
    assert plan_of_prompts(capsys, *files, "refine.ttt.steps=3")["work"]["optimiser_steps_per_step"] == 6
    alone = plan_of_prompts(capsys, *files, "refine.ttt.reset=sample")["work"]
    assert (alone["steps"], alone["optimiser_steps_per_step"]) == (8, 1)
    few = plan_of_prompts(capsys, *files, "refine.ttt.reset=sample", "data.val_max_samples=3")["work"]
    assert few["steps"] == 3


def test_the_disk_at_test_time(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With resets nothing is written at the end; an adapter is kept of every batch, or row."""
    from refine_verl.plan import memory
    from refine_verl.preflight import run as preflight

    found = MemoryEstimate(
        parameters=GIB, trained=MIB, adapters=MIB, state_bytes=1, phases={"update": {"parameters": GIB}}
    )
    monkeypatch.setattr(memory, "estimate_memory", lambda *_: found)
    monkeypatch.setattr(preflight, "check_adapters", lambda *_: None)  # needs a model with weights
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 30 * MIB}))
    files = ("recipe=ttt", "data.val_files=prompts.jsonl", "memory=80")
    plan = plan_of_prompts(capsys, *files)
    assert (plan["disk"]["needed"], plan["disk"]["final_model"], plan["disk"]["adapters_kept"]) == (0, 0, 0)
    assert "another disk" not in str(plan["warnings"])
    assert plan_of_prompts(capsys, *files, "refine.ttt.reset=none")["disk"]["final_model"] == 4 * GIB
    lora = (*files, "actor_rollout_ref.model.lora_rank=4")
    last = plan_of_prompts(capsys, *lora, "refine.ttt.reset=none")["disk"]
    assert last["final_model"] == last["needed"] == 4 * MIB
    keep = (*lora, "refine.ttt.keep=kept")
    batches = plan_of_prompts(capsys, *keep, "data.train_batch_size=4", "refine.ppo_mini_batch_size=4")
    assert batches["disk"]["needed"] == 2 * 4 * MIB and "another disk" not in str(batches["warnings"])
    rows = plan_of_prompts(capsys, *keep, "refine.ttt.reset=sample")
    assert rows["disk"]["needed"] == 8 * 4 * MIB and rows["disk"]["adapters_kept"] == 8
    said = "\n".join(rows["warnings"])
    assert "8 adapters of 4.00 MiB (refine.ttt.keep) need 32.0 MiB, and " in said
    assert "has 30.0 MiB: set refine.ttt.keep to another disk." in said and "checkpoint" not in said
    Path("kept").mkdir()
    monkeypatch.setattr(estimate, "same_file_system", lambda *_: False)
    rows = plan_of_prompts(capsys, *keep, "refine.ttt.reset=sample")
    assert rows["disk"]["needed"] == 0 and rows["disk"]["adapters_place"] == str(Path("kept").absolute())
    assert any("need 32.0 MiB, and " in said and "kept has 30.0 MiB" in said for said in rows["warnings"])


@pytest.mark.parametrize(("longest", "segments"), [(16, 16), (64, 24)])
def test_reading_passes_are_no_more_than_tokens(
    longest: int, segments: int, no_memory: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an adapter that has no trace; with one a document is read once, on a GPU too."""
    write_documents([16] * 8)
    device = ("trainer.device=cuda", "refine.nsp.chunks=3", "data.min_length=8", f"data.max_length={longest}")
    assert plan_of(capsys, *device, "memory=80")["work"]["passes"]["read"] == 4
    monkeypatch.setattr("refine_verl.plan.memory.adapter_for", lambda _: InSegments())
    assert plan_of(capsys, *device, "memory=80")["work"]["passes"]["read"] == 4 * (segments + 1)


# Numbers


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("together", [64, 4], ids=["at once", "in pieces"])
@pytest.mark.parametrize(
    ("checkpointing", "reading"),
    [("none", "whole"), ("layer", "whole"), ("segment", "whole"), ("none", "segments"), ("layer", "segments")],
)
def test_tokens_are_those_the_actor_counts(checkpointing: str, reading: str, together: int, on_policy: bool) -> None:
    nsp = NSPSettings(chunks=3, rollout_length=4, rollouts_per_position=2, rollouts_together=together)
    length = 48
    if (checkpointing, reading, on_policy) == ("none", "segments", True):
        pytest.skip("refused: documents are read in the pass that is trained")
    model = load_model(None, config=tiny_config("delta_net"))
    actor = make_actor(model, activation_checkpointing=checkpointing, reading=reading)
    documents = documents_of([length])
    draws, snapshots = draws_for([0], nsp), snapshot_count(nsp.chunks, length)
    if on_policy:
        _, output = actor(mode="on_policy", documents=documents, nsp=nsp, draws=draws, snapshots=snapshots)
    else:
        rollouts = actor(mode="rollout", documents=documents, nsp=nsp, draws=draws, snapshots=snapshots)
        branches = Branches(rollouts.positions, rollouts.tokens)
        output = actor(mode="update", documents=documents, branches=branches, nsp=nsp)
    (output["ntp_loss_sum"] + output["log_probs"].sum()).backward()
    shape = Shape(length=length, nsp=nsp, activation_checkpointing=checkpointing, on_policy=on_policy, reading=reading)
    counted, planned = actor.forward_tokens / length, forward_tokens(shape, length, traced=True)
    untraced = forward_tokens(shape, length, traced=False)
    assert planned is not None and untraced is not None
    if reading == "segments":
        assert untraced == planned and planned - 1 / 8 <= counted <= planned
    else:
        assert planned == pytest.approx(counted) and untraced > counted
    assert torch.isfinite(output["log_probs"]).all()


def test_measurements(tmp_path: Path) -> None:
    benchmark = tmp_path / "cost.json"
    seconds = {"sft": [1.0], "fork": [2.0, 4.0, 3.0]}
    benchmark.write_text(json.dumps({"settings": {"length": 100, "documents": 6}, "seconds": seconds}))
    assert measured_throughput(str(benchmark), 4, rollouts=True)[0] == 800
    assert measured_throughput(str(benchmark), 1, rollouts=False)[0] == 600
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f'{{"step": {i}, "perf/tokens_per_second": {i * 10}}}\n' for i in (1, 2, 3)))
    assert measured_throughput(str(metrics), 4, rollouts=True)[0] == 20
    benchmark.write_text("{}")
    with pytest.raises(ConfigError, match="neither"):
        measured_throughput(str(benchmark), 1, rollouts=True)


def test_options() -> None:
    words = ["a=1", "throughput=5", "--memory", "2", "--json", "sample=3", "+b.c=2", "--config-dir", "x"]
    given, rest = take_keys(words, PlanSettings)
    settings = make_settings(PlanSettings, given)
    assert (settings.throughput, settings.memory, settings.sample, settings.json) == (5, 2, 3, True)
    assert rest == ["a=1", "+b.c=2", "--config-dir", "x"] and settings.measured is None
    with pytest.raises(ConfigError, match="memory: must be greater than 0"):
        make_settings(PlanSettings, {"memory": "-1"})
    with pytest.raises(ConfigError, match="sample: must be an integer or null, got '1.4'"):
        make_settings(PlanSettings, {"sample": "1.4"})
