"""Small SQuAD-like and HotpotQA-like sources; no test waits for a network."""

import json
import os

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "mu", "nu", "omega"]


def sentence(generator, words):
    return " ".join(generator.choice(WORDS, size=words))


def squad_records(articles=6, paragraphs=10, questions=3):
    """Official SQuAD records: paragraphs of 5 to 40 words, each with its questions, one of them without an answer."""
    generator = np.random.default_rng(7)
    data = []
    for article in range(articles):
        entries = []
        for paragraph in range(paragraphs):
            key = f"{article}-{paragraph}"
            context = f"Fact {key}: {sentence(generator, int(generator.integers(5, 40)))}."
            asked = [
                {
                    "question": f"What is fact {key} number {number}?",
                    "is_impossible": False,
                    "answers": [{"text": f"Fact {key}", "answer_start": 0}] * 2,
                }
                for number in range(questions)
            ]
            asked.append({"question": f"Impossible {key}?", "is_impossible": True, "answers": []})
            entries.append({"context": context, "qas": asked})
        data.append({"title": f"article {article}", "paragraphs": entries})
    return data


def hotpot_records(count=60):
    """Official HotpotQA records: two gold paragraphs, one of them shared by pairs of questions, and four others."""
    generator = np.random.default_rng(8)

    def paragraph(title):
        words = np.random.default_rng(sum(map(ord, title)))
        return [title, [sentence(words, 6) + ".", " " + sentence(words, 5) + "."]]

    records = []
    for number in range(count):
        gold = [f"Shared {number // 2}", f"Own {number}"]
        others = [f"Other {other}" for other in generator.choice(200, size=4, replace=False)]
        context = [paragraph(title) for title in [*gold, *others]]
        generator.shuffle(context)
        records.append(
            {
                "_id": f"h{number}",
                "question": f"Who links {gold[0]} and {gold[1]}?",
                "answer": f"link {number}",
                "supporting_facts": [[gold[0], 0], [gold[1], 1]],
                "context": context,
            }
        )
    return records


@pytest.fixture
def squad_file(tmp_path):
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"version": "v2.0", "data": squad_records()}))
    return path


@pytest.fixture
def hotpot_file(tmp_path):
    path = tmp_path / "hotpot.json"
    path.write_text(json.dumps(hotpot_records()))
    return path


@pytest.fixture(scope="session")
def bytes_tokenizer():
    from refine_verl.data.tokenizers import load_tokenizer

    return load_tokenizer("bytes")
