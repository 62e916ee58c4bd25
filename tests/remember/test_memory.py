"""What is asked of a state is what is asked of the document; states are forked, read on, saved and found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reference.answers import plain_log_probs
from reference.live_bytes import LiveBytes
from reference.toy import relative
from torch import Tensor

import refine_verl
from refine_verl.adaptation import PromptError
from refine_verl.config import ConfigError, DataError, ModelError
from refine_verl.data.tokenizers import load_tokenizer
from refine_verl.models import Documents, FastWeightActor, make_actor
from refine_verl.remember import Answer, Memory, load

from .conftest import DOCUMENTS, HYBRIDS, QUESTIONS, WRITTEN, build, rows_of

# float64 rounding through two layers; a state that lacks one token is off by more than 1e-3
RELATIVE = 1e-9


def ask(memory: Memory, questions: list[Tensor], **values: Any) -> list[Answer]:
    return memory.ask(questions, max_new_tokens=WRITTEN, stop_tokens=(), **values)


def worst(model: Any, documents: list[Tensor], questions: list[Tensor], answers: list[Answer]) -> float:
    """How far log-probabilities are from those of one pass over document, question and answer, without any state."""
    plain = make_actor(model)
    found = []
    for answer in answers:
        text = torch.cat([documents[answer.document], questions[answer.question]])
        with torch.no_grad():
            wanted = plain_log_probs(plain, text, answer.tokens, 1.0)
        found.append(relative(answer.log_probs, wanted))
    return max(found)


def test_asked_read_on_saved_and_found_again(family: str, tmp_path: Path) -> None:
    """In one test for each family: its models are made once."""
    model, documents, questions = build(family), rows_of(DOCUMENTS, 3), rows_of(QUESTIONS, 4)
    memory = refine_verl.remember(model, documents, segment=16, batch_size=2)
    extra = int(family in HYBRIDS)  # a token, to learn how large its keys and values are
    assert memory.forward_tokens == sum(DOCUMENTS) + extra
    answers = ask(memory, questions, batch_size=5)
    pairs = len(documents) * len(questions)
    assert [(x.document, x.question) for x in answers] == [(d, q) for d in range(3) for q in range(4)]
    # each document once, whatever the number of questions
    assert memory.forward_tokens == sum(DOCUMENTS) + extra + 3 * sum(QUESTIONS) + pairs * (WRITTEN - 1)

    memory.save(tmp_path / "states")
    found = load(tmp_path / "states", model, segment=16)
    assert found.documents == memory.documents and found.num_bytes == memory.num_bytes
    for one, other in zip(memory.states, found.states, strict=True):
        assert [x.dtype for x in one.tensors] == [x.dtype for x in other.tensors]
        assert all(torch.equal(x, y) for x, y in zip(one.tensors, other.tensors, strict=True))
    again = ask(found, questions, batch_size=5)
    assert found.forward_tokens == 3 * sum(QUESTIONS) + pairs * (WRITTEN - 1)
    assert all(torch.equal(x.log_probs, y.log_probs) for x, y in zip(answers, again, strict=True))

    more = rows_of((9, 30, 1), 5)
    fork = found[1]
    found.append(more)
    longer = [torch.cat(pair) for pair in zip(documents, more, strict=True)]
    assert [x.positions for x in found.documents] == [len(row) for row in longer]
    assert fork.documents[0].positions == DOCUMENTS[1]
    read_on, forked = ask(found, questions), ask(fork, questions)
    short = refine_verl.remember(model, [row[:-1] for row in documents], segment=16)
    wrong = ask(short, questions)

    assert worst(model, documents, questions, answers) < RELATIVE
    assert worst(model, longer, questions, read_on) < RELATIVE
    assert worst(model, documents[1:2], questions, forked) < RELATIVE
    assert worst(model, documents, questions, wrong) > 1e-3


def test_a_state_holds_one_document_and_nothing_of_its_company(family: str) -> None:
    model, documents = build(family), rows_of(DOCUMENTS, 3)
    alone = [refine_verl.remember(model, [row], segment=16).num_bytes for row in documents]
    memory = refine_verl.remember(model, documents, segment=16, batch_size=3)
    assert [memory[i].num_bytes for i in range(3)] == alone
    for state in memory.states:
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in state.tensors}
        assert sum(held.values()) <= state.num_bytes


@pytest.mark.parametrize("kind", ["delta_net", "lact_swiglu"])
def test_memory_does_not_depend_on_the_length(kind: str) -> None:
    """The token ids count, too: its caller's, which are int32 here, and ours."""
    chunks = {"lact_chunk_size": 512, "window_size": 256} if kind == "lact_swiglu" else {}
    model = build(kind, torch.float32, num_hidden_layers=1, hidden_size=64, **chunks)

    def peak(tokens: int) -> tuple[int, int]:
        document = [row.int() for row in rows_of((tokens,), 6)]
        with LiveBytes() as live:
            memory = refine_verl.remember(model, document, segment=2048)
        return live.peak, memory.num_bytes

    (short, kept), (long, as_much) = peak(4096), peak(65536)
    assert long < 1.1 * short and kept == as_much


