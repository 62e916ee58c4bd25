"""Generated question answering: its columns, its lengths, what the two sets share, and the same bytes every time."""

import hashlib
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refine_verl.data import DataError
from refine_verl.data.prompts import PromptDataset, PromptSettings, prepare_prompts
from refine_verl.data.tokenizers import load_tokenizer
from refine_verl.prepare.__main__ import main
from refine_verl.prepare.questions import Question, read_questions, split_questions
from refine_verl.prepare.ruler_qa import fit
from refine_verl.scoring import score

LENGTH = 1500
COLUMNS = [
    ("index", pa.int64()),
    ("prompt", pa.string()),
    ("answer", pa.list_(pa.string())),
    ("prompt_length", pa.int64()),
    ("max_answer_length", pa.int64()),
    ("total_length", pa.int64()),
    ("max_seq_length", pa.int64()),
    ("task", pa.string()),
]


def generate(path, out, *more, source="squad", train=20, test=10):
    usual = {
        "--source": source,
        "--input": str(path),
        "--tokenizer": "bytes",
        "--length": str(LENGTH),
        "--train": str(train),
        "--test": str(test),
        "--out": str(out),
    }
    given = {**usual, **dict(zip(more[::2], more[1::2], strict=True))}
    return main(["ruler_qa", *(word for pair in given.items() for word in pair)])


def tables(out):
    return {path.stem.rpartition("_")[2]: pq.read_table(path).to_pylist() for path in sorted(out.glob("*.parquet"))}


def passages(prompt):
    body = prompt.split("passages.\n", 1)[1].rsplit("\n\nAnswer the question", 1)[0]
    return re.split(r"(?:^|\n\n)Document \d+:\n", body)[1:]


def question(prompt):
    return re.search(r"Question: (.*)\nAnswer:$", prompt)[1]


def digests(out):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.parquet")}


def test_columns_and_prompt(squad_file, tmp_path, capsys):
    assert generate(squad_file, tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "ruler_squadqa_1500_20_train.parquet" in shown and "60 without an answer" in shown
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == [".prepare.json", "ruler_squadqa_1500_10_test.parquet", "ruler_squadqa_1500_20_train.parquet"]
    schema = pq.read_schema(tmp_path / "out" / files[1])
    assert [(field.name, field.type) for field in schema] == COLUMNS
    rows = tables(tmp_path / "out")["test"]
    assert [row["index"] for row in rows] == list(range(10))
    row = rows[0]
    documents = passages(row["prompt"])
    ask = "Answer the question based on the given passages. Only give me the answer and do not output any other words."
    body = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(documents, 1))
    expected = f"{ask}\n\nThe following are given passages.\n{body}\n\n{ask}\n\n"
    assert row["prompt"] == f"{expected}Question: {question(row['prompt'])}\nAnswer:"
    assert row["task"] == "ruler_squadqa"
    assert row["answer"] == [re.search(r"fact (\S+)", question(row["prompt"]))[0].replace("f", "F", 1)] * 2


def test_lengths_are_filled_and_kept(squad_file, tmp_path):
    generate(squad_file, tmp_path / "out")
    everything = {
        text
        for entry in json.loads(squad_file.read_text())["data"]
        for text in (paragraph["context"] for paragraph in entry["paragraphs"])
    }
    for rows in tables(tmp_path / "out").values():
        for row in rows:
            assert row["prompt_length"] == len(row["prompt"].encode())
            assert row["max_answer_length"] == len(f" {row['answer'][0]}")
            assert row["total_length"] == row["prompt_length"] + row["max_answer_length"]
            assert row["prompt_length"] + 32 <= LENGTH == row["max_seq_length"]
            left = everything - set(passages(row["prompt"]))
            # The shortest paragraph left out would not have fit: its header takes at least 14 bytes.
            assert row["prompt_length"] + 32 + min(map(len, left)) + 14 > LENGTH - 2
            assert len(set(passages(row["prompt"]))) == len(passages(row["prompt"]))


def test_gold_is_there_at_every_place_among_near_distractors(squad_file, tmp_path):
    generate(squad_file, tmp_path / "out")
    places = []
    for row in tables(tmp_path / "out")["train"]:
        documents = passages(row["prompt"])
        key = re.search(r"fact (\d+)-(\d+)", question(row["prompt"]))
        places.append([text.startswith(f"Fact {key[1]}-{key[2]}:") for text in documents].index(True) / len(documents))
        # Those of its own article come before any other.
        own = sum(text.startswith(f"Fact {key[1]}-") for text in documents)
        assert own >= min(len(documents) - 1, 4)
    assert min(places) < 0.3 and max(places) > 0.6


