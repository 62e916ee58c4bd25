from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import nsp as reference
from scipy.stats import chisquare

from refine_verl.config import ConfigError, NSPSettings
from refine_verl.nsp import (
    SCORES,
    STRATEGIES,
    SelectionInputs,
    check_functions,
    chunk_bounds,
    drawn_by,
    looks_at_writes,
    needs_writes,
    position_uniforms,
    register_selection,
    selection_inputs,
    smooth_token_entropy,
)
from refine_verl.nsp import select_positions as select
from refine_verl.nsp.selection import SELECTIONS

# Documents; with three chunks each that is 30 000 draws.
DRAWS = 10_000


def select_positions(
    entropy: torch.Tensor,
    *,
    uniforms: object,
    strategy: str = "entropy",
    temperature: float = 1.0,
    window: int | None = None,
    hidden: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
    write_norms: torch.Tensor | None = None,
    **settings: object,
) -> torch.Tensor:
    nsp = NSPSettings(
        selection=strategy,
        entropy_temperature=temperature,
        smoothing_window=window,
        **settings,  # type: ignore[arg-type]
    )
    return select(entropy, nsp, uniforms, hidden=hidden, tokens=tokens, write_norms=write_norms)  # type: ignore[arg-type]


def counts(entropy: torch.Tensor, documents: int = DRAWS, **settings: object) -> np.ndarray:
    """How often each position is chosen, over the uniforms of many documents: int `[T]`."""
    chosen = np.zeros(len(entropy), dtype=np.int64)
    chunks = int(settings["chunks"])  # type: ignore[call-overload]
    for document in range(documents):
        draws = position_uniforms(7, 3, document, chunks)
        np.add.at(chosen, select_positions(entropy, uniforms=draws, **settings).numpy(), 1)  # type: ignore[arg-type]
    return chosen


