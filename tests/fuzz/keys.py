"""Mutated keys: of ours, of verl's, and of `evaluate` and `inspect`, drawn with a fixed seed."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator
from typing import Any

from fuzz.cases import Case
from fuzz.domains import COMMON, DOCUMENTS, EVALUATE, HUGE, INSPECT, NOT_JUDGED, PROMPTS, TTT, Domain

from refine_verl.compose.composition import base_schema
from refine_verl.compose.schema import leaves

SEED = 13
WRONG_PER_KEY = 2
INERT_SHARE = 0.07

VALUES: tuple[tuple[str, Any], ...] = (
    ("null", None),
    ("[]", []),
    ("[1,2]", [1, 2]),
    ("[1,[2]]", [1, [2]]),
    ("{a:1}", {"a": 1}),
    ("''", ""),
    ("'  '", "  "),
    ("'ü☃中'", "ü☃中"),
    ("'7'", "7"),
    ("word", "word"),
    ("true", True),
    ("0", 0),
    ("-1", -1),
    ("-7", -7),
    ("3", 3),
    ("0.5", 0.5),
    ("-0.5", -0.5),
    ("1e30", 1e30),
    ("nan", float("nan")),
    ("inf", float("inf")),
    ("-inf", float("-inf")),
    (str(HUGE), HUGE),
    (str(-HUGE), -HUGE),
    ("/does/not/exist", "/does/not/exist"),
)
"""As typed, and what that is."""

# Inert ones that a user of verl would expect to act.
EXPECTED_BY_USERS: tuple[tuple[str, str], ...] = (
    ("custom_reward_function.path", "/nonexistent/x.py"),
    ("reward.custom_reward_function.path", "/nonexistent/x.py"),
    ("reward.custom_reward_function.name", "score"),
    ("reward.reward_manager.name", "nonsense"),
    ("reward.reward_model.enable", "true"),
    ("reward_model.enable", "true"),
    ("reward_model.reward_manager", "naive"),
    ("data.tokenizer", "/does/not/exist"),
    ("+data.apply_chat_template_kwargs.enable_thinking", "false"),
    ("data.filter_overlong_prompts", "true"),
    ("data.truncation", "left"),
    ("data.max_response_length", "7"),
    ("data.return_raw_chat", "false"),
    ("data.reward_fn_key", "source"),
    ("data.trust_remote_code", "true"),
    ("actor_rollout_ref.rollout.val_kwargs.n", "4"),
    ("actor_rollout_ref.rollout.val_kwargs.temperature", "0.7"),
    ("actor_rollout_ref.rollout.val_kwargs.do_sample", "true"),
    ("actor_rollout_ref.rollout.do_sample", "false"),
    ("actor_rollout_ref.rollout.response_length", "7"),
    ("actor_rollout_ref.rollout.ignore_eos", "true"),
    ("actor_rollout_ref.rollout.name", "vllm"),
    ("actor_rollout_ref.rollout.seed", "7"),
    ("actor_rollout_ref.model.use_fused_kernels", "true"),
    ("actor_rollout_ref.model.trust_remote_code", "true"),
    ("actor_rollout_ref.actor.kl_loss_coef", "0.1"),
    ("actor_rollout_ref.actor.ppo_max_token_len_per_gpu", "64"),
    ("actor_rollout_ref.actor.data_loader_seed", "7"),
    ("actor_rollout_ref.actor.optim.total_training_steps", "7"),
    ("actor_rollout_ref.actor.fsdp_config.forward_only", "true"),
    ("algorithm.gamma", "0.5"),
    ("algorithm.lam", "0.5"),
    ("algorithm.kl_ctrl.kl_coef", "0.5"),
    ("algorithm.use_pf_ppo", "true"),
    ("trainer.balance_batch", "false"),
    ("trainer.critic_warmup", "5"),
)

TYPOS = (
    ("refine.nsp.chunk", "4"),
    ("refine.nsp.rollout_lenght", "4"),
    ("refine.los.rl_coef", "0.1"),
    ("data.trainfiles", "x"),
    ("data.max_len", "64"),
    ("model.pth", "x"),
    ("trainer.save_frequency", "3"),
    ("actor_rollout_ref.actor.optim.learning_rate", "0.1"),
    ("actor_rollout_ref.actor.ünïcode", "1"),
    ("+refine.nsp.extra", "1"),
    ("+trainer.extra", "1"),
    ("+data.extra", "1"),
    ("+actor_rollout_ref.actor.extra", "1"),
    ("algorithm.adv_estimater", "grpo"),
)

SECTIONS = ("refine", "refine.nsp", "refine.loss", "model", "data", "trainer", "algorithm", "ray_kwargs", "reward")
SECTIONS += ("actor_rollout_ref", "actor_rollout_ref.actor", "actor_rollout_ref.actor.optim", "actor_rollout_ref.model")

LOGGER = "[mlflow]"
"""One of verl's loggers whose package need not be there."""

