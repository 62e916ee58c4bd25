"""Questions with their paragraphs out of SQuAD and HotpotQA files, in the official and the Hugging Face layout.

They are dealt into training and test sets that share neither a question nor a paragraph with an answer.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refine_verl.config import DataError
from refine_verl.data.sources import resolve_sources


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        text: the question.
        answers: references, at least one.
        gold: the paragraphs that hold the answer, as indices into `Questions.documents`.
        near: paragraphs that are likely to mislead: the rest of the article (SQuAD), the distractors that come
            with the question (HotpotQA).
    """

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    near: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Questions:
    """All answerable questions of a source, each text once, and all paragraphs, each once, in sorted order.

    Attributes:
        items, documents: the questions and the paragraphs.
        unanswerable, repeated: questions left out.
    """

    items: list[Question]
    documents: list[str]
    unanswerable: int
    repeated: int


@dataclasses.dataclass(frozen=True)
class _Raw:
    text: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]
    near: tuple[str, ...]
    article: str | None


def read_questions(source: str, name: str) -> Questions:
    """Read `name`: an official json file, or parquet / jsonl files, a directory of them, or a hub dataset id.

    Raises:
        DataError: nothing there, or a record without the columns the source has.
    """
    raw, others = [], set[str]()
    articles: dict[str, set[str]] = {}
    parse = _squad if source == "squad" else _hotpotqa
    for where, record in _records(source, name):
        try:
            found = list(parse(record))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise DataError(
                f"{where} is not a {source} record ({type(error).__name__}: {error}). Columns needed: "
                f"{_LAYOUTS[source]}; found: {', '.join(record)}."
            ) from error
        for item in found:
            others.update((*item.gold, *item.near))
            if item.article is not None:
                articles.setdefault(item.article, set()).update(item.gold)
        raw += found
    return _index(raw, sorted(others), articles)


_LAYOUTS = {
    "squad": "context, question, answers {text: [...]} and title (or the official json with data / paragraphs / qas)",
    "hotpotqa": "question, answer, context and supporting_facts",
}


def _index(raw: list[_Raw], documents: list[str], articles: Mapping[str, set[str]]) -> Questions:
    number = {text: index for index, text in enumerate(documents)}
    of_article = {name: sorted(number[text] for text in texts) for name, texts in articles.items()}
    items: list[Question] = []
    seen: set[str] = set()
    unanswerable = repeated = 0
    for item in raw:
        key = " ".join(item.text.lower().split())
        if not item.text.strip() or not any(answer.strip() for answer in item.answers):
            unanswerable += bool(item.text.strip())
        elif key in seen:
            repeated += 1
        else:
            seen.add(key)
            gold = tuple(sorted({number[text] for text in item.gold}))
            near = of_article[item.article] if item.article is not None else [number[text] for text in item.near]
            answers = tuple(answer for answer in item.answers if answer.strip())
            items.append(Question(item.text, answers, gold, tuple(sorted(set(near) - set(gold)))))
    return Questions(items, documents, unanswerable, repeated)


def _records(source: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    path = Path(name).expanduser()
    if path.is_file() and path.suffix.lower() == ".json":
        yield from _json_file(source, path)
        return
    for found in resolve_sources([name], key="--input", default_split="validation"):
        for record in found.records():
            yield record.where, record.columns


def _json_file(source: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"--input {path} is not a readable json file: {error}.") from error
    records = content.get("data") if isinstance(content, dict) else content
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise DataError(
            f"--input {path} is not an official {source} file: it must hold a list of objects, or an object with the "
            "list under 'data'."
        )
    for index, record in enumerate(records):
        yield f"{path}, record {index}", record


def _squad(record: Mapping[str, Any]) -> Iterator[_Raw]:
    if "paragraphs" not in record:
        title = _text(record["title"]) if record.get("title") is not None else None
        answers = _answers(record["answers"])
        yield _Raw(_text(record["question"]), answers, (_text(record["context"]),), (), title)
        return
    for paragraph in record["paragraphs"]:
        context = (_text(paragraph["context"]),)
        # A paragraph whose questions all have no answer still misleads the others of its article.
        yield _Raw("", (), context, (), _text(record["title"]))
        for question in paragraph["qas"]:
            answers = () if question.get("is_impossible") else _answers(question["answers"])
            yield _Raw(_text(question["question"]), answers, context, (), _text(record["title"]))


def _hotpotqa(record: Mapping[str, Any]) -> Iterator[_Raw]:
    context, facts = record["context"], record.get("supporting_facts")
    if isinstance(context, Mapping):
        pairs = list(zip(context["title"], context["sentences"], strict=True))
    else:
        pairs = [(entry[0], entry[1]) for entry in context]
    paragraphs = {title: f"{_text(title)}\n{''.join(map(_text, sentences))}" for title, sentences in pairs}
    named = facts["title"] if isinstance(facts, Mapping) else [fact[0] for fact in facts or ()]
    # Without supporting facts nobody knows which paragraphs are needed, so all of them are.
    gold = tuple(paragraphs[title] for title in dict.fromkeys(named)) or tuple(paragraphs.values())
    if not gold:
        raise ValueError("no paragraphs")
    near = tuple(text for text in paragraphs.values() if text not in gold)
    yield _Raw(_text(record["question"]), (_text(record["answer"]),), gold, near, None)


def _answers(value: Any) -> tuple[str, ...]:
    texts = value["text"] if isinstance(value, Mapping) else [answer["text"] for answer in value]
    return tuple(_text(text) for text in texts)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r} is a {type(value).__name__}, not a text")
    return value


def split_questions(
    questions: Sequence[Question], train: int, test: int, generator: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Choose `train` and `test` questions at random, as indices.

    Questions that share a gold paragraph form a group, and a group never lies in both sets. Test questions come
    from as many groups as leave enough questions for training.

    Raises:
        DataError: too few questions.
    """
    order = generator.permutation(len(questions)).tolist()
    groups = _groups(questions)
    for most in range(1, max(Counter(groups).values(), default=0) + 2):
        chosen = _take(order, groups, test, most)
        taken = {groups[index] for index in chosen}
        rest = [index for index in order if groups[index] not in taken]
        if len(chosen) == test and len(rest) >= train:
            return rest[:train], chosen
    raise DataError(
        f"the source has {len(questions)} usable questions about {len(set(groups))} groups of paragraphs: too few for "
        f"--train {train} and --test {test} questions that share no paragraph with an answer. Ask for fewer, or give "
        "a larger source."
    )


def _take(order: Sequence[int], groups: Sequence[int], count: int, most: int) -> list[int]:
    """`count` questions, at most `most` of a group, group after group as they first appear in `order`."""
    members: dict[int, list[int]] = defaultdict(list)
    for index in order:
        members[groups[index]].append(index)
    return [index for group in members.values() for index in group[:most]][:count]


def _groups(questions: Sequence[Question]) -> list[int]:
    """The group of each question: connected through gold paragraphs. Groups are numbered 0, 1, ..."""
    parent: dict[int, int] = {}

    def root(paragraph: int) -> int:
        parent.setdefault(paragraph, paragraph)
        while parent[paragraph] != paragraph:
            parent[paragraph] = parent[parent[paragraph]]
            paragraph = parent[paragraph]
        return paragraph

    for question in questions:
        first = root(question.gold[0])
        for paragraph in question.gold[1:]:
            parent[root(paragraph)] = first
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(question.gold[0]), len(numbers)) for question in questions]