def test_draws_depend_on_seed_document_and_question_only() -> None:
    model, documents, questions = build(), rows_of(DOCUMENTS, 3), rows_of(QUESTIONS, 4)
    memory = refine_verl.remember(model, documents)

    def sample(memory: Memory, **values: Any) -> list[list[int]]:
        return [x.tokens.tolist() for x in ask(memory, questions, temperature=1.0, **values)]

    first = sample(memory)
    assert first == sample(memory, batch_size=1) and first != sample(memory, seed=1)
    assert sample(memory[2]) == first[8:]
    chosen = memory.ask(
        questions[:3], of=[2, 0, 2], max_new_tokens=[4, 1, 2], temperature=1.0, stop_tokens=(), batch_size=2
    )
    assert [x.tokens.tolist() for x in chosen] == [first[8], first[1][:1], first[10][:2]]
    assert [(x.document, x.question) for x in chosen] == [(2, 0), (0, 1), (2, 2)]


def test_texts() -> None:
    tokenizer = load_tokenizer("bytes")
    model = build(vocab_size=257)
    memory = refine_verl.remember(model, ["The sky is blue.", "Ann has apples."], tokenizer, names=["sky", "Ann"])
    answers = memory.ask("What?", max_new_tokens=3, stop_tokens=())
    ids = refine_verl.remember(model, [list(b"The sky is blue."), list(b"Ann has apples.")])
    assert [x.tokens.tolist() for x in answers] == [
        x.tokens.tolist() for x in ids.ask([list(b"What?")], max_new_tokens=3, stop_tokens=())
    ]
    assert [x.text for x in answers] == [tokenizer.decode(x.tokens, skip_special_tokens=True) for x in answers]
    stop = int(answers[0].tokens[1])
    model.generation_config.eos_token_id = stop
    assert memory[0].ask("What?", max_new_tokens=3)[0].tokens.tolist() == answers[0].tokens.tolist()[:2]
    memory.append(" And?")
    assert [x.positions for x in memory.documents] == [21, 20]
    assert [x.name for x in memory[-1:].documents] == ["Ann"]


def test_trained_since(tmp_path: Path) -> None:
    model, documents, questions = build(dtype=torch.float32), rows_of((20,), 3), rows_of((3,), 4)
    memory = refine_verl.remember(model, documents)
    before = ask(memory, questions)[0].tokens.tolist()
    changed = pytest.raises(ModelError, match="weights have changed since it read")
    with refine_verl.adapt(model, documents, {"method": "sft", "lr": 1e-2}), changed:
        ask(memory, questions)
    assert ask(memory, questions)[0].tokens.tolist() == before  # `adapt` has put everything back
    with torch.no_grad():
        next(model.parameters()).mul_(1.001)
    for use in (
        lambda: ask(memory, questions),
        lambda: memory.append(documents),
        lambda: memory.add(documents),
        lambda: memory.save(tmp_path / "states"),
    ):
        with pytest.raises(ModelError, match="weights have changed since it read"):
            use()
    assert not list(tmp_path.iterdir())


