"""What a step costs, counted: tokens put through the model, and bytes alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference.toy import InSegments, documents_of, draws_for
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from refine_verl.config import NSPSettings
from refine_verl.models import Branches, Documents, FastWeightActor, snapshot_count
from refine_verl.nsp.selection import SELECTIONS

Make = Callable[..., FastWeightActor]
NSP = NSPSettings(chunks=8, rollout_length=5)
LENGTH = 2048


def at_the_dearest_places(actor: FastWeightActor, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """Let selection choose the last token of a segment, the farthest from the state kept before it."""
    borders = [row[0] for row in documents_of([length]).even_cuts(snapshot_count(NSP.chunks, length))]
    last = torch.tensor([stop - 1 for stop in borders[1:]])
    valid = last[last <= length - 1 - NSP.rollout_length]
    per_chunk = [part[-1] for part in valid.chunk(NSP.chunks)]
    monkeypatch.setitem(SELECTIONS.functions, NSP.selection, lambda inputs: torch.stack(per_chunk))


def counted(actor: FastWeightActor, documents: Documents, nsp: NSPSettings) -> tuple[int, int]:
    """Tokens put through the model by the rollouts and by the update."""
    actor.forward_tokens = 0
    draws, snapshots = draws_for([0], nsp), snapshot_count(nsp.chunks, documents.lengths[0])
    rollouts = actor(mode="rollout", documents=documents, nsp=nsp, draws=draws, snapshots=snapshots)
    written = actor.forward_tokens
    branches = Branches(rollouts.positions, rollouts.tokens)
    output = actor(mode="update", documents=documents, branches=branches, nsp=nsp)
    trained = actor.forward_tokens - written
    (output["ntp_loss_sum"] + output["log_probs"].sum()).backward()
    return written, trained


def test_forking_costs_little_more_than_reading(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 1.15 passes over S for rollouts and 2.2 for a step, wherever the positions are."""
    actor, documents = make(adapter=InSegments()), documents_of([LENGTH])
    at_the_dearest_places(actor, monkeypatch, LENGTH)
    written, trained = counted(actor, documents, NSP)
    generated = NSP.chunks * NSP.rollout_length
    assert written == LENGTH + LENGTH // 8 + generated  # the whole of a segment is read again for each position
    assert trained == LENGTH + generated - NSP.chunks
    assert written <= 1.15 * LENGTH
    assert written + trained <= 2.2 * LENGTH


def test_where_the_kernels_keep_their_states_nothing_is_read_twice(make: Make) -> None:
    actor, documents = make(), documents_of([LENGTH])
    generated = NSP.chunks * NSP.rollout_length
    assert counted(actor, documents, NSP) == (LENGTH + generated, LENGTH + generated - NSP.chunks)


def test_recomputing_prefixes_costs_many_passes(make: Make) -> None:
    """The control of the count: the slow way is many times dearer."""
    nsp = NSPSettings(chunks=8, rollout_length=5, rollout="prefix")
    written, trained = counted(make(), documents_of([256]), nsp)
    assert written > 8 * 256 and trained > 4 * 256


def test_without_rollouts_every_token_is_read_once(make: Make) -> None:
    actor, documents = make(), documents_of([40, 33])
    actor(mode="update", documents=documents, branches=None, nsp=NSP)
    assert actor.forward_tokens == 73
    actor(mode="score", documents=documents)
    assert actor.forward_tokens == 146


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made inside and still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


def peak_bytes(actor: FastWeightActor, documents: Documents, branches: Branches | None) -> int:
    nsp = NSPSettings(chunks=8, rollout_length=5, rollouts_per_position=1)
    with LiveBytes() as live:
        output = actor(mode="update", documents=documents, branches=branches, nsp=nsp)
        total = output["ntp_loss_sum"]
        if branches is not None:
            total = total + output["log_probs"].sum()
        total.backward()
    return live.peak


@pytest.mark.parametrize("with_branches", [True, False], ids=["REFINE", "plain"])
def test_activation_checkpointing_lowers_the_peak(make: Make, with_branches: bool) -> None:
    documents = documents_of([900])
    branches = None
    if with_branches:
        positions = torch.arange(99, 899, 100)[None]
        branches = Branches(positions, torch.arange(40).view(1, 8, 1, 5))
    kept = peak_bytes(make(), documents, branches)
    recomputed = peak_bytes(make(activation_checkpointing="segment"), documents, branches)
    assert recomputed < 0.5 * kept


def test_logits_of_a_long_document_never_exist_at_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks of one row instead of all, the score needs less than half of the memory."""
    from refine_verl.models import head

    actor, documents = make(), documents_of([600])
    sizes = []
    for elements in (1 << 24, 16 * 61):
        monkeypatch.setattr(head, "chunk_elements", lambda _, elements=elements: elements)
        hidden = torch.randn(600, 32, dtype=torch.float64)
        targets = documents.tokens[0]
        with LiveBytes() as live, torch.no_grad():
            actor.apply_head(hidden, "score", targets=targets)
        sizes.append(live.peak)
    assert sizes[1] < 0.5 * sizes[0]
