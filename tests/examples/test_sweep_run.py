"""A sweep for real: two trainings by Hydra's multirun, their page, their models' scores and the difference."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
from reference.processes import forking_python
from reference.runs import TIMEOUT, read_steps, write_corpus
from transformers import AutoConfig

from refine_verl.data.tokenizers import load_tokenizer
from refine_verl.models import load_model

pytestmark = [pytest.mark.slow, pytest.mark.dist, pytest.mark.runs]

SWEEPS = Path(__file__).parents[2] / "examples" / "sweeps"
SMALL = (
    "data.max_length=64",
    "data.train_batch_size=8",
    "refine.ppo_mini_batch_size=4",
    "refine.nsp.rollout_length=3",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.actor.optim.lr=1e-3",
    "trainer.n_gpus_per_node=1",
    "trainer.total_training_steps=2",
    "trainer.logger=[]",
)


def test_two_runs_are_trained_shown_scored_and_compared(tmp_path: Path) -> None:
    model, evaluation = tmp_path / "model", tmp_path / "evaluation"
    config = AutoConfig.for_model(
        "delta_net", vocab_size=257, hidden_size=32, num_hidden_layers=1, num_heads=2, fuse_cross_entropy=False
    )
    load_model(None, config=config).save_pretrained(model)
    load_tokenizer("bytes", out_dir=model)
    train, validation = write_corpus(tmp_path)
    (evaluation / "ntp").mkdir(parents=True)
    (evaluation / "ntp" / "alphabet.jsonl").write_text(validation.read_text())
    script = tmp_path / "sweep.sh"
    script.write_text((SWEEPS / "figure5_chunks.sh").read_text().replace("8,2,4", "2,4"))
    (tmp_path / "compare.sh").write_text((SWEEPS / "compare.sh").read_text())
    (tmp_path / "compare.sh").chmod(0o755)
    arguments = ["bash", str(script), *SMALL, f"data.cache_dir={tmp_path / 'cache'}"]
    with tempfile.TemporaryDirectory(prefix="rv") as scratch, forking_python(Path(scratch)) as python:
        variables = {"MODEL": model, "DATA": train, "EVAL": evaluation, "PYTHON": python}
        environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        environment |= {"TASKS": "ntp", "LENGTHS": "32"}
        output = _run(arguments, environment, tmp_path)

    runs = [tmp_path / "outputs/refine_verl" / f"midtrain_refine.nsp.chunks={chunks}" for chunks in (2, 4)]
    assert sorted(path.name for path in runs[0].parent.iterdir()) == [run.name for run in runs]
    passes = []
    for run in runs:
        steps = read_steps(run)
        passes.append(steps[max(steps)]["perf/forward_tokens_per_token"])
        results = json.loads((run / "evaluation_ttt_none" / "results.json").read_text())
        assert "ntp" in json.dumps(results)
    assert passes[1] > passes[0]  # four positions per document cost more than two
    page = (tmp_path / "comparison.html").read_text()
    assert all(run.name in page for run in runs)
    assert "bootstrap" in output and all(str(run.name) in output.replace("\n", "") for run in runs)


def _run(arguments: list[str], environment: dict[str, str], directory: Path) -> str:
    """In a process group of its own, which ends with the test."""
    process = subprocess.Popen(
        arguments,
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=2 * TIMEOUT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    assert process.returncode == 0, output[-3000:]
    return output
