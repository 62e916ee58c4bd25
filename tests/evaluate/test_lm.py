"""Our model class in lm-evaluation-harness against the harness's own, on the same weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.evaluate_files import TEXT, write_jsonl

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from refine_verl.adaptation import PromptError  # noqa: E402
from refine_verl.config import ConfigError  # noqa: E402
from refine_verl.evaluate.lm import RefineLM  # noqa: E402

# float32 sums of up to 100 log-probabilities, in another order
TOLERANCE = 2e-4
NSP = {"nsp": {"chunks": 2, "rollout_length": 2}, "lr": 1e-2}


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]


PAIRS = [(TEXT[:length], TEXT[length : length + more]) for length, more in ((0, 3), (9, 1), (30, 8), (50, 13), (9, 4))]
PROMPTS = [TEXT[:3], TEXT[:25], TEXT[:40], TEXT[5:14]]


@pytest.fixture(scope="module")
def ours(model_dir: Path) -> RefineLM:
    return RefineLM(str(model_dir), batch_size=3, max_length=64)


@pytest.fixture(scope="module")
def theirs(model_dir: Path, ours: RefineLM) -> HFLM:
    return HFLM(pretrained=str(model_dir), batch_size=1, device="cpu", dtype="float32", max_length=64)


def test_log_likelihoods(ours: RefineLM, theirs: HFLM) -> None:
    wanted = theirs.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    got = ours.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert [value for value, _ in got] == pytest.approx([value for value, _ in wanted], rel=TOLERANCE)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in wanted]
    assert abs(got[1][0] - got[4][0]) > 0.1  # the comparison can fail


def test_greedy_continuations_are_recognised(ours: RefineLM, theirs: HFLM) -> None:
    ids = ours.evaluated._write([ours.tok_encode(PROMPTS[1])], [1], (), 0.0, None)[0]
    pair = (([PROMPTS[1], ""]), ours.tok_encode(PROMPTS[1]), ids)
    other = (([PROMPTS[1], ""]), ours.tok_encode(PROMPTS[1]), [(ids[0] + 1) % 256])
    for backend in (ours, theirs):
        assert [greedy for _, greedy in backend._loglikelihood_tokens([pair, other], disable_tqdm=True)] == [
            True,
            False,
        ]


def test_rolling(ours: RefineLM, theirs: HFLM) -> None:
    texts = [(TEXT * 3,), (TEXT[:20],)]  # four windows, and one
    wanted = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    got = ours.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    assert got == pytest.approx(wanted, rel=TOLERANCE)
    whole = RefineLM(ours.evaluated, max_length=1000).loglikelihood_rolling(
        requests("loglikelihood_rolling", texts), disable_tqdm=True
    )
    assert abs(whole[0] - got[0]) > 1e-2  # windows show
    assert whole[1] == pytest.approx(got[1], rel=TOLERANCE)


def test_generation(ours: RefineLM, theirs: HFLM) -> None:
    plain = {"until": [], "max_gen_toks": 12, "do_sample": False}
    wanted = theirs.generate_until(requests("generate_until", [(p, plain) for p in PROMPTS]), disable_tqdm=True)
    got = ours.generate_until(requests("generate_until", [(p, plain) for p in PROMPTS]), disable_tqdm=True)
    assert got == wanted
    assert len(set(got)) > 1 and all(got)
    stop = got[2][4:6]
    stopped = {"until": [stop], "max_gen_toks": 12, "do_sample": False}
    for backend in (ours, theirs):
        answers = backend.generate_until(requests("generate_until", [(p, stopped) for p in PROMPTS]), disable_tqdm=True)
        assert answers == [text.split(stop)[0] for text in got]


def test_sampled_answers_do_not_depend_on_the_batch(ours: RefineLM) -> None:
    kwargs = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    jobs = [(prompt, kwargs) for prompt in PROMPTS]
    one = RefineLM(ours.evaluated, batch_size=1).generate_until(requests("generate_until", jobs), disable_tqdm=True)
    assert ours.generate_until(requests("generate_until", jobs), disable_tqdm=True) == one
    other = RefineLM(ours.evaluated, batch_size=1, seed=1).generate_until(
        requests("generate_until", jobs), disable_tqdm=True
    )
    assert other != one


def test_an_unsupported_generation_argument(ours: RefineLM) -> None:
    with pytest.raises(ConfigError, match="top_p: this generation argument is not supported"):
        ours.generate_until(requests("generate_until", [("a", {"until": [], "top_p": 0.5})]), disable_tqdm=True)


@pytest.mark.parametrize("method", ["sft", "refine"])
def test_test_time_training(model_dir: Path, ours: RefineLM, method: str) -> None:
    settings = NSP if method == "refine" else {"lr": 1e-2}
    adapted = RefineLM(str(model_dir), ttt=method, adapt=settings)
    pairs = [PAIRS[2], PAIRS[3], (PAIRS[2][0], "xyz")]
    alone = [adapted.loglikelihood(requests("loglikelihood", [pair]), disable_tqdm=True)[0] for pair in pairs]
    together = adapted.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    # each context is adapted to from the same weights, whoever came before
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], rel=TOLERANCE)
    plain = ours.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    assert all(abs(a - b) > 1e-3 for (a, _), (b, _) in zip(together, plain, strict=True))
    job = requests("generate_until", [(PROMPTS[1], {"until": [], "max_gen_toks": 5})])
    first = adapted.generate_until(job, disable_tqdm=True)
    assert adapted.generate_until(job, disable_tqdm=True) == first
    with pytest.raises(ConfigError, match="no prompt to adapt to"):
        adapted.loglikelihood_rolling(requests("loglikelihood_rolling", [(TEXT,)]), disable_tqdm=True)


def test_a_context_too_short_to_adapt_to(model_dir: Path) -> None:
    adapted = RefineLM(str(model_dir), ttt="refine")
    with pytest.raises(PromptError, match="at least 13 tokens"):
        adapted.loglikelihood(requests("loglikelihood", [("short", " text")]), disable_tqdm=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrianed": "x"}, "pretrianed: unknown model argument.*Did you mean 'pretrained'"),
        ({}, "pretrained: is missing"),
        ({"pretrained": "x", "ttt": "refin"}, "Did you mean 'refine'"),
        ({"pretrained": "x", "ttt": "none", "adapt": {"lr": 1.0}}, "adapt: has no effect with ttt=none"),
        ({"pretrained": "x", "ttt": "sft", "adapt": {"lrr": 1.0}}, "adapt.lrr: unknown key.*Did you mean 'lr'"),
        ({"pretrained": "x", "batch_size": "auto"}, "batch_size: must be an integer"),
        ({"pretrained": "x", "dtype": "float8"}, "dtype: unknown value"),
    ],
)
def test_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RefineLM(**arguments)


def test_registration_leaves_the_built_in_models() -> None:
    """In a process of its own: whatever imports the harness's models first would hide the trap."""
    script = (
        "import refine_verl.evaluate.lm\n"
        "from lm_eval.api.registry import get_model\n"
        "assert get_model('refine').__name__ == 'RefineLM'\n"
        "assert get_model('hf').__name__ == 'HFLM'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    assert get_model("refine") is RefineLM


def test_a_whole_task(tmp_path: Path, model_dir: Path) -> None:
    """A YAML task with a local file through the harness: the same numbers from both models."""
    write_jsonl(tmp_path / "rows.jsonl", [{"q": TEXT[:n], "a": n % 2, "c": [" one", " two"]} for n in (10, 21, 33)])
    (tmp_path / "tiny.yaml").write_text(
        f"task: tiny_choice\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\n"
        "test_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\ndoc_to_choice: '{{c}}'\n"
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n"
    )
    found = {}
    for name in ("refine", "hf"):
        results = lm_eval.simple_evaluate(
            model=name,
            model_args={"pretrained": str(model_dir), "dtype": "float32"},
            tasks=["tiny_choice"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            device="cpu",
            batch_size=1,
            bootstrap_iters=0,
        )
        rows = [[response[0][0] for response in row["resps"]] for row in results["samples"]["tiny_choice"]]
        found[name] = results["results"]["tiny_choice"]["acc,none"], sum(rows, [])
    assert found["refine"][0] == found["hf"][0]
    assert found["refine"][1] == pytest.approx(found["hf"][1], rel=TOLERANCE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the harness's default device exists here")
def test_the_harnesss_default_device(model_dir: Path) -> None:
    assert RefineLM(str(model_dir), device="cuda:0").device == torch.device("cpu")
