"""Positions by what the fast weights say of a token: from the actor's own passes, against token-by-token reading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from models.conftest import make_config
from models.test_fork_equals_prefix import ADAPTERS, NSP, documents_of, short_pieces  # noqa: F401  the fixture
from reference import nsp as reference
from reference.toy import InSegments
from torch import Tensor

from refine_verl.config import ConfigError
from refine_verl.models import FastWeightActor, RolloutDraws, load_model, make_actor
from refine_verl.models.adapters import check_selection, get_adapter, known_model_types
from refine_verl.models.packing import Packed

Make = Callable[..., FastWeightActor]
LENGTHS = (40, 150, 33)
EXACT = 1e-9
"""Relative; everything is float64."""


def looked_at(actor: FastWeightActor, mode: str, **changed: object) -> tuple[Tensor, list[tuple[Any, ...]]]:
    """Positions, and what was known of each document when they were chosen."""
    nsp, documents = replace(NSP, **changed), documents_of(LENGTHS)
    seen: list[tuple[Any, ...]] = []
    select = actor.select

    def watched(*about: Any) -> Tensor:
        seen.append(about)
        return select(*about)

    actor.select = watched  # type: ignore[method-assign]
    draws = RolloutDraws.of(0, 1, range(len(LENGTHS)), nsp)
    result = actor(mode=mode, documents=documents, nsp=nsp, draws=draws, snapshots=24)
    return (result[0] if mode == "on_policy" else result).positions, seen


def written_token_by_token(actor: FastWeightActor) -> list[list[list[float]]]:
    """For each document, each layer of a model that never forgets: how far each token moved its states."""
    documents = documents_of(LENGTHS)
    found = []
    for b, length in enumerate(LENGTHS):
        state, before, norms = None, None, []
        for t in range(length):
            _, state = actor.run(Packed.of_rows(documents.tokens[b : b + 1, t : t + 1]), state, keep_state=True)
            after = [layer["recurrent_state"] for layer in state.tree]
            steps = after if before is None else [b - a for a, b in zip(before, after, strict=True)]
            norms.append([step.square().sum().sqrt().item() for step in steps])
            before = [layer.clone() for layer in after]
        found.append([list(layer) for layer in zip(*norms, strict=True)])
    return found


@pytest.mark.parametrize("family", ["delta_net"], indirect=True)
@pytest.mark.parametrize("adapter", ["trace", "pieces"])
def test_the_actor_knows_what_tokens_write(make: Make, adapter: str) -> None:
    actor = make(adapter=ADAPTERS[adapter]())
    with torch.no_grad():
        wanted = written_token_by_token(actor)
    _, seen = looked_at(actor, "rollout", selection="surprise")
    for about, norms in zip(seen, wanted, strict=True):
        torch.testing.assert_close(about[3], torch.tensor(norms, dtype=torch.float64), rtol=EXACT, atol=0)
        assert not torch.allclose(about[3][:, 1:], torch.tensor(norms, dtype=torch.float64)[:, :-1], rtol=0.01)


@pytest.mark.parametrize("adapter", ["trace", "pieces"])
@pytest.mark.parametrize("selection", ["surprise", "query"])
def test_every_way_of_reading_looks_at_the_same_places(make: Make, adapter: str, selection: str) -> None:
    how = {"selection": selection, "question_tokens": 6} if selection == "query" else {"selection": selection}
    positions, seen = looked_at(make(adapter=ADAPTERS[adapter]()), "rollout", **how)
    for mode, changed in (("on_policy", {}), ("rollout", {"rollout": "prefix"})):
        others, again = looked_at(make(adapter=ADAPTERS[adapter]()), mode, **how, **changed)
        assert torch.equal(others, positions), (mode, changed)
        for about, other in zip(seen, again, strict=True):
            for index in (1, 3) if selection == "surprise" else (1,):
                torch.testing.assert_close(other[index], about[index], rtol=EXACT, atol=1e-12)
    for about, chosen, length in zip(seen, positions.tolist(), LENGTHS, strict=True):
        score = (
            reference.surprise(about[3].tolist())
            if selection == "surprise"
            else reference.resemblance(about[1].tolist(), 6)
        )
        chances = reference.chunk_probabilities(reference.standardised(score), 3, 4, "prediction", 1.0, 4)
        draws = about[5].tolist()
        assert chosen == [reference.place_of(u, chance) for u, chance in zip(draws, chances, strict=True)], length


def test_writes_are_known_only_where_somebody_asks(make: Make) -> None:
    for selection in ("entropy", "query"):
        _, seen = looked_at(make(), "rollout", selection=selection)
        assert [about[3] for about in seen] == [None] * len(LENGTHS)


def test_layers_that_are_computed_again_say_the_same(make: Make) -> None:
    wanted, _ = looked_at(make(), "rollout", selection="surprise")
    for checkpointing in ("layer", "segment"):
        actor = make(activation_checkpointing=checkpointing)
        assert torch.equal(looked_at(actor, "on_policy", selection="surprise")[0], wanted)


def test_models_whose_writes_are_not_known_are_refused() -> None:
    known = []
    for model_type in known_model_types():
        try:
            check_selection(replace(NSP, selection="surprise"), get_adapter(model_type))
            known.append(model_type)
        except ConfigError as error:
            assert str(error).startswith("refine.nsp.selection: surprise looks at how strongly each token rewrites")
            assert "Set refine.nsp.selection=entropy" in str(error)
        check_selection(replace(NSP, selection="query"), get_adapter(model_type))
    assert known == ["delta_net", "gated_deltanet", "olmo_hybrid", "qwen3_5_text", "qwen3_next"]
    actor = make_actor(load_model(None, config=make_config("delta_net"), dtype=torch.float64), adapter=InSegments())
    with pytest.raises(ConfigError, match=r"refine\.nsp\.selection: surprise looks at"):
        looked_at(actor, "rollout", selection="surprise")