@pytest.fixture(scope="module")
def entropy() -> torch.Tensor:
    return 2 * torch.rand(17, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def chi_square_p(observed: np.ndarray, probabilities: list[dict[int, float]]) -> float:
    """Smallest p-value over the chunks, and no position outside them was ever chosen."""
    p_values = []
    for chunk in probabilities:
        expected = np.array(list(chunk.values())) * DRAWS
        p_values.append(chisquare(observed[list(chunk)], expected).pvalue)
    assert observed.sum() == DRAWS * len(probabilities)
    assert observed[[t for chunk in probabilities for t in chunk]].sum() == observed.sum()
    return float(min(p_values))


@pytest.mark.parametrize("anchor", ["prediction", "token"])
def test_entropy_strategy_draws_from_eq_6(entropy: torch.Tensor, anchor: str) -> None:
    settings = {"chunks": 3, "rollout_length": 3, "anchor": anchor, "temperature": 0.5, "window": 2}
    observed = counts(entropy, strategy="entropy", **settings)
    expected = reference.chunk_probabilities(entropy.tolist(), 3, 3, anchor, 0.5, 2)
    assert chi_square_p(observed, expected) > 1e-3
    # Negative controls: another temperature, anchor or window is told apart.
    other = {"prediction": "token", "token": "prediction"}[anchor]
    for wrong in ((anchor, 0.6, 2), (other, 0.5, 2), (anchor, 0.5, 3)):
        assert chi_square_p(observed, reference.chunk_probabilities(entropy.tolist(), 3, 3, *wrong)) < 1e-6


def test_uniform_strategy_is_uniform_within_each_chunk(entropy: torch.Tensor) -> None:
    observed = counts(entropy, strategy="uniform", chunks=3, rollout_length=3)
    expected = [{t: 1 / (b - a) for t in range(a, b)} for a, b in chunk_bounds(14, 3)]
    assert chi_square_p(observed, expected) > 1e-3
    assert chi_square_p(observed, reference.chunk_probabilities(entropy.tolist(), 3, 3, "token", 2.0, 3)) < 1e-6


@pytest.mark.parametrize(("strategy", "pick"), [("max_entropy", max), ("min_entropy", min)])
def test_extreme_strategies_ignore_the_draws(entropy: torch.Tensor, strategy: str, pick: object) -> None:
    observed = counts(entropy, 50, strategy=strategy, chunks=3, rollout_length=3, window=2)
    smoothed = reference.smooth_entropies(entropy.tolist(), 2)
    best = [pick(range(a, b), key=lambda t: smoothed[t + 1]) for a, b in chunk_bounds(14, 3)]  # type: ignore[operator]
    assert observed[best].tolist() == [50, 50, 50]
    assert observed.sum() == 150


@pytest.mark.parametrize("strategy", ["max_entropy", "min_entropy"])
def test_ties_go_to_the_lowest_index(strategy: str) -> None:
    positions = select_positions(
        torch.ones(20), chunks=3, rollout_length=2, strategy=strategy, uniforms=[0.9, 0.9, 0.9]
    )
    assert positions.tolist() == [0, 6, 12]


def test_eq_6_by_hand() -> None:
    """H = ln 1, ln 2, ln 1 gives 1/4, 1/2, 1/4 at tau 1 and 1/6, 4/6, 1/6 at tau 1/2."""
    entropy = torch.tensor([math.nan, 0.0, math.log(2), 0.0])

    def choose(uniform: float, temperature: float) -> int:
        return int(
            select_positions(entropy, chunks=1, rollout_length=1, temperature=temperature, window=1, uniforms=[uniform])
        )

    assert [choose(u, 1.0) for u in (0.0, 0.249, 0.251, 0.749, 0.751, 1 - 2**-53)] == [0, 0, 1, 1, 2, 2]
    assert [choose(u, 0.5) for u in (0.0, 0.166, 0.167, 0.833, 0.834)] == [0, 0, 1, 1, 2]


def test_anchors_differ_by_one_place() -> None:
    """The uncertain token is the first one to be predicted, or the last one of the prefix."""
    entropy = torch.zeros(30)
    entropy[11] = 9.0
    found = {
        anchor: select_positions(
            entropy,
            chunks=1,
            rollout_length=4,
            strategy="max_entropy",
            anchor=anchor,
            window=1,
            uniforms=[0.0],
        ).item()
        for anchor in ("prediction", "token")
    }
    assert found == {"prediction": 10, "token": 11}


@pytest.mark.parametrize("strategy", ["entropy", "uniform"])
@pytest.mark.parametrize("anchor", ["prediction", "token"])
def test_first_and_last_valid_positions_are_reachable(strategy: str, anchor: str) -> None:
    settings = {"chunks": 2, "rollout_length": 5, "strategy": strategy, "anchor": anchor}
    entropy = torch.rand(23)
    lowest = select_positions(entropy, uniforms=[0.0, 0.0], **settings)  # type: ignore[arg-type]
    highest = select_positions(entropy, uniforms=[1 - 2**-53] * 2, **settings)  # type: ignore[arg-type]
    assert lowest.tolist() == [0, 9]
    assert highest.tolist() == [8, 17]  # 17 = T - 1 - k


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
@pytest.mark.parametrize("anchor", ["prediction", "token"])
@pytest.mark.parametrize(("chunks", "rollout_length"), [(1, 1), (1, 5), (8, 5)])
def test_shortest_document_leaves_no_choice(strategy: str, anchor: str, chunks: int, rollout_length: int) -> None:
    length = chunks + rollout_length
    positions = select_positions(
        torch.rand(length),
        chunks=chunks,
        rollout_length=rollout_length,
        strategy=strategy,
        anchor=anchor,
        uniforms=np.full(chunks, 0.999),
    )
    assert positions.dtype == torch.int64
    assert positions.tolist() == list(range(chunks))


def test_one_token_too_few_says_what_is_needed() -> None:
    with pytest.raises(ValueError, match=r"12 tokens is too short: at least 13 .*8 chunks plus 5 tokens"):
        select_positions(torch.rand(12), chunks=8, rollout_length=5, uniforms=np.zeros(8))


@pytest.mark.parametrize(("num_valid", "chunks"), [(1, 1), (10, 1), (10, 3), (11, 3), (8, 8), (16379, 8)])
def test_chunks_cover_everything_and_are_equal_up_to_one(num_valid: int, chunks: int) -> None:
    bounds = chunk_bounds(num_valid, chunks)
    assert [t for start, stop in bounds for t in range(start, stop)] == list(range(num_valid))
    sizes = [stop - start for start, stop in bounds]
    assert len(sizes) == chunks
    assert max(sizes) - min(sizes) <= 1


def test_chunks_cannot_be_empty() -> None:
    with pytest.raises(ValueError, match="3 valid positions cannot be split into 4"):
        chunk_bounds(3, 4)
    with pytest.raises(ValueError, match="chunks must be at least 1, got 0"):
        chunk_bounds(3, 0)


def test_window_defaults_to_the_rollout_length() -> None:
    entropy = torch.rand(60, generator=torch.Generator().manual_seed(0))
    settings = {"chunks": 2, "rollout_length": 6, "strategy": "max_entropy", "uniforms": [0.0, 0.0]}
    default = select_positions(entropy, **settings)  # type: ignore[arg-type]
    assert torch.equal(default, select_positions(entropy, window=6, **settings))  # type: ignore[arg-type]
    assert not torch.equal(default, select_positions(entropy, window=1, **settings))  # type: ignore[arg-type]


def test_extreme_temperature_and_broken_entropies_stay_valid() -> None:
    cold = torch.zeros(20)
    cold[7] = 1.0
    for uniform in (0.0, 0.999, 1 - 2**-53):  # all other positions have weight 0, those before it included
        positions = select_positions(cold, chunks=1, rollout_length=2, temperature=1e-300, window=1, uniforms=[uniform])
        assert positions.tolist() == [6]
    for broken in (math.nan, math.inf, -math.inf):
        positions = select_positions(torch.full((20,), broken), chunks=2, rollout_length=2, uniforms=[0.0, 1 - 2**-53])
        assert positions.tolist() == [0, 17]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"strategy": "max_entopy"},
            r"'max_entopy'. Allowed: entropy, max_entropy.*Did you mean 'max_entropy'",
        ),
        ({"anchor": "tokens"}, "Allowed: prediction, token. Did you mean 'token'"),
        ({"temperature": 0.0}, "greater than 0, got 0.0"),
        ({"temperature": math.nan}, "finite number"),
        ({"chunks": 0}, "chunks: must be at least 1, got 0"),
        ({"rollout_length": 0}, "rollout_length: must be at least 1, got 0"),
        ({"window": 0}, "window: must be at least 1, got 0"),
        ({"uniforms": [0.5]}, r"shape \[2\], one per chunk, got \[1\]"),
        ({"uniforms": [0.5, 1.0]}, r"\[0, 1\)"),
    ],
)
def test_bad_settings_are_refused(changed: dict[str, object], message: str) -> None:
    settings: dict[str, object] = {"chunks": 2, "rollout_length": 3, "uniforms": [0.1, 0.2]}
    with pytest.raises(ValueError, match=message):
        select_positions(torch.rand(20), **(settings | changed))  # type: ignore[arg-type]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SELECTIONS, "functions", dict(SELECTIONS.functions))