@pytest.mark.parametrize("source", ["squad", "hotpotqa"])
def test_the_sets_share_no_question_and_no_gold(source, squad_file, hotpot_file, tmp_path):
    path = squad_file if source == "squad" else hotpot_file
    assert generate(path, tmp_path / "out", source=source) == 0
    found = tables(tmp_path / "out")
    asked = {name: [question(row["prompt"]) for row in rows] for name, rows in found.items()}
    assert len(set(asked["train"] + asked["test"])) == 30
    source_questions = read_questions(source, str(path))
    gold = {item.text: {source_questions.documents[index] for index in item.gold} for item in source_questions.items}
    test_gold = set().union(*(gold[text] for text in asked["test"]))
    for row in found["train"]:
        assert gold[question(row["prompt"])] <= set(passages(row["prompt"]))
        assert not test_gold & set(passages(row["prompt"]))
    for row in found["test"]:
        assert gold[question(row["prompt"])] <= set(passages(row["prompt"]))


def test_same_bytes_for_the_same_seed_only(squad_file, tmp_path):
    generate(squad_file, tmp_path / "one")
    generate(squad_file, tmp_path / "two")
    generate(squad_file, tmp_path / "three", "--seed", "1")
    assert digests(tmp_path / "one") == digests(tmp_path / "two") != digests(tmp_path / "three")


def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(squad_file, tmp_path, monkeypatch):
    from refine_verl.prepare import ruler_qa

    monkeypatch.setattr(ruler_qa, "_PART_ROWS", 6)
    generate(squad_file, tmp_path / "whole")
    row, made = ruler_qa.PromptBuilder.row, []

    def interrupted(self, split, number, index):
        if len(made) == 14:
            raise KeyboardInterrupt
        made.append(number)
        return row(self, split, number, index)

    monkeypatch.setattr(ruler_qa.PromptBuilder, "row", interrupted)
    assert generate(squad_file, tmp_path / "out") == 130
    assert list((tmp_path / "out").glob("ruler*")) == []  # nothing under a final name
    again = []
    monkeypatch.setattr(ruler_qa.PromptBuilder, "row", lambda self, *args: again.append(args) or row(self, *args))
    assert generate(squad_file, tmp_path / "out") == 0
    assert len(again) == 30 - 12  # two parts of six were finished
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "out").iterdir())[1:] == sorted(digests(tmp_path / "whole"))
    assert generate(squad_file, tmp_path / "out") == 0
    assert len(again) == 18  # nothing left to do


