"""`reward.custom_reward_function` scores the answers of post-training, and nothing else does."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from refine_verl.trainer.posttrain import PosttrainTrainer

COLUMNS = {"id": ["a", "b"], "task": ["mine", "mine"], "answers": [["Paris"], ["Rome", "Roma"]], "classes": [[], []]}


def test_the_function_scores_answers(tmp_path: Path) -> None:
    file = tmp_path / "scores.py"
    file.write_text(
        "def near(data_source, solution_str, ground_truth, extra_info, bonus=0):\n"
        "    assert data_source == 'mine' and extra_info['id'] in 'ab'\n"
        "    known = ground_truth if isinstance(ground_truth, list) else [ground_truth]\n"
        "    return {'score': bonus + (solution_str in known)}\n"
    )
    trainer = object.__new__(PosttrainTrainer)
    section = {"path": str(file), "name": "near", "reward_kwargs": {"bonus": 0.5}}
    trainer.config = OmegaConf.create({"reward": {"custom_reward_function": section}})
    assert trainer.scores(COLUMNS, 0, "Paris") == {"near": 1.5}
    assert trainer.scores(COLUMNS, 1, "Roma") == {"near": 1.5}
    assert trainer.scores(COLUMNS, 1, "Paris") == {"near": 0.5}