def test_users_register_a_strategy_that_sees_everything(registry: None, entropy: torch.Tensor) -> None:
    seen: list[SelectionInputs] = []

    @register_selection("last_of_chunk")
    def last_of_chunk(inputs: SelectionInputs) -> list[int]:
        seen.append(inputs)
        return [stop - 1 for _, stop in inputs.chunks]

    hidden, tokens = torch.randn(17, 4), torch.arange(17)
    positions = select_positions(
        entropy,
        chunks=3,
        rollout_length=3,
        strategy="last_of_chunk",
        anchor="token",
        temperature=0.5,
        window=2,
        uniforms=[0.1, 0.2, 0.3],
        hidden=hidden,
        tokens=tokens,
    )
    assert sorted(SELECTIONS.functions) == sorted([*STRATEGIES, *SCORES, "last_of_chunk"])
    assert positions.tolist() == [3, 8, 13] and positions.dtype == torch.int64
    (given,) = seen
    smoothed = smooth_token_entropy(entropy, 2)
    assert torch.equal(given.entropy, entropy) and torch.equal(given.smoothed, smoothed)
    assert torch.equal(given.weights, smoothed[:14])  # the anchor is the position's own token
    assert given.hidden is hidden and given.tokens is tokens
    assert given.uniforms.tolist() == [0.1, 0.2, 0.3] and given.temperature == 0.5 and given.rollout_length == 3
    with pytest.raises(ValueError, match="'entropy' already belongs to"):
        register_selection("entropy")(last_of_chunk)


def early(inputs: SelectionInputs) -> torch.Tensor:
    """The first c positions, whatever the chunks."""
    return torch.arange(len(inputs.chunks))


def test_users_name_a_strategy_by_its_path() -> None:
    for path in (f"{__name__}.early", f"{__name__}:early"):
        SELECTIONS.find(path)
        found = select_positions(torch.rand(20), chunks=4, rollout_length=3, strategy=path, uniforms=[0.0] * 4)
        assert found.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="unknown function in .* 'erly'.*Did you mean 'early'"):
        SELECTIONS.find(f"{__name__}.erly")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1, 2], r"of shape \[2\]; expected \[3\] positions"),
        ([1.0, 2.0, 3.0], "float32"),
        ([2, 2, 3], r"returned \[2, 2, 3\]; expected increasing positions in 0 ... 13"),
        ([-1, 2, 3], "increasing positions"),
        ([1, 2, 14], "increasing positions"),
    ],
)
def test_what_a_strategy_returns_is_checked(registry: None, returned: list[float], message: str) -> None:
    register_selection("mine")(lambda inputs: returned)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match=f"'mine' .*{message}"):
        select_positions(torch.rand(17), chunks=3, rollout_length=3, strategy="mine", uniforms=[0.0] * 3)


