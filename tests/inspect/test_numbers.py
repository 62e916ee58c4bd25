"""The numbers on the page are those of the actor, of the plain model and of the formulas written out again."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import nsp as reference
from torch import Tensor
from transformers import AutoModelForCausalLM

from refine_verl.config import NSPSettings
from refine_verl.inspect.analysis import Rollout
from refine_verl.inspect.page import render
from refine_verl.inspect.view import View
from refine_verl.models import Documents, RolloutBatch, RolloutDraws, load_model, make_actor, snapshot_count
from refine_verl.nsp import SelectionInputs
from refine_verl.record.format import format_number

KEYS = ("refine.nsp.chunks=3", "refine.nsp.rollout_length=4", "refine.nsp.reward=hybrid")
NSP = NSPSettings(chunks=3, rollout_length=4, rollouts_per_position=4, reward="hybrid")


@pytest.fixture(scope="module")
def view(look: Callable[..., View]) -> View:
    return look(*KEYS)


@pytest.fixture(scope="module")
def logits(model_dir: Path, view: View) -> Tensor:
    """Of the plain Hugging Face model, [T, V]."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    with torch.no_grad():
        return model(torch.tensor([view.inspection.tokens])).logits[0].double()


def roll_out(model_dir: Path, tokens: list[int], seed: int) -> RolloutBatch:
    """The actor, called directly."""
    actor = make_actor(load_model(model_dir).eval())
    documents = Documents.from_tensors(torch.tensor([tokens]), [len(tokens)])
    draws, snapshots = RolloutDraws.of(seed, 0, [0], NSP), snapshot_count(NSP.chunks, len(tokens))
    return actor(mode="rollout", documents=documents, nsp=NSP, draws=draws, snapshots=snapshots)


def expected_cells(batch: RolloutBatch) -> list[list[list[str]]]:
    """[c][n] rows of cells: log p, cosine, binary, hybrid, advantage."""
    target = batch.target_hidden[0][:, None].double()
    cosine = F.cosine_similarity(batch.predicted_hidden[0].double(), target, dim=-1).mean(-1).numpy()
    binary = (batch.tokens[0] == batch.target_tokens[0][:, None]).double().mean(-1).numpy()
    hybrid = cosine + binary
    advantage = (hybrid - hybrid.mean()) / (hybrid.std(ddof=1) + 1e-6)
    log_probs = batch.log_probs[0].sum(-1).double().numpy()
    table = np.stack([log_probs, cosine, binary, hybrid, advantage], axis=-1)
    return [
        [[*(format_number(v) for v in row[:4]), ("+" if row[4] > 0 else "") + format_number(row[4])] for row in rows]
        for rows in table
    ]


def cells_of(page: ET.Element) -> list[list[list[str]]]:
    cards = [card for card in page.iter("section") if (card.get("id") or "").startswith("p")]
    found = []
    for card in cards:
        rows = card.findall(".//tbody/tr")[1:]
        found.append([["".join(cell.itertext()) for cell in row.findall("td")[1:]] for row in rows])
    return found


def page_of(view: View) -> ET.Element:
    return ET.fromstring(render(view).removeprefix("<!DOCTYPE html>\n"))


def close(shown: list[list[list[str]]], wanted: list[list[list[str]]]) -> bool:
    """Equal but for the last of four digits: float32 sums may be off by one rounding."""
    numbers = [
        np.array([[[float(cell.replace("−", "-")) for cell in r] for r in p] for p in t]) for t in (shown, wanted)
    ]
    return numbers[0].shape == numbers[1].shape and np.allclose(*numbers, rtol=2e-3, atol=2e-4)


def test_the_page_shows_what_the_actor_returns(view: View, model_dir: Path) -> None:
    batch = roll_out(model_dir, view.inspection.tokens, seed=0)
    assert [position.index for position in view.inspection.positions] == batch.positions[0].tolist()
    assert [[r.tokens for r in p.rollouts] for p in view.inspection.positions] == batch.tokens[0].tolist()
    assert [p.target for p in view.inspection.positions] == batch.target_tokens[0].tolist()
    shown = cells_of(page_of(view))
    assert len(shown) == 3 and len(shown[0]) == 4
    assert close(shown, expected_cells(batch))


