"""Keys of the command line: what is taken, what is refused, and that a refusal writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from refine_verl.command.keys import read_keys
from refine_verl.config import ConfigError
from refine_verl.evaluate.__main__ import main
from refine_verl.evaluate.settings import EvaluateSettings

GIVEN = ["model=m", "out=o", "tasks=ntp"]


def read_arguments(arguments: list[str]) -> EvaluateSettings:
    settings, _ = read_keys(arguments, EvaluateSettings)
    settings.refuse_without_effect(arguments)
    return settings


def test_lists_in_both_spellings() -> None:
    one = read_arguments(["model=m", "out=o", "tasks=[ruler_qa,trec]", "lengths=[8192,4096]"])
    two = read_arguments(["model=m", "out=o", "tasks=ruler_qa,trec", "lengths=8192,4096"])
    assert one == two and one.lengths == (4096, 8192)
    assert one.by_group() == {"ruler_qa": ["ruler_squadqa", "ruler_hotpotqa"], "longbench": ["trec"]}


def test_a_group_has_the_papers_tasks() -> None:
    settings = read_arguments(["model=m", "out=o", "tasks=longbench,ruler_niah,short_context"])
    assert {name: len(tasks) for name, tasks in settings.by_group().items()} == {
        "ruler_niah": 4,
        "longbench": 12,
        "short_context": 9,
    }
    more = read_arguments(["model=m", "out=o", "tasks=ruler_niah,niah_single_2"])
    assert len(more.by_group()["ruler_niah"]) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["modle=m"], r"modle: unknown key.*Did you mean 'model'"),
        (["out=o", "tasks=ntp"], r"model: is missing: give model=\.\.\. \(directory or hub id"),
        (["model=m", "tasks=ntp"], "out: is missing"),
        (["model=m", "out=o"], "tasks: is missing"),
        ([*GIVEN[:2], "tasks=longbnech"], "unknown task 'longbnech'.*Did you mean 'longbench'"),
        ([*GIVEN, "lengths=4k"], "lengths: must be a list of integers"),
        ([*GIVEN, "lengths=[64,64]"], "has a length twice"),
        ([*GIVEN, "limit=0"], "limit: must be at least 1"),
        ([*GIVEN, "convention=papre"], "Did you mean 'paper'"),
        ([*GIVEN, "ttt=refine"], "needs a prompt to adapt to, and the samples of ntp have none"),
        ([*GIVEN[:2], "tasks=trec", "engine=vllm", "ttt=sft"], "engine: =vllm serves weights as they are, and ttt=sft"),
        ([*GIVEN, "engine=vlm"], "engine: unknown value 'vlm'.*Did you mean 'vllm'"),
        ([*GIVEN, "engine=vllm", "device=cpu"], "device: =cpu has no effect with engine=vllm"),
        ([*GIVEN, "max_model_len=512"], "max_model_len: has no effect with engine=own"),
        ([*GIVEN, "engine=own", "gpu_memory_utilization=0.5"], "gpu_memory_utilization: has no effect with engine=own"),
        ([*GIVEN, "engine=vllm", "gpu_memory_utilization=1.5"], "gpu_memory_utilization: is a share .* at most 1"),
        ([*GIVEN, "engine=vllm", "gpu_memory_utilization=0"], "gpu_memory_utilization: must be greater than 0"),
        ([*GIVEN, "engine=vllm", "max_model_len=1"], "max_model_len: must be at least 2"),
        ([*GIVEN, "limit=1", "limit=2"], "limit: is given twice"),
        ([*GIVEN, "adapt.lr=1", "adapt.lr=2"], "adapt.lr: is given twice"),
        ([*GIVEN, "adapt=settings.yaml", "adapt.lr=1"], "adapt: and adapt.lr are both given"),
        ([*GIVEN, "adapt.lr={"], "adapt.lr=.*cannot be read|lr=.* cannot be read"),
        ([*GIVEN, "seed=0"], "seed: has no effect on these tasks: it is about ruler_niah"),
        ([*GIVEN, "niah_samples=2"], "niah_samples: has no effect"),
        (
            [*GIVEN[:2], "tasks=ntp,niah_single_1", "convention=paper"],
            "no effect .* it is about ruler_qa and longbench",
        ),
        ([*GIVEN, "limit"], "'limit' is not of the form key=value. Did you mean 'limit'"),
        ([*GIVEN, "--limit"], "--limit needs a value: --limit VALUE, or limit=VALUE"),
        ([*GIVEN, "--limt", "3"], "unknown option --limt. Did you mean '--limit'"),
    ],
)
def test_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_arguments(arguments)


def test_keys_of_some_tasks() -> None:
    given = ["tasks=trec,niah_single_1", "seed=1", "niah_samples=2", "convention=lm_eval"]
    settings = read_arguments([*GIVEN[:2], *given])
    assert (settings.seed, settings.niah_samples, settings.convention) == (1, 2, "lm_eval")


def test_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main([f"model={tmp_path}", "tasks=ntp", f"out={out}", "modle=x"]) == 2
    assert capsys.readouterr().err.startswith("error: modle: unknown key")
    assert not out.exists()


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"], ["model=m", "-h"]])
def test_usage_names_every_key(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "lengths=4096,8192,16384" in said and "convention=paper" in said