LENGTH = 40


def looked_at(question_tokens: int) -> tuple[dict[str, torch.Tensor], dict[str, list[float]]]:
    """What the strategies with a score of their own look at, and the scores written out."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(LENGTH, 6, generator=generator) + 3  # a mean that all of them share
    norms = torch.rand(3, LENGTH, generator=generator, dtype=torch.float64) * torch.tensor([[1.0], [100.0], [0.01]])
    scores = {
        "surprise": reference.surprise(norms.tolist()),
        "query": reference.resemblance(hidden.double().tolist(), question_tokens),
    }
    return {"hidden": hidden, "write_norms": norms}, scores


@pytest.mark.parametrize("anchor", ["prediction", "token"])
@pytest.mark.parametrize("window, temperature", [(1, 1.0), (4, 0.3)])
@pytest.mark.parametrize("strategy, question_tokens", [("surprise", 32), ("query", 7), ("query", 32)])
def test_scores_take_the_place_of_entropy(
    strategy: str, question_tokens: int, window: int, temperature: float, anchor: str
) -> None:
    about, scores = looked_at(question_tokens)
    settings = {"chunks": 3, "rollout_length": 4, "window": window, "anchor": anchor, "temperature": temperature}
    settings |= {"question_tokens": question_tokens} if strategy == "query" else {}
    names = {"window": "window", "temperature": "tau", "chunks": "chunks", "rollout_length": "rollout_length"}
    told = {names[key]: settings[key] for key in names} | {"anchor": anchor}
    wanted, other = (
        reference.chunk_probabilities(values, **told)  # type: ignore[arg-type]
        for values in (reference.standardised(scores[strategy]), scores[strategy])
    )
    entropy = torch.full((LENGTH,), math.nan)  # is not looked at
    found, unlike = [], []
    for uniform in np.random.default_rng(0).random(97):  # no round numbers: equal chances have borders there
        positions = select_positions(entropy, uniforms=[uniform] * 3, strategy=strategy, **about, **settings)  # type: ignore[arg-type]
        found.append(positions.tolist())
        assert found[-1] == [reference.place_of(uniform, chances) for chances in wanted]
        unlike.append([reference.place_of(uniform, chances) for chances in other])
    assert found != unlike  # scores that are not standardised are drawn otherwise


def test_scores_of_one_height_are_drawn_evenly() -> None:
    about = {"hidden": torch.ones(LENGTH, 6), "write_norms": torch.zeros(2, LENGTH)}
    for strategy in SCORES:
        inputs = selection_inputs(torch.rand(LENGTH), NSPSettings(selection=strategy), np.zeros(8), **about)
        assert torch.equal(drawn_by(strategy, inputs), torch.zeros(LENGTH, dtype=torch.float64))
        top = select_positions(
            torch.rand(LENGTH), uniforms=[0.999], strategy=strategy, chunks=1, rollout_length=4, **about
        )
        assert top.tolist() == [LENGTH - 5]


def test_what_nobody_gave_is_missed() -> None:
    for strategy, message in (("surprise", "norms of what each token writes"), ("query", "needs hidden states")):
        with pytest.raises(ValueError, match=message):
            select_positions(torch.rand(LENGTH), strategy=strategy, uniforms=np.zeros(8))


def test_the_question_is_at_most_half_of_a_prompt() -> None:
    for asked, length, first in ((32, 40, 20), (7, 40, 33), (1, 13, 12), (99, 13, 7)):
        nsp = NSPSettings(selection="query", question_tokens=asked)
        assert selection_inputs(torch.rand(length), nsp, np.zeros(8)).question == first


def test_users_ask_for_writes(registry: None) -> None:
    @register_selection("most_written")
    @needs_writes
    def most_written(inputs: SelectionInputs) -> list[int]:
        assert inputs.write_norms is not None
        return [start + int(inputs.write_norms[0, start:stop].argmax()) for start, stop in inputs.chunks]

    asks = {name: looks_at_writes(NSPSettings(selection=name)) for name in SELECTIONS.functions}
    assert [name for name, writes in asks.items() if writes] == ["surprise", "most_written"]
    norms = torch.rand(2, LENGTH)
    found = select_positions(torch.rand(LENGTH), strategy="most_written", uniforms=np.zeros(8), write_norms=norms)
    assert found.tolist() == [start + int(norms[0, start:stop].argmax()) for start, stop in chunk_bounds(35, 8)]


# Before a run

MODULE = "my_selections_for_test"
STRATEGIES_OF_A_USER = """
import math
import torch