def test_other_random_numbers_are_not_those_of_the_page(view: View, model_dir: Path) -> None:
    """Negative control of the comparison above."""
    batch = roll_out(model_dir, view.inspection.tokens, seed=1)
    assert not close(cells_of(page_of(view)), expected_cells(batch))


def test_entropy_and_loss_are_those_of_the_plain_model(view: View, logits: Tensor) -> None:
    seen, log_p = view.inspection, torch.log_softmax(logits, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1)[:-1]
    surprise = -log_p[:-1].gather(1, torch.tensor(seen.tokens[1:])[:, None])[:, 0]
    assert np.isnan([seen.entropy[0], seen.smoothed[0], seen.surprise[0]]).all()
    torch.testing.assert_close(torch.tensor(seen.entropy[1:]).double(), entropy, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(seen.surprise[1:]).double(), surprise, rtol=1e-4, atol=1e-4)
    assert seen.correct[1:] == (logits.argmax(-1)[:-1] == torch.tensor(seen.tokens[1:])).tolist()
    assert entropy.std() > 0.1  # a shift by one token would show
    assert not np.allclose(seen.entropy[2:], entropy[:-1], rtol=1e-2)


def test_smoothing_and_chances_written_out(view: View) -> None:
    seen, window = view.inspection, 4
    for j in (1, 2, 10, len(seen.tokens) - 1):
        near = seen.entropy[max(j - window // 2, 1) : j + (window - 1) // 2 + 1]
        assert seen.smoothed[j] == pytest.approx(sum(near) / len(near), abs=1e-9)
    assert seen.chunks[0][0] == 0 and seen.chunks[-1][1] == len(seen.tokens) - 4
    for start, stop in seen.chunks:
        weights = np.exp(seen.smoothed[start + 1 : stop + 1])  # the first predicted token is the uncertain one
        assert seen.chance[start:stop] == pytest.approx(weights / weights.sum(), rel=1e-9)
    assert sum(seen.chance[seen.chunks[-1][1] :]) == 0


@pytest.mark.parametrize("selection", ["uniform", "max_entropy", "min_entropy"])
def test_chances_of_other_selections(look: Callable[..., View], selection: str) -> None:
    seen = look(*KEYS, f"refine.nsp.selection={selection}").inspection
    for (start, stop), position in zip(seen.chunks, seen.positions, strict=True):
        wanted = 1 / (stop - start) if selection == "uniform" else 1.0
        assert seen.chance[position.index] == pytest.approx(wanted)
        assert sum(seen.chance[start:stop]) == pytest.approx(1.0)


def scores_of_the_plain_model(model_dir: Path, tokens: list[int], selection: str) -> list[float]:
    """Token by token, by Hugging Face's own calls: how far the states move, or how hidden states resemble the end."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    ids = torch.tensor([tokens])
    with torch.no_grad():
        if selection == "query":
            hidden = model.base_model(ids).last_hidden_state[0].double()
            return reference.resemblance(hidden.tolist(), 9)
        cache, before, norms = None, None, []
        for t in range(len(tokens)):
            output = model.base_model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            after = [layer["recurrent_state"].double().clone() for layer in cache]
            steps = after if before is None else [b - a for a, b in zip(before, after, strict=True)]
            norms.append([step.norm().item() for step in steps])
            before = after
    return reference.surprise(list(zip(*norms, strict=True)))


@pytest.mark.parametrize("selection", ["surprise", "query"])
def test_scores_are_those_of_the_plain_model(look: Callable[..., View], model_dir: Path, selection: str) -> None:
    more = ["refine.nsp.question_tokens=9"] if selection == "query" else []
    seen = look(*KEYS, f"refine.nsp.selection={selection}", *more)
    tokens = seen.inspection.tokens
    scores = scores_of_the_plain_model(model_dir, tokens, selection)
    smoothed = reference.smooth_entropies(reference.standardised(scores), 4)
    assert seen.inspection.score[1:] == pytest.approx(smoothed[1:], abs=2e-3)
    assert max(np.abs(np.diff(smoothed[1:]))) > 0.1  # a shift by one token would show
    chances = reference.chunk_probabilities(reference.standardised(scores), 3, 4, "prediction", 1.0, 4)
    for chance in chances:
        assert [seen.inspection.chance[t] for t in chance] == pytest.approx(list(chance.values()), rel=1e-2)
    name = {"surprise": "rewriting of the fast weights", "query": "resemblance to the end"}[selection]
    levels = [seen.level(index) for index in range(1, len(tokens))]
    assert np.corrcoef(levels, smoothed[1:])[0, 1] > 0.95 and len(set(levels)) > 5
    assert f" · {name} " in seen.facts(5) and name not in look(*KEYS).facts(5)
    page = render(seen)
    assert f"Smoothed {name}, standard deviations from the mean: " in page and "Smoothed entropy, nats" not in page


def first_positions(inputs: SelectionInputs) -> list[int]:
    """A strategy that disregards the chunks."""
    return list(range(len(inputs.chunks)))


def test_no_chance_is_shown_for_a_strategy_of_a_users(look: Callable[..., View]) -> None:
    seen = look(*KEYS, f"refine.nsp.selection={__name__}.first_positions")
    assert seen.inspection.chance is None
    assert [position.index for position in seen.inspection.positions] == list(range(len(seen.inspection.chunks)))
    assert "chosen" not in seen.facts(1) and "chosen with" not in render(seen)


def test_anchor_token_weighs_the_last_token_of_the_prefix(look: Callable[..., View]) -> None:
    seen = look(*KEYS, "refine.nsp.anchor=token", "refine.nsp.selection=max_entropy").inspection
    start, stop = seen.chunks[1]
    assert seen.positions[1].index == start + int(np.argmax(seen.smoothed[start:stop]))


def test_seeds_reproduce_and_differ(look: Callable[..., View], view: View) -> None:
    assert render(look(*KEYS)) == render(view)
    assert render(look(*KEYS, "seed=7")) != render(view)


def test_groups_by_position(look: Callable[..., View]) -> None:
    seen = look(*KEYS, "refine.nsp.group=position").inspection
    for position in seen.positions:
        assert sum(rollout.advantage for rollout in position.rollouts) == pytest.approx(0, abs=1e-9)


def test_advantages_may_be_left_undivided(look: Callable[..., View]) -> None:
    seen = look(*KEYS, "norm_adv_by_std_in_grpo=false")
    rewards = np.array([rollout.rewards[seen.reward] for rollout in seen.inspection.rollouts])
    shown = [rollout.advantage for rollout in seen.inspection.rollouts]
    assert shown == pytest.approx(rewards - rewards.mean(), abs=1e-6) and rewards.std() > 1e-3
    assert "less their mean" in render(seen) and "standardised" not in render(seen)


def test_credit_per_token_is_shown_for_each_token(look: Callable[..., View], view: View) -> None:
    seen = look(*KEYS, "refine.nsp.credit=token")
    firsts = [(one.advantages[0], other.advantages[0]) for one, other in _both(seen, view)]
    assert all(len(set(rollout.advantages)) > 1 for rollout in seen.inspection.rollouts)
    # the first token is credited with all that its rollout earned
    assert [one for one, _ in firsts] == pytest.approx([other for _, other in firsts], rel=1e-3, abs=1e-4)
    assert "advantage" in render(seen) and render(seen).count('title="advantage ') == sum(
        len(rollout.tokens) for rollout in seen.inspection.rollouts
    )
    assert 'title="advantage ' not in render(view)


def _both(one: View, other: View) -> zip[tuple[Rollout, Rollout]]:
    return zip(one.inspection.rollouts, other.inspection.rollouts, strict=True)


def test_recomputed_prefixes_say_the_same(look: Callable[..., View], view: View) -> None:
    slow = look(*KEYS, "refine.nsp.rollout=prefix").inspection
    assert [r.tokens for r in slow.rollouts] == [r.tokens for r in view.inspection.rollouts]
    assert [r.rewards["cosine"] for r in slow.rollouts] == pytest.approx(
        [r.rewards["cosine"] for r in view.inspection.rollouts], rel=1e-3
    )
