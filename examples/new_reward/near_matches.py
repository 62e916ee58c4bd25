"""A reward of one's own: how much of the real continuation a rollout has, wherever in it.

REFINE's binary reward (Eq. 11) counts a token only in its own place, so one word too many loses all that follow. This
one counts a token that the continuation has anywhere, and half of it where it stands elsewhere:

    python -m refine_verl.main recipe=midtrain model.path=DIR data.train_files=FILES \
        refine.nsp.reward=new_reward.near_matches.near_matches

with the directory above this one on PYTHONPATH, for the command and for the workers.
"""

from __future__ import annotations

from torch import Tensor

from refine_verl.nsp import RewardInputs

ELSEWHERE = 0.5


def near_matches(inputs: RewardInputs) -> Tensor:
    """Reward in [0, 1] of each rollout, [R]: 1 for a token in its place, `ELSEWHERE` for one that comes elsewhere."""
    same = inputs.predicted_tokens[:, :, None] == inputs.target_tokens[:, None, :]
    in_place = same.diagonal(dim1=1, dim2=2).float()
    anywhere = same.any(dim=2).float()
    return (ELSEWHERE * anywhere + (1 - ELSEWHERE) * in_place).mean(dim=1)