LATE: tuple[tuple[str, str], ...] = (
    ("trainer.logger", LOGGER),
    ("trainer.logger", "[nonsense]"),
    ("+ray_kwargs.ray_init.runtime_env.env_vars.MY_FLAG", "1"),
    ("+ray_kwargs.ray_init.nonsense", "1"),
    ("ray_kwargs.ray_init.num_cpus", "-1"),
    ("ray_kwargs.ray_init.num_cpus", "many"),
    ("actor_rollout_ref.model.external_lib", "no_such_package"),
    ("actor_rollout_ref.model.external_lib", "sys.nothing"),
    ("refine.nsp.reward", "no.such.function"),
    ("refine.nsp.reward", "os.path.join.x"),
    ("trainer.default_local_dir", "/dev/null/run"),
    ("trainer.default_local_dir", "/proc/run"),
    ("data.cache_dir", "/dev/null/cache"),
    ("model.tokenizer", "/does/not/exist"),
    ("model.path", "/does/not/exist"),
    ("data.train_files", "/does/not/exist"),
    ("data.val_files", "/does/not/exist.parquet"),
    ("data.train_files", "[]"),
    ("trainer.resume_mode", "resume_path"),
)
"""What only a worker, Ray or a library would notice, unless it is looked for."""


def key_cases() -> list[Case]:
    """All of them, the same ones every time."""
    cases: list[Case] = []
    for base, domains in (("main", {**COMMON, **DOCUMENTS}), ("posttrain", PROMPTS), ("ttt", TTT)):
        for key, domain in domains.items():
            cases += _mutations(base, key, domain)
    for base, domains in (("evaluate", EVALUATE), ("inspect", INSPECT)):
        for key, domain in domains.items():
            cases += _mutations(base, key, domain)
    cases += _inert()
    for key, value in TYPOS:
        cases.append(_refused("main", key, value, front=True))
    for section in SECTIONS:
        cases += [_refused("main", section, value) for value in ("null", "[1]", "word")]
    for key, value in LATE:
        if value != LOGGER or importlib.util.find_spec(LOGGER.strip("[]")) is None:
            cases.append(_refused("main", key, value, front=True, always=True))
    return cases


def drawn(name: str, share: float) -> bool:
    """Whether this one is among the share that is drawn, whatever others there are."""
    return random.Random(f"{SEED} {name}").random() < share


def _mutations(base: str, key: str, domain: Domain) -> Iterator[Case]:
    """Wrong values of the key, which must be refused, and one that may act."""
    rng = random.Random(f"{SEED} {base} {key}")
    values = [*VALUES, *((choice[:-1] + "z", choice[:-1] + "z") for choice in domain.choices[:1] if choice.strip())]
    wrong = [text for text, value in values if not domain.allows(value)]
    for text in rng.sample(wrong, min(WRONG_PER_KEY, len(wrong))):
        yield _refused(base, key, text)
    right = [item for item in values if domain.allows(item[1]) and item[0] not in ("/does/not/exist",)]
    if right and base not in ("evaluate", "inspect") and key not in ("data.num_workers", "model.path"):
        text, value = rng.choice(right)
        checked = isinstance(value, (bool, int, float))
        kept = {"key": key, "value": value} if checked and domain.kind in ("boolean", "integer", "number") else {}
        yield Case(
            id=_id(base, f"{key}={text}"), base=base, changed=(f"{key}={text}",), names=(key,), may_act=True, **kept
        )


def _inert() -> Iterator[Case]:
    """Keys that are not known to act, with another value than their default."""
    for key, value in EXPECTED_BY_USERS:
        yield _refused("posttrain", key, value, always=True)
    listed = {key for key, _ in EXPECTED_BY_USERS}
    acting = {*COMMON, *DOCUMENTS, *PROMPTS, *TTT}
    schema = [
        (key, default)
        for key, default in leaves(base_schema())
        if key not in acting | listed
        and not key.endswith("_target_")
        and not any(key == place or key.startswith(f"{place}.") for place in NOT_JUDGED)
    ]
    for key, default in schema:
        if drawn(key, INERT_SHARE):
            yield _refused("posttrain", key, _another(default))


def _another(default: Any) -> str:
    """A sound value of the same kind that is not the default."""
    if isinstance(default, bool):
        return str(not default).lower()
    if isinstance(default, (int, float)):
        return str(default + 1)
    if isinstance(default, list):
        return "[other]"
    return "7" if default is None else "other"


def _refused(base: str, key: str, value: str, front: bool = False, always: bool = False) -> Case:
    text = f"{key}={value}"
    names = (key.lstrip("+~"),)
    return Case(id=_id(base, text), base=base, changed=(text,), names=names, front=front, always=always)


def _id(base: str, text: str) -> str:
    return f"{base}: {text}"