from refine_verl.nsp import needs_writes


def first_of_each(inputs):
    return [start for start, _ in inputs.chunks]


@needs_writes
def most_written(inputs):
    assert inputs.write_norms.shape[1] == len(inputs.tokens) == len(inputs.hidden)
    return torch.stack([start + inputs.write_norms[:, start:stop].sum(dim=0).argmax() for start, stop in inputs.chunks])


def wide(inputs):
    return torch.sort((inputs.hidden @ torch.ones(24)).topk(len(inputs.chunks)).indices.clamp(max=900)).values


def too_few(inputs):
    return first_of_each(inputs)[:-1]


def floats(inputs):
    return torch.tensor(first_of_each(inputs)).float()


def not_a_number(inputs):
    return torch.full((len(inputs.chunks),), math.nan)


def truths(inputs):
    return torch.ones(len(inputs.chunks), dtype=torch.bool)


def behind_the_end(inputs):
    return [*first_of_each(inputs)[:-1], len(inputs.entropy) - inputs.rollout_length]


def before_the_start(inputs):
    return [-1, *first_of_each(inputs)[1:]]


def twice_the_same(inputs):
    return [3] * len(inputs.chunks)


def names(inputs):
    return ["first", "second"]


def nothing(inputs):
    pass


def without_arguments():
    return [0, 1]
"""


@pytest.fixture
def strategies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / f"{MODULE}.py").write_text(STRATEGIES_OF_A_USER)
    monkeypatch.syspath_prepend(tmp_path)
    return MODULE


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few", r"returned torch.int64 of shape \[1\]; expected \[2\] positions"),
        ("floats", r"returned torch.float32 of shape \[2\]; expected"),
        ("not_a_number", r"returned torch.float32 of shape \[2\]; expected"),
        ("truths", r"returned torch.bool of shape \[2\]; expected"),
        ("behind_the_end", r"returned \[0, 1021\]; expected increasing positions in 0 ... 1020"),
        ("before_the_start", r"returned \[-1, 510\]; expected increasing positions"),
        ("twice_the_same", r"returned \[3, 3\]; expected increasing positions"),
        ("names", r"returned a list that is no tensor of numbers"),
        ("nothing", r"returned a NoneType that is no tensor of numbers"),
        ("without_arguments", r"raised TypeError: without_arguments\(\) takes 0 positional arguments"),
    ],
)
def test_a_strategy_is_tried_out_before_a_run(strategies: str, name: str, message: str) -> None:
    """It is refused with its key, its name and path, what is wrong with it, and what to do."""
    nsp = NSPSettings(chunks=2, rollout_length=3, selection=f"{strategies}.{name}")
    path = rf"selection strategy '{strategies}.{name}' \({strategies}.{name}\)"
    cure = "tried out on a made-up document. Return refine.nsp.chunks=2 .*, or name another strategy: entropy"
    with pytest.raises(ConfigError, match=f"refine.nsp.selection: {path} {message}.*{cure}") as caught:
        check_functions(nsp, hidden_size=16)
    assert caught.value.key == "refine.nsp.selection"


@pytest.mark.parametrize("shape", [(2, 3), (1, 1), (600, 5)])
@pytest.mark.parametrize("name", ["first_of_each", "most_written"])
def test_a_good_strategy_is_not_refused(strategies: str, name: str, shape: tuple[int, int]) -> None:
    chunks, length = shape
    check_functions(NSPSettings(chunks=chunks, rollout_length=length, selection=f"{strategies}.{name}"), 16, layers=3)


def test_a_strategy_may_need_the_models_own_width(strategies: str) -> None:
    """It gets it where the model is known, and is not blamed for what it raises where it is not."""
    nsp = NSPSettings(chunks=2, rollout_length=3, selection=f"{strategies}.wide")
    check_functions(nsp, hidden_size=24)
    check_functions(nsp)
    with pytest.raises(ConfigError, match="wide.* raised RuntimeError"):
        check_functions(nsp, hidden_size=16)
    with pytest.raises(ConfigError, match="no tensor of numbers"):
        check_functions(replace(nsp, selection=f"{strategies}.nothing"))