def test_other_arguments_do_not_mix_into_a_directory(squad_file, tmp_path, capsys):
    generate(squad_file, tmp_path / "out")
    before = digests(tmp_path / "out")
    assert generate(squad_file, tmp_path / "out", "--seed", "5") == 2
    assert "with other arguments" in capsys.readouterr().err
    assert digests(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("x")
    assert generate(squad_file, tmp_path / "mine") == 2
    assert "holds other files (a.txt)" in capsys.readouterr().err


def test_too_small_sources_are_refused(squad_file, tmp_path, capsys):
    assert generate(squad_file, tmp_path / "out", train=175, test=10) == 2
    assert "180 usable questions about 60 groups of paragraphs: too few for --train 175" in capsys.readouterr().err
    assert generate(squad_file, tmp_path / "out", "--length", "20000") == 2
    assert "too few paragraphs: 60 with about" in capsys.readouterr().err
    assert generate(squad_file, tmp_path / "out", "--length", "200") == 2
    assert "--length 200 leaves no room for any question" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_arguments_and_sources(squad_file, tmp_path, capsys):
    cases = [
        ([squad_file, "--train", "-1"], "train: must be at least 0, got -1"),
        ([squad_file, "--train", "0", "--test", "0"], "train: and test are both 0"),
        ([squad_file, "--tokenizer", str(tmp_path / "none")], "neither a directory nor a hub id"),
        ([squad_file, "--tokenizer", "bpe:300"], "would be trained"),
        ([tmp_path / "none.json"], "none.json does not exist"),
    ]
    for (path, *more), message in cases:
        assert generate(path, tmp_path / "out", *more) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "bad.json").write_text(json.dumps([{"question": "q"}]))
    assert generate(tmp_path / "bad.json", tmp_path / "out") == 2
    assert "record 0 is not a squad record (KeyError" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text("{")
    assert generate(tmp_path / "bad.json", tmp_path / "out") == 2
    assert "not a readable json file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_hugging_face_layouts_give_the_same_questions(squad_file, hotpot_file, tmp_path):
    official = read_questions("squad", str(squad_file))
    flat = [
        {
            "title": article["title"],
            "context": paragraph["context"],
            "question": entry["question"],
            "answers": {"text": [answer["text"] for answer in entry["answers"]], "answer_start": [0]},
        }
        for article in json.loads(squad_file.read_text())["data"]
        for paragraph in article["paragraphs"]
        for entry in paragraph["qas"]
    ]
    pq.write_table(pa.Table.from_pylist(flat), tmp_path / "squad.parquet")
    (tmp_path / "squad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in flat))
    assert read_questions("squad", str(tmp_path / "squad.parquet")) == official
    assert read_questions("squad", str(tmp_path / "squad.jsonl")) == official
    assert (len(official.items), len(official.documents), official.unanswerable) == (180, 60, 60)
    hotpot = read_questions("hotpotqa", str(hotpot_file))
    flat = [
        {
            **record,
            "supporting_facts": {"title": [fact[0] for fact in record["supporting_facts"]], "sent_id": [0, 1]},
            "context": {
                "title": [entry[0] for entry in record["context"]],
                "sentences": [entry[1] for entry in record["context"]],
            },
        }
        for record in json.loads(hotpot_file.read_text())
    ]
    pq.write_table(pa.Table.from_pylist(flat), tmp_path / "hotpot.parquet")
    assert read_questions("hotpotqa", str(tmp_path / "hotpot.parquet")) == hotpot
    item = hotpot.items[0]
    assert len(item.gold) == 2 and len(item.near) == 4
    assert {hotpot.documents[index].split("\n")[0] for index in item.gold} == {"Shared 0", "Own 0"}


def test_repeated_questions_count_once(tmp_path):
    rows = [
        {"context": f"c{n}", "question": q, "answers": {"text": ["c"]}, "title": "t"}
        for n, q in enumerate(["Why?", "why? ", "How?"])
    ]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_questions("squad", str(tmp_path / "s.jsonl"))
    assert [item.text for item in found.items] == ["Why?", "How?"]
    assert (found.repeated, len(found.documents)) == (1, 3)


def test_questions_that_share_gold_stay_together():
    chain = [Question(f"q{n}", ("a",), (n, n + 1), ()) for n in range(4)]  # 0-1-2-3-4: one group
    single = [Question(f"s{n}", ("a",), (10 + n,), ()) for n in range(6)]
    for seed in range(20):
        train, test = split_questions([*chain, *single], 4, 3, np.random.default_rng(seed))
        assert len(train) == 4 and len(test) == 3 and not set(train) & set(test)
        assert len({index < 4 for index in train if index < 4} | {"test" for index in test if index < 4}) <= 1
    with pytest.raises(DataError, match="10 usable questions about 7 groups"):
        split_questions([*chain, *single], 8, 3, np.random.default_rng(0))
    # Test questions come from many groups where they may, and from few where training needs the rest.
    pairs = [Question(f"q{n}", ("a",), (n // 2,), ()) for n in range(20)]
    train, test = split_questions(pairs, 10, 5, np.random.default_rng(0))
    assert len({index // 2 for index in test}) == 5
    train, test = split_questions(pairs, 16, 4, np.random.default_rng(0))
    assert len({index // 2 for index in test}) == 2


def test_fit_takes_in_order_what_fits():
    sizes = np.array([5, 50, 7, 3, 9, 1])
    assert fit(np.arange(6), sizes, 20).tolist() == [0, 2, 3, 5]
    assert fit(np.arange(6)[::-1], sizes, 20).tolist() == [5, 4, 3, 2]
    assert fit(np.arange(6), sizes, 0).tolist() == []
    generator = np.random.default_rng(0)
    for _ in range(20):
        sizes, room = generator.integers(1, 60, size=30), int(generator.integers(0, 400))
        order, taken, left = generator.permutation(30), [], room
        for index in order:  # the obvious way
            if sizes[index] <= left:
                taken.append(index)
                left -= sizes[index]
        assert fit(order, sizes, room).tolist() == taken


def test_written_files_go_into_training_and_scoring(squad_file, tmp_path):
    generate(squad_file, tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*_train.parquet")
    settings = PromptSettings(train_files=str(path), cache_dir=str(tmp_path / "cache"), max_prompt_length=LENGTH)
    tokenizer = load_tokenizer("bytes")
    prepared = prepare_prompts(settings, "train", tokenizer)
    assert prepared.statistics.tasks == {"ruler_squadqa": 20}
    row = PromptDataset(prepared.path)[0]
    answer = tokenizer.decode(row["answer_ids"][:-1])
    assert score(row["task"], answer, row["answers"]) == {"substring_match": 1.0}
    lengths = pq.read_table(path, columns=["prompt_length"]).column(0).to_pylist()
    assert PromptDataset(prepared.path).lengths.tolist() == lengths
