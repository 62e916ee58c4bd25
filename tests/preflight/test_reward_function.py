"""A user's function for answers, with verl's signature."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from refine_verl.config import ConfigError, RunFailed
from refine_verl.preflight.reward_function import load_reward_function

GOOD = """
def compute_score(data_source, solution_str, ground_truth, extra_info, share=1.0, **kwargs):
    return share * (solution_str == ground_truth) + (data_source == "qa") + len(extra_info)


async def later(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": len(ground_truth), "acc": 1}


def text(data_source, solution_str, ground_truth, extra_info=None):
    return "good"


def other(answer, references):
    return 1.0


constant = 5
"""


@pytest.fixture
def named(tmp_path: Path):  # noqa: ANN201
    """A configuration that names a function of the file above."""
    file = tmp_path / "scores.py"
    file.write_text(GOOD)

    def make(name: str = "compute_score", path: object = str(file), **kwargs: object) -> DictConfig:
        section = {"path": path, "name": name, "reward_kwargs": kwargs}
        return DictConfig(OmegaConf.create({"reward": {"custom_reward_function": section}}))

    return make


def test_no_function(named) -> None:  # noqa: ANN001
    assert load_reward_function(named(path=None)) is None


def test_it_is_called_as_verl_does(named) -> None:  # noqa: ANN001
    score = load_reward_function(named(share=0.5))
    assert score("qa", "Paris", ["Paris"], {"id": "1"}) == 0.5 + 1 + 1
    assert score("other", "Rome", ["Paris"], {}) == 0.0
    assert load_reward_function(named("later"))("qa", "x", ["a", "b", "c"], {}) == 3.0


@pytest.mark.parametrize(
    ("given", "key", "message"),
    [
        ({"path": "/nonexistent/x.py"}, "path", "/nonexistent/x.py: no such file"),
        ({"name": "compute"}, "name", "has no function 'compute'"),
        ({"name": "constant"}, "name", "is no function"),
        ({"name": "other"}, "", "cannot be called with data_source, solution_str, ground_truth, extra_info by name"),
        ({"name": "later", "share": 1}, "", "cannot be called with .* and share by name"),
    ],
)
def test_what_cannot_be_called(named, given: dict[str, object], key: str, message: str) -> None:  # noqa: ANN001
    with pytest.raises(ConfigError, match=message) as caught:
        load_reward_function(named(**given))
    assert caught.value.key == "reward.custom_reward_function" + (f".{key}" if key else "")


def test_a_file_that_fails(named, tmp_path: Path) -> None:  # noqa: ANN001
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module\n")
    with pytest.raises(ConfigError, match="cannot be imported .ModuleNotFoundError: No module named 'no_such_module'"):
        load_reward_function(named(path=str(broken)))


def test_what_is_no_score(named) -> None:  # noqa: ANN001
    with pytest.raises(RunFailed, match="text returned 'good'; a score is a finite number"):
        load_reward_function(named("text"))("qa", "x", ["y"], {})
