"""Run by `test_placement` in a process of its own: what runs on a second device, and equals what the CPU says.

Same weights, same draws; a tensor made on the wrong device raises there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, is_dataclass, replace
from typing import Any

import pytest
import torch
from placement.device import Elsewhere, counted_waits, install
from reference.toy import NSP, VOCABULARY, InPieces, InSegments, documents_of, draws_for, tiny_config
from torch import Tensor
from torch.utils import _pytree as pytree

import refine_verl
from refine_verl.adaptation import checks
from refine_verl.config import ConfigError, LossSettings, NSPSettings
from refine_verl.inspect.analysis import analyse
from refine_verl.kernels.cuts import Cuts
from refine_verl.kernels.patch import use_cpu_kernels
from refine_verl.models import Branches, Documents, FastWeightActor, load_model, make_actor
from refine_verl.models.answers import answer_draws
from refine_verl.models.lact import LaCTConfig
from refine_verl.models.lact.take import _Move
from refine_verl.models.reward_manager import HiddenStateRewardManager
from refine_verl.models.step import Step
from refine_verl.nsp import group_standardise, ppo_clip_loss
from refine_verl.nsp.rewards import REWARDS

DEVICE = install()
CPU = torch.device("cpu")
CLOSE = 1e-12
"""The same kernels compute both; autograd may add up gradients in another order."""

LACT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attn_heads": 4,
    "num_lact_heads": 2,
    "lact_chunk_size": 8,
    "window_size": 6,
    "intermediate_size": 20,
    "vocab_size": VOCABULARY,
}
FAMILIES: dict[str, tuple[str, Callable[[], Any]]] = {
    "delta_net": ("delta_net", lambda: None),
    "delta_net in pieces": ("delta_net", InPieces),
    "delta_net in segments": ("delta_net", InSegments),
    "gated_deltanet": ("gated_deltanet", lambda: None),
    "gated_deltanet in pieces": ("gated_deltanet", InPieces),
    "lact": ("lact", lambda: None),
}
"""Models, and ways to have their states; in pieces is the one of GPUs."""

IN_PIECES = [name for name in FAMILIES if name == "lact" or "pieces" in name]
"""What a GPU would run."""
LENGTHS = {"equal": (40, 40), "unequal": (40, 33, 51)}
Result = dict[str, Any]


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    use_cpu_kernels()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def actor_of(family: str, device: torch.device, checkpointing: str = "none") -> FastWeightActor:
    model_type, adapter = FAMILIES[family]
    config = LaCTConfig(**LACT) if model_type == "lact" else tiny_config(model_type)
    model = load_model(None, config=config, dtype=torch.float64, seed=1)
    with torch.no_grad():  # larger weights than at initialisation: every part of the model matters
        generator = torch.Generator().manual_seed(2)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return make_actor(model.to(device).eval(), adapter=adapter(), activation_checkpointing=checkpointing)


def documents_on(device: torch.device, lengths: tuple[int, ...]) -> Documents:
    made = documents_of(lengths)
    return Documents(made.tokens.to(device), made.lengths)


def brought(tree: Any) -> Any:
    """All tensors, which have to be on the device unless they are positions, as the CPU has them."""
    return pytree.tree_map_only(Tensor, lambda x: x.detach().cpu(), tree)


def with_gradients(actor: FastWeightActor, loss: Tensor, result: Any) -> Result:
    actor.zero_grad()
    loss.backward()
    return {"result": result, "gradients": {name: p.grad for name, p in actor.named_parameters()}}


PIECES = replace(NSP, rollouts_together=5)


def rollout(actor: FastWeightActor, documents: Documents, nsp: NSPSettings = NSP) -> Any:
    draws = draws_for(range(len(documents)))
    return vars(actor(mode="rollout", documents=documents, nsp=nsp, draws=draws, snapshots=24))


def rollout_in_pieces(actor: FastWeightActor, documents: Documents) -> Any:
    return rollout(actor, documents, PIECES)


def branches_of(documents: Documents) -> Branches:
    generator = torch.Generator().manual_seed(4)
    shape = (len(documents), NSP.chunks, NSP.rollouts_per_position, NSP.rollout_length)
    tokens = torch.randint(0, VOCABULARY, shape, generator=generator).to(documents.tokens.device)
    positions = torch.tensor([[3, 11, 27]] * len(documents), device=documents.tokens.device)
    return Branches(positions, tokens)


def update(actor: FastWeightActor, documents: Documents, nsp: NSPSettings = NSP) -> Any:
    output = actor(mode="update", documents=documents, branches=branches_of(documents), nsp=nsp)
    return with_gradients(actor, output["ntp_loss_sum"] + output["log_probs"].sum(), output)


def update_in_pieces(actor: FastWeightActor, documents: Documents) -> Any:
    return update(actor, documents, PIECES)


def on_policy(actor: FastWeightActor, documents: Documents) -> Any:
    step = Step(actor, NSP, 0)
    numbers, output = step.on_policy(1, documents, range(len(documents)), HiddenStateRewardManager("cosine"))
    rollouts = {**numbers, "advantages": group_standardise(numbers["rewards"])}
    loss, metrics = step.loss(
        documents,
        rollouts,
        LossSettings(rl_coef=0.7, sft_coef=1.0),
        output=output,
        policy_loss=ppo_clip_loss,
        global_tokens=documents.predicted,
        global_rollouts=rollouts["advantages"].numel(),
    )
    return with_gradients(actor, loss, (rollouts, metrics))


def score(actor: FastWeightActor, documents: Documents) -> Any:
    return actor(mode="score", documents=documents)


def generate(actor: FastWeightActor, documents: Documents) -> Any:
    rows = len(documents)
    draws = answer_draws(0, 1, range(rows), 2, 5)
    return vars(
        actor(
            mode="generate",
            prompts=documents,
            limits=[5, 4, 3][:rows],
            length=5,
            copies=2,
            temperature=0.7,
            draws=draws,
            stop_tokens=(1, 2, 3),
        )
    )


def answer_log_probs(actor: FastWeightActor, documents: Documents) -> Any:
    generator = torch.Generator().manual_seed(5)
    device = documents.tokens.device
    tokens = torch.randint(0, VOCABULARY, (len(documents), 2, 6), generator=generator).to(device)
    lengths = torch.tensor([[6, 1], [3, 5], [2, 6]][: len(documents)], device=device)
    output = actor(
        mode="answer_log_probs", prompts=documents, tokens=tokens, lengths=lengths, temperature=0.7, segments=4
    )
    return with_gradients(actor, output["log_probs"].sum(), output)


MODES = (rollout, rollout_in_pieces, update, update_in_pieces, on_policy, score, generate, answer_log_probs)


def on_both(run: Callable[[torch.device], Any]) -> tuple[Any, Any]:
    return run(DEVICE), brought(run(CPU))


def assert_equal(there: Any, here: Any) -> None:
    tensors = [x for x in pytree.tree_leaves(there) if isinstance(x, Tensor)]
    assert tensors and any(isinstance(x, Elsewhere) for x in tensors)
    torch.testing.assert_close(brought(there), here, rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
def test_mode(family: str, mode: Callable[..., Any], lengths: tuple[int, ...]) -> None:
    there, here = on_both(lambda device: mode(actor_of(family, device), documents_on(device, lengths)))
    assert_equal(there, here)
    if mode is not generate:
        assert all(isinstance(x, Elsewhere) for x in pytree.tree_leaves(there) if isinstance(x, Tensor))


@pytest.mark.parametrize("checkpointing", ["layer", "segment"])
@pytest.mark.parametrize("mode", [update, on_policy, answer_log_probs], ids=lambda mode: mode.__name__)
def test_mode_with_activation_checkpointing(family: str, mode: Callable[..., Any], checkpointing: str) -> None:
    lengths = LENGTHS["unequal"]
    assert_equal(*on_both(lambda device: mode(actor_of(family, device, checkpointing), documents_on(device, lengths))))


HEAD: dict[str, dict[str, Any]] = {
    "logits": {},
    "entropy": {},
    "cross_entropy": {"targets": True},
    "cross_entropy with entropy": {"targets": True, "with_entropy": True},
    "score": {"targets": True},
    "log_probs": {"targets": True, "temperature": 0.7, "forbidden": (3, 5)},
    "log_probs in chunks": {"targets": True, "chunked": True},
}


@pytest.mark.parametrize("name", HEAD)
def test_head(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("refine_verl.models.head.chunk_elements", lambda _: 4 * VOCABULARY)
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(10, 32, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (10,), generator=generator)
    task, options = name.split(" ")[0], dict(HEAD[name])
    ignored = targets.clone()
    ignored[[2, 9]] = -100

    def run(device: torch.device) -> Any:
        head = actor_of("delta_net", device).get_output_embeddings()
        states = hidden.to(device).requires_grad_()
        if "targets" in options:
            options["targets"] = (targets if task == "log_probs" else ignored).to(device)
        out = head(states, task=task, **options)
        first = out[0] if isinstance(out, tuple) else out
        if first.requires_grad:
            first.sum().backward()
        return out, states.grad, head.weight.grad

    assert_equal(*on_both(run))


def test_the_head_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many chunks there are, ignored rows among them."""
    monkeypatch.setattr("refine_verl.models.head.chunk_elements", lambda _: 4 * VOCABULARY)
    head = actor_of("delta_net", DEVICE).get_output_embeddings()
    hidden = torch.randn(40, 32, dtype=torch.float64).to(DEVICE).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (40,)).masked_fill(torch.arange(40) % 7 == 0, -100).to(DEVICE)
    with counted_waits() as waits:
        loss, _ = head(hidden, task="cross_entropy", targets=targets, with_entropy=True)
        loss.backward()
        head(hidden, task="entropy")
        head(hidden, task="score", targets=targets)
        head(hidden, task="log_probs", targets=targets.clamp(min=0), chunked=True)
    assert not waits.reads and not waits.uploads


