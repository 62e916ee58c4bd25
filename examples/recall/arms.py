"""What is trained and compared: the headline's three methods, the paper's ablations, and this project's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from refine_verl.adaptation.settings import AdaptSettings
from refine_verl.config import LossSettings, NSPSettings, RolloutLength

BATCH = 8
LEARNING_RATES = {"under": 5e-4, "plateau": 2e-4}


@dataclass(frozen=True)
class Arm:
    """A way to train; what is not named here is the paper's (`NSPSettings`, `LossSettings`).

    Attributes:
        name: unique, a part of file names.
        label: in tables and figures.
        method: ``refine`` or ``sft``.
        nsp, loss: keys of ``refine.nsp`` and ``refine.loss`` that differ.
        divide_by_std: ``algorithm.norm_adv_by_std_in_grpo``.
        lr_scale: times the learning rate of the base's state.
    """

    name: str
    label: str
    method: str = "refine"
    nsp: Mapping[str, Any] = field(default_factory=dict)
    loss: Mapping[str, Any] = field(default_factory=dict)
    divide_by_std: bool = True
    lr_scale: float = 1.0

    def settings(self, state: str, seed: int) -> AdaptSettings:
        """For the loop, from a base in this state."""
        return AdaptSettings(
            method=self.method,
            nsp=NSPSettings(**self.nsp),
            loss=LossSettings(**self.loss),
            norm_adv_by_std_in_grpo=self.divide_by_std,
            mini_batch_size=BATCH,
            micro_batch_size=BATCH,
            lr=LEARNING_RATES[state] * self.lr_scale,
            seed=seed,
        )


GROUPED = {"rollouts_per_position": 8, "group": "position"}
# Without the division advantages are as small as rewards differ, hence the larger weight.
GROUPED_LAMBDA = 1.0

SFT = Arm("sft", "SFT", method="sft")
PAPER = Arm("paper", "REFINE, the paper's settings")
GROUPED_ARM = Arm(
    "grouped",
    "REFINE, grouped by position",
    nsp=GROUPED,
    loss={"rl_coef": GROUPED_LAMBDA},
    divide_by_std=False,
)
HEADLINE = (SFT, PAPER, GROUPED_ARM)

MANY = {"chunks": 32, "rollouts_per_position": 8, "group": "position", "credit": "token"}
MANY_LAMBDA = 5.0


def many(reward: str, rollouts: int = 8) -> Arm:
    """Many positions, rollouts compared at their own one, credit per token; with 64 of them the gradient is nearly
    exact: an upper bound of what less noise can do."""
    name = f"many_{reward}" if rollouts == 8 else f"bound_{reward}"
    return Arm(
        name,
        f"REFINE, c = 32, n = {rollouts}, credit per token, {reward}",
        nsp={
            **MANY,
            "rollouts_per_position": rollouts,
            "reward": reward,
            "rollouts_together": BATCH * 32 * rollouts,  # memory is plenty, so that nothing is computed twice
        },
        loss={"rl_coef": MANY_LAMBDA},
        divide_by_std=False,
    )


SIGNAL = (SFT, PAPER, many("binary"), many("cosine"))
"""With a policy gradient that has a signal, and without."""


def _one(key: str, values: tuple[Any, ...]) -> tuple[Arm, ...]:
    return tuple(Arm(f"{key}_{value}", f"{value}", nsp={key: value}) for value in values)


QUESTION = 30
"""Tokens of the recall task's last round, which is what `query` takes for a question: every key of the store is asked
for in it, and what resembles it is all that came before."""


def _lengths() -> tuple[Arm, ...]:
    """Rollouts that end where the document becomes predictable, as short as one token or around the paper's five."""
    return tuple(
        Arm(
            f"rollout_length_{least}to{most}",
            f"{least} to {most}",
            nsp={"rollout_length": RolloutLength(min=least, max=most, by="entropy")},
        )
        for least, most in ((1, 5), (3, 7))
    )


def _groups() -> tuple[Arm, ...]:
    """n with both groupings, with and without the division; all with lambda 1 and, for time, c = 4."""
    arms = []
    for group in ("sequence", "position"):
        for divide in (True, False):
            for n in (1, 4, 8, 16):
                if group == "position" and n == 1:
                    continue  # nothing to compare with
                arms.append(
                    Arm(
                        f"n{n}_{group}{'' if divide else '_nostd'}",
                        f"n={n}",
                        nsp={"chunks": 4, "rollouts_per_position": n, "group": group},
                        loss={"rl_coef": 1.0},
                        divide_by_std=divide,
                    )
                )
    return tuple(arms)


def _weights() -> tuple[Arm, ...]:
    """lambda_RL, and the policy loss alone, for both estimators."""
    arms = []
    nsp: dict[str, Any]
    for name, nsp, divide in (("paper", {}, True), ("grouped", GROUPED, False)):
        for rl, sft in ((0.2, 1.0), (1.0, 1.0), (5.0, 1.0), (1.0, 0.0)):
            if (name, rl, sft) in (("paper", 0.2, 1.0), ("grouped", GROUPED_LAMBDA, 1.0)):
                continue  # the headline's
            label = f"λ={rl:g}" if sft else "policy loss alone"
            suffix = f"rl{rl:g}" if sft else "rl_only"
            loss = {"rl_coef": rl, "sft_coef": sft}
            arms.append(Arm(f"{name}_{suffix}", label, nsp=nsp, loss=loss, divide_by_std=divide))
        alone = {"rl_coef": 1.0, "sft_coef": 0.0}
        arms.append(
            Arm(
                f"{name}_binary_rl_only",
                "policy loss alone, binary reward",
                nsp={**nsp, "reward": "binary"},
                loss=alone,
                divide_by_std=divide,
            )
        )
    return tuple(arms)


ABLATIONS: dict[str, tuple[Arm, ...]] = {
    "reward": (
        *_one("reward", ("binary", "hybrid", "edit")),
        Arm(
            "grouped_binary",
            "binary, grouped by position",
            nsp={**GROUPED, "reward": "binary"},
            loss={"rl_coef": GROUPED_LAMBDA},
            divide_by_std=False,
        ),
    ),
    "selection": (
        *_one("selection", ("uniform", "max_entropy", "min_entropy", "surprise")),
        Arm("selection_query", "query", nsp={"selection": "query", "question_tokens": QUESTION}),
    ),
    "k": (*_one("rollout_length", (1, 3, 7)), *_lengths()),
    "c": _one("chunks", (2, 4)),
    "n": _groups(),
    "lambda": _weights(),
    "lr": tuple(
        Arm(f"{arm.name}_lr{scale:g}", f"{arm.label}, lr × {scale:g}", arm.method, arm.nsp, arm.loss, lr_scale=scale)
        for arm in (SFT, PAPER)
        for scale in (0.2, 5.0)
    ),
}
"""Arms of each table; the paper's own settings (cosine, entropy, k=5, c=8, lambda 0.2) are the headline's arm."""

MANY_WEIGHTS = tuple(
    replace(many("binary"), name=f"many_rl{weight:g}", label=f"λ = {weight:g}", loss={"rl_coef": weight})
    for weight in (1.0, 25.0)
)
"""Other weights of the policy loss than `MANY_LAMBDA`, with many rollouts and the binary reward."""
