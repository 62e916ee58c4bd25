"""What an update learns is told by its tag, and counted by it."""

from __future__ import annotations

import pickle

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu

from refine_verl.workers.objective import Objective, rollouts_to_learn, tokens_to_learn

LENGTHS = torch.tensor([9, 5, 7])


def batch(objective: Objective, weight: tuple[float, ...] = (1.0, 1.0, 0.0), **tensors: Tensor) -> TensorDict:
    return tu.get_tensordict(
        tensor_dict={"lengths": LENGTHS.clone(), "weight": torch.tensor(weight), **tensors},
        non_tensor_dict={"objective": objective},
    )


def test_documents_and_rollouts_predict_every_token_but_the_first() -> None:
    data = batch(Objective.DOCUMENTS)
    assert tokens_to_learn(data).tolist() == [8, 4, 0] and rollouts_to_learn(data) == (0, 0)
    # a row of weight 0 stays in the batch, and begins to learn where it ends
    assert data["learn_from"].tolist() == [1, 1, 7]
    data = batch(Objective.ROLLOUTS, advantages=torch.zeros(3, 4, 2, 5))
    assert tokens_to_learn(data).tolist() == [8, 4, 0] and rollouts_to_learn(data) == (2 * 8, 2 * 8 * 5)
    data["rollout_lengths"] = torch.tensor([[1, 2, 3, 4], [5, 5, 5, 1], [5, 5, 5, 5]])
    assert rollouts_to_learn(data) == (2 * 8, 2 * (10 + 16))


def test_rollouts_that_are_yet_to_be_written_are_counted_by_their_settings() -> None:
    data = batch(Objective.ON_POLICY)
    tu.assign_non_tensor(data, rollouts_per_row=8, rollout_length=5)
    assert tokens_to_learn(data).tolist() == [8, 4, 0] and rollouts_to_learn(data) == (2 * 8, 2 * 8 * 5)


def test_without_dummies_nothing_is_left_out() -> None:
    data = batch(Objective.DOCUMENTS, (1.0, 1.0, 1.0))
    assert tokens_to_learn(data).tolist() == [8, 4, 6] and "learn_from" not in data.keys()  # noqa: SIM118


def test_references_are_learned_behind_their_prompts() -> None:
    data = batch(Objective.REFERENCES, learn_from=torch.tensor([6, 3, 2]))
    assert tokens_to_learn(data).tolist() == [3, 2, 0] and rollouts_to_learn(data) == (0, 0)


def test_answers_are_counted_by_their_own_tokens() -> None:
    lengths = torch.tensor([[1, 4], [2, 2], [3, 3]])
    data = batch(Objective.ANSWERS, answer_lengths=lengths, advantages=torch.zeros(3, 2, 4))
    assert tokens_to_learn(data).tolist() == [5, 4, 0] and rollouts_to_learn(data) == (2 * 2, 5 + 4)


def test_the_tag_decides_and_not_what_else_is_there() -> None:
    """Negative control: the tensors of answers are there and play no part."""
    rest = {"answer_lengths": torch.ones(3, 2, dtype=torch.int64), "advantages": torch.zeros(3, 2, 4)}
    data = batch(Objective.DOCUMENTS, **rest)
    assert tokens_to_learn(data).tolist() == [8, 4, 0] and rollouts_to_learn(data) == (0, 0)


@pytest.mark.parametrize("objective", Objective)
def test_what_each_is_made_of(objective: Objective) -> None:
    losses = {
        Objective.DOCUMENTS: (True, False, True),
        Objective.ROLLOUTS: (True, True, True),
        Objective.ON_POLICY: (True, True, True),
        Objective.REFERENCES: (True, False, False),
        Objective.ANSWERS: (False, True, False),
    }
    assert (objective.predicts_tokens, objective.reinforces, objective.weighs_losses) == losses[objective]


def test_it_survives_the_way_to_a_micro_batch() -> None:
    data = pickle.loads(pickle.dumps(batch(Objective.ANSWERS, answer_lengths=torch.ones(3, 2, dtype=torch.int64))))
    for part in data.split(2):
        assert Objective.of(tu.index_select_tensor_dict(part, [0])) is Objective.ANSWERS


def test_a_batch_without_a_tag_is_refused() -> None:
    with pytest.raises(ValueError, match="None is not a valid Objective"):
        Objective.of(tu.get_tensordict(tensor_dict={"lengths": LENGTHS}))
