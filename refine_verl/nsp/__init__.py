"""Next-sequence prediction on tensors: the four steps of REFINE (paper, Sec. 3.2), with torch and numpy only.

1. Entropy-based token selection: `chunked_entropy` (Eq. 5), `align_entropy`, `smooth_entropy`,
   `select_positions` (Eq. 6) with the numbers of `position_uniforms`.
2. Rollout generation (Eq. 7): `sample_from_logits` with the numbers of `rollout_uniforms`; the model itself
   runs elsewhere.
3. Reward assignment: `get_reward` for `cosine` (Eq. 9), `binary` (Eq. 11), `hybrid` (Eq. 12), `edit` or a user's
   function.
4. Optimization with RL: `group_standardise` (advantages), `gather_log_probs`, `ppo_clip_loss` and
   `refine_objective` (Eq. 2, 10).
"""

from refine_verl.nsp.entropy import (
    align_entropy,
    chunked_entropy,
    entropy_from_logits,
    smooth_entropy,
    smooth_token_entropy,
)
from refine_verl.nsp.functions import check_functions
from refine_verl.nsp.lengths import counted_tokens, rollout_lengths, sentence_ends
from refine_verl.nsp.metrics import reward_metrics, rollout_metrics
from refine_verl.nsp.objective import (
    gather_log_probs,
    group_ids,
    group_standardise,
    group_zero_std_share,
    ppo_clip_loss,
    refine_objective,
)
from refine_verl.nsp.rewards import (
    RewardFunction,
    RewardInputs,
    cosine_reward,
    edit_gains,
    get_reward,
    register_reward,
)
from refine_verl.nsp.sampling import (
    end_tokens,
    generation_seeds,
    generation_uniforms,
    position_uniforms,
    rollout_uniforms,
    sample_from_logits,
    uniforms,
    without,
)
from refine_verl.nsp.selection import (
    ANCHORS,
    SCORES,
    STRATEGIES,
    SelectionFunction,
    SelectionInputs,
    chunk_bounds,
    drawn_by,
    looks_at_writes,
    needs_writes,
    register_selection,
    select_positions,
    selection_inputs,
    weights_of,
)
