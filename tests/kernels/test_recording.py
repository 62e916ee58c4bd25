"""States inside a pass, looked up after it, against passes that end there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from refine_verl.kernels import conv as conv_kernels
from refine_verl.kernels import cpu_kernels, delta_rule
from refine_verl.kernels.cuts import Cuts, Places
from refine_verl.kernels.operators import recorded, recorded_convolution
from refine_verl.kernels.recording import record_states

# as the models call them: outside a session with cuts they are the stand-ins themselves
chunk_delta_rule = recorded(delta_rule.chunk_delta_rule)
chunk_gated_delta_rule = recorded(delta_rule.chunk_gated_delta_rule)
causal_conv1d = recorded_convolution(conv_kernels.causal_conv1d)

HEADS, KEYS, VALUES, WIDTH = 2, 5, 3, 4
LENGTHS = {"one": [150], "equal": [128, 128], "unequal": [70, 1, 140, 64]}
Call = Callable[[dict[str, Tensor], Tensor | None], Tensor]


def delta(x: dict[str, Tensor], bounds: Tensor | None) -> Tensor:
    return chunk_delta_rule(
        x["q"], x["k"], x["v"], x["beta"].sigmoid(), use_qk_l2norm_in_kernel=True, output_final_state=True,
        initial_state=x["state"], cu_seqlens=bounds,
    )[1]  # fmt: skip


def gated(x: dict[str, Tensor], bounds: Tensor | None) -> Tensor:
    return chunk_gated_delta_rule(
        x["q"], x["k"], x["v"], g=-x["g"].exp(), beta=x["beta"].sigmoid(), use_qk_l2norm_in_kernel=True,
        output_final_state=True, initial_state=x["state"], cu_seqlens=bounds,
    )[1]  # fmt: skip


def gated_value_first(x: dict[str, Tensor], bounds: Tensor | None) -> Tensor:
    return chunk_gated_delta_rule(
        x["q"], x["k"], x["v"], g=-x["g"].exp(), beta=x["beta"].sigmoid(), output_final_state=True,
        initial_state=x["state"].mT, cu_seqlens=bounds, state_v_first=True,
    )[1]  # fmt: skip


def conv(x: dict[str, Tensor], bounds: Tensor | None) -> Tensor:
    return causal_conv1d(
        x["x"], x["weight"], activation="silu", initial_state=x["tail"], output_final_state=True, cu_seqlens=bounds
    )[1]


@pytest.fixture(autouse=True)
def stand_ins() -> Iterator[None]:
    with cpu_kernels():
        yield


PER_TOKEN = ("q", "k", "v", "g", "beta", "x")


def make_inputs(lengths: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    total, count = sum(lengths), len(lengths)
    shapes = {
        "q": (1, total, HEADS, KEYS),
        "k": (1, total, HEADS, KEYS),
        "v": (1, total, HEADS, VALUES),
        "beta": (1, total, HEADS),
        "g": (1, total, HEADS),
        "x": (1, total, 6),
        "state": (count, HEADS, KEYS, VALUES),
        "tail": (count, 6, WIDTH),
        "weight": (6, WIDTH),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in shapes.items()
    }


def in_rows(x: dict[str, Tensor], lengths: list[int]) -> tuple[dict[str, Tensor], Tensor | None]:
    """Sequences of one length are rows, others are packed, as the models get them."""
    if len(set(lengths)) == 1:
        rows = {name: x[name].view(len(lengths), lengths[0], *x[name].shape[2:]) for name in PER_TOKEN}
        return {**x, **rows}, None
    return x, torch.tensor([0, *lengths]).cumsum(0)


def up_to(x: dict[str, Tensor], lengths: list[int], sequence: int, position: int) -> dict[str, Tensor]:
    """The inputs of one sequence up to and with one token."""
    start = sum(lengths[:sequence])
    tokens = {name: x[name][:, start : start + position + 1] for name in PER_TOKEN}
    rows = {name: x[name][sequence : sequence + 1] for name in ("state", "tail")}
    return {**tokens, **rows, "weight": x["weight"]}


def queries(lengths: list[int]) -> tuple[list[int], list[int]]:
    pairs = [
        (b, t)
        for b, length in enumerate(lengths)
        for t in sorted({0, 1, 62, 63, 64, 65, 100, length - 1})
        if t < length
    ]
    return [b for b, _ in pairs], [t for _, t in pairs]


def cuts_of(how: str, lengths: list[int]) -> Cuts | None:
    device = torch.device("cpu")
    return None if how == "kept" else Cuts.even(lengths, int(how[-1]), device)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("call", [delta, gated, gated_value_first, conv])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("how", ["kept", "cut in 1", "cut in 2", "cut in 3", "cut in 5"])
def test_states_are_those_of_shorter_passes(call: Call, lengths: list[int], grad: bool, how: str) -> None:
    x = make_inputs(lengths)
    sequences, positions = queries(lengths)
    with torch.set_grad_enabled(grad), record_states(cuts_of(how, lengths)) as recorder:
        final = call(*in_rows(x, lengths))
        got = recorder.at(final, Places(tuple(sequences), tuple(positions)))
    wanted = torch.cat([call(up_to(x, lengths, b, t), None) for b, t in zip(sequences, positions, strict=True)])
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(got[0], wanted[1])  # the next state is another one
    if not grad:
        return
    # with a gradient to the final states as well: the two ways have to add up
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    names = [
        name
        for name in x
        if torch.autograd.grad(got.sum(), x[name], retain_graph=True, allow_unused=True)[0] is not None
    ]
    assert len(names) >= 2  # q, for one, has no say in the states
    ends = torch.cat([call(up_to(x, lengths, b, length - 1), None) for b, length in enumerate(lengths)])
    inputs = [x[name] for name in names]
    got_grads = torch.autograd.grad((got * weights).sum() + final.square().sum(), inputs)
    wanted_grads = torch.autograd.grad((wanted * weights).sum() + ends.square().sum(), inputs, materialize_grads=True)
    for name, a, b in zip(names, got_grads, wanted_grads, strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm(), name


def test_every_state_of_a_sequence() -> None:
    """Through all chunk borders: no position is special."""
    lengths = [130, 67]
    x = make_inputs(lengths)
    with torch.no_grad(), record_states() as recorder:
        final = delta(*in_rows(x, lengths))
        got = recorder.at(final, Places((0,) * 130, tuple(range(130))))
        differences = [(b - a).norm() for a, b in pairwise(got)]
        torch.testing.assert_close(got[-1], final[0], rtol=1e-12, atol=1e-12)
    assert all(difference > 0 for difference in differences)


def test_only_what_was_recorded_is_known() -> None:
    x = make_inputs([10])
    with torch.no_grad():
        outside = delta(*in_rows(x, [10]))
        with record_states() as recorder:
            inside = delta(*in_rows(x, [10]))
    assert recorder.covers(inside) and not recorder.covers(outside) and not recorder.covers(inside.clone())
    with pytest.raises(KeyError):
        recorder.at(outside, Places((0,), (0,)))


@pytest.mark.parametrize("call", [delta, gated, conv])
def test_gradients_of_states_arrive_once(call: Call) -> None:
    """Taken twice, differentiated twice: what one backward pass collected is not there for the next."""
    lengths = [100, 70]
    x = make_inputs(lengths)
    name = "x" if call is conv else "k"

    def gradients(times: int) -> list[Tensor]:
        with record_states() as recorder:
            final = call(*in_rows(x, lengths))
            got = [recorder.at(final, Places((0, 1), (66, 40))) for _ in range(times)]
        loss = sum((state.square().sum() for state in got), torch.zeros(()))
        return [torch.autograd.grad(loss, x[name], retain_graph=True)[0] for _ in range(2)]

    once, again = gradients(1)
    assert once.count_nonzero() > 0
    torch.testing.assert_close(again, once)
    torch.testing.assert_close(gradients(2)[0], 2 * once)


@pytest.mark.parametrize("shape", [(1, 150, HEADS), (1, HEADS, 150), (1, 150), (1, 300, HEADS)])
def test_a_per_token_argument_that_is_not_known_is_refused(shape: tuple[int, ...]) -> None:
    """A later fla may have one, for every token or for each of its steps (here 2): it must not pass uncut."""

    def operator(q: Tensor, k: Tensor, v: Tensor, news: Tensor, output_final_state: bool) -> tuple[Tensor, Tensor]:
        return v, v[:, -1]

    x = make_inputs([150])
    call = recorded(operator)
    news = torch.zeros(shape)
    if shape[1] == 300:
        x["k"] = torch.cat([x["k"], x["k"]], dim=1)
    assert call(x["q"], x["k"], x["v"], news=news, output_final_state=True)[0] is x["v"]
    with record_states(cuts_of("cut in 2", [150])):
        with pytest.raises(RuntimeError, match=r"operator has an argument 'news' with an entry for every token"):
            call(x["q"], x["k"], x["v"], news=news, output_final_state=True)
        with pytest.raises(RuntimeError, match="refine.nsp.rollout=prefix"):
            call(q=x["q"], k=x["k"], v=x["v"], news=news, output_final_state=True)


def test_pieces_are_even_aligned_and_shared() -> None:
    cuts = Cuts.even([300, 70, 130], 3, torch.device("cpu"))
    assert cuts.starts == [(0, 128, 256), (0,), (0, 128)]
    assert [piece.documents for piece in cuts.pieces] == [(0, 1, 2), (0, 2), (0,)]
    assert [piece.lengths for piece in cuts.pieces] == [(128, 70, 128), (128, 2), (44,)]
    assert Cuts.even([20], 4, torch.device("cpu")).starts == [(0,)]


@pytest.mark.parametrize("how, calls", [("cut in 1", 2), ("cut in 2", 3), ("cut in 5", 4)])
def test_calls_of_an_operator(how: str, calls: int) -> None:
    """One a piece, and one for all the states."""
    made = []

    def counted(**options: object) -> tuple[Tensor, Tensor | None]:
        made.append(options)
        return delta_rule.chunk_delta_rule(**options)

    x = make_inputs([150])
    names = ("q", "k", "v", "beta")
    with torch.no_grad(), record_states(cuts_of(how, [150])) as recorder:
        _, final = recorded(counted)(**{name: x[name] for name in names}, output_final_state=True)
        recorder.at(final, Places(*map(tuple, queries([150]))))
    assert len(made) == calls