def test_a_hybrid_says_what_its_keys_take_and_refuses_what_does_not_fit() -> None:
    model = build("olmo_hybrid")
    short, long = (refine_verl.remember(model, rows_of((n,), 3)) for n in (10, 50))
    each = (long.num_bytes - short.num_bytes) / 40
    assert each == long.states[0].bytes_per_token == 2 * 2 * 6 * 8  # keys and values of two heads of six float64
    passes: list[int] = []
    with pytest.raises(DataError, match=r"keep 192 bytes of keys and values for every token, .* for 50 tokens"):
        refine_verl.remember(model, rows_of((50,), 3), most_bytes=2 * 50 * 192 - 1, progress=passes.append)
    with pytest.raises(DataError, match="for 60 tokens"):
        short.append(rows_of((50,), 3), most_bytes=100, progress=passes.append)
    assert not passes and short.documents[0].positions == 10
    refine_verl.remember(model, rows_of((50,), 3), most_bytes=2 * 50 * 192)
    refine_verl.remember(build(), rows_of((50,), 3), most_bytes=0)  # nothing grows


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda m: refine_verl.remember("a/model", [[1]]), ModelError, "refine_verl.remember: the model is a str"),
        (lambda m: refine_verl.remember(m.model, []), PromptError, "documents: no prompts"),
        (lambda m: refine_verl.remember(m.model, [[1], []]), PromptError, "documents: row 1 is empty"),
        (lambda m: refine_verl.remember(m.model, [[1, 61]]), PromptError, "documents: row 0, position 1: token id 61"),
        (lambda m: refine_verl.remember(m.model, ["text"]), PromptError, "documents: got text, and no tokenizer"),
        (lambda m: refine_verl.remember(m.model, [[1]], names=["a", "b"]), ConfigError, "names: 2 names for 1 doc"),
        (lambda m: refine_verl.remember(m.model, [[1]], segment=0), ConfigError, "segment: must be at least 1"),
        (lambda m: m.append([[1], [2], [3]]), PromptError, "append: 3 texts for 2 documents"),
        (lambda m: m.ask([], max_new_tokens=1), PromptError, "questions: no prompts"),
        (lambda m: m.ask([[1]], max_new_tokens=0), PromptError, "max_new_tokens: must be at least 1, got 0"),
        (lambda m: m.ask([[1]], max_new_tokens=[1, 2]), PromptError, "max_new_tokens: 2 numbers for 1 questions"),
        (lambda m: m.ask([[1]], max_new_tokens="few"), PromptError, "max_new_tokens: must be an integer"),
        (lambda m: m.ask([[1]], max_new_tokens=1, of=[2]), PromptError, "of: there is no document 2; there are 2"),
        (lambda m: m.ask([[1]], max_new_tokens=1, of=[-1]), PromptError, "of: must be at least 0, got -1"),
        (lambda m: m.ask([[1]], max_new_tokens=1, temperature=-1), PromptError, "temperature must be 0"),
        (lambda m: m.ask([[1]], max_new_tokens=1, batch_size=0), PromptError, "batch_size must be at least 1"),
        (lambda m: m[2], IndexError, "document 2 of 2"),
    ],
)
def test_refused(call: Any, error: type[Exception], said: str, two: Memory) -> None:
    with pytest.raises(error, match=said.replace("(", r"\(")):
        call(two)


@pytest.fixture(scope="module")
def two() -> Memory:
    return refine_verl.remember(build(), rows_of((5, 6), 3))


def test_scores_from_a_state(family: str) -> None:
    """Log-likelihoods of texts behind a document, from its state, are those of both read together."""
    model = build(family)
    (document, other), texts = rows_of(DOCUMENTS[:2], 1), rows_of((7, 2, 4), 2)
    memory, actor = refine_verl.remember(model, [document, other]), make_actor(model)

    def scored(front: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        rows = [torch.cat([front, text]) for text in texts]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        # the first token of a text is read, and those behind it are predicted
        documents = Documents(padded, tuple(map(len, rows)), (len(front) + 1,) * len(rows), state)
        with torch.no_grad():
            found: tuple[Tensor, Tensor] = FastWeightActor.forward(actor, mode="score", documents=documents)
        return found

    wanted, right = scored(document)
    none = torch.zeros(0, dtype=torch.int64)
    loss, correct = scored(none, memory.states[0].fork(len(texts)))
    assert relative(loss, wanted) < RELATIVE and torch.equal(correct, right)
    assert relative(scored(none, memory.states[1].fork(len(texts)))[0], wanted) > 1e-3