@pytest.mark.parametrize("name", sorted(REWARDS.functions))
def test_reward(family: str, name: str) -> None:
    def run(device: torch.device) -> Any:
        batch = actor_of(family, device)(
            mode="rollout",
            documents=documents_on(device, LENGTHS["equal"]),
            nsp=NSP,
            draws=draws_for(range(2)),
            snapshots=24,
        )
        return HiddenStateRewardManager(name, reported=REWARDS.functions)(batch)

    there, here = on_both(run)
    assert_equal(there, here)
    assert {"rewards", *(f"reward_{reward}" for reward in REWARDS.functions)} == set(there)


def test_a_user_of_adapt(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Weights, metrics and answers inside the block; the weights are back afterwards."""
    # it takes models on a CPU or a CUDA device only, and this device's tensors have no memory of their own
    monkeypatch.setattr(checks, "_check_placement", lambda model: None)
    monkeypatch.setattr(checks, "_check_trainable", lambda model: None)
    prompts = [documents_of((length,), seed=length).tokens[0] for length in (23, 40, 31)]
    for on_policy in (False, True):

        def run(device: torch.device, on_policy: bool = on_policy) -> Any:
            model = actor_of(family, device)
            before = [parameter.clone() for parameter in model.parameters()]
            nsp = {"chunks": 3, "rollout_length": 4, "rollouts_per_position": 2, "reward": "cosine"}
            settings = {"lr": 1e-2, "mini_batch_size": 2, "micro_batch_size": 2, "on_policy": on_policy, "nsp": nsp}
            with refine_verl.adapt(model, prompts, settings) as adapted:
                weights = [parameter.clone() for parameter in model.parameters()]
                answers = adapted.generate(max_new_tokens=4, temperature=0.7)
            assert all(map(torch.equal, before, model.parameters()))
            assert not any(map(torch.equal, before, weights))
            return weights, answers, adapted.history

        assert_equal(*on_both(run))


@pytest.mark.parametrize("family", ["delta_net", "lact"])
def test_a_memory_follows_its_model(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Asked, appended to, trained from and saved after the model has moved."""
    monkeypatch.setattr(checks, "_check_placement", lambda model: None)
    monkeypatch.setattr(checks, "_check_trainable", lambda model: None)
    document, question, text = (documents_of((length,), seed=length).tokens[0] for length in (23, 5, 31))

    def run(device: torch.device) -> Any:
        memory = refine_verl.remember(actor_of(family, CPU), [document])
        memory.model.to(device)
        answers = memory.ask([question], max_new_tokens=4, stop_tokens=())
        memory.append([question])
        assert all(isinstance(x, Elsewhere) == (device == DEVICE) for x in memory.states[0].tensors)
        here = [state.to(CPU) for state in memory.states]
        settings = {"method": "sft", "lr": 1e-2}
        with memory.adapt([text], settings) as adapted:
            losses = [entry["actor/ntp_loss"] for entry in adapted.history]
            written = adapted.generate(max_new_tokens=4, stop_tokens=())
        with refine_verl.adapt(memory.model, [text], settings, states=here) as adapted:
            assert [entry["actor/ntp_loss"] for entry in adapted.history] == losses
        return [answer.tokens for answer in answers], written, [answer.log_probs for answer in answers], losses

    assert_equal(*on_both(run))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("selection", ["entropy", "surprise", "query"])
def test_the_analysis_of_inspect(family: str, selection: str) -> None:
    tokens, nsp = documents_of((51,)).tokens[0].tolist(), replace(NSP, selection=selection)
    if selection == "surprise" and (family == "lact" or "segments" in family):
        with pytest.raises(ConfigError, match="surprise looks at"):
            analyse(actor_of(family, DEVICE), tokens, nsp, seed=0)
        return
    there, here = (vars(analyse(actor_of(family, device), tokens, nsp, seed=0)) for device in (DEVICE, CPU))
    assert there.keys() == here.keys()
    for name in there:
        if here[name] is None:
            assert there[name] is None and name == "score" and selection == "entropy"
            continue
        got, wanted = (pytree.tree_flatten(plain(result[name])) for result in (there, here))
        assert got[1] == wanted[1]
        assert got[0] == pytest.approx(wanted[0], rel=1e-9, abs=CLOSE, nan_ok=True)


def plain(value: Any) -> Any:
    """Lists, dictionaries and numbers."""
    if isinstance(value, list):
        return [plain(part) for part in value]
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


# Negative controls


@pytest.mark.parametrize("family", IN_PIECES)
def test_an_index_left_on_the_cpu_fails(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    actor, documents = actor_of(family, DEVICE), documents_on(DEVICE, LENGTHS["unequal"])
    rollout(actor, documents)
    monkeypatch.setattr(Cuts, "tensor", lambda self, key, make: make())
    monkeypatch.setattr(_Move, "of", classmethod(lambda cls, index, device: cls(index.clamp(min=0), None)))
    with pytest.raises(RuntimeError, match="same device"):
        rollout(actor, documents)


def test_a_weight_left_on_the_cpu_fails(family: str) -> None:
    actor, documents = actor_of(family, DEVICE), documents_on(DEVICE, LENGTHS["equal"])
    norm = actor.base_model.norm
    norm.weight = torch.nn.Parameter(norm.weight.detach().cpu())
    with pytest.raises(RuntimeError, match="same device"):
        score(actor, documents)


def test_other_weights_are_not_equal() -> None:
    there = update(actor_of("delta_net", DEVICE), documents_on(DEVICE, LENGTHS["equal"]))
    other = update(actor_of("gated_deltanet", CPU), documents_on(CPU, LENGTHS["equal"]))
    with pytest.raises(AssertionError):
        assert_equal(there["result"], brought(other["result"]))
