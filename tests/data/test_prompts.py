"""Prompts with answers: how they become tokens, what is refused, and what is left behind."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers as backend
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from refine_verl.config import ConfigError
from refine_verl.data import DataError
from refine_verl.data.prepare import iterate_split_texts
from refine_verl.data.prompts import PromptDataset, PromptSettings, prepare_prompts
from refine_verl.data.prompts_tokenize import cut_prompt, encode_continuations, encode_prompts

EOS = 256
ROWS = [
    {"prompt": "Q: capital?\nA:", "answer": ["Paris", "paris"], "task": "ruler_squadqa"},
    {"prompt": "Sum: ", "answer": "short", "max_gen_tokens": 7},
    {"prompt": "Code:", "answer": "    x = 1"},
]


@pytest.fixture
def make(tmp_path):
    """`make(rows, **settings)`: rows as rows.jsonl, settings with a cache of their own."""

    def make(rows, name="rows.jsonl", **settings):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return PromptSettings(train_files=str(path), cache_dir=str(tmp_path / "cache"), **settings)

    return make


def llama_like():
    """Sentencepiece's habits: a space before the first word, BOS in front, and EOS (= PAD) behind."""
    words = ["<s>", "</s>", "<unk>", "▁"] + [chr(code) for code in range(33, 127)] + ["▁A", "▁P", "▁Paris", "Paris"]
    vocabulary = [(word, -10.0 if len(word) == 1 else -1.0) for word in words]
    inner = backend.Tokenizer(models.Unigram(vocabulary, unk_id=2))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    inner.add_special_tokens(["<s>", "</s>"])
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def rows_of(prepared):
    dataset = PromptDataset(prepared.path)
    return [dataset[index] for index in range(len(dataset))]


def text(ids):
    ids = ids.tolist()
    assert EOS not in ids[:-1]
    return bytes(ids[:-1] if ids[-1] == EOS else ids).decode()


def test_prompt_and_answer_join_as_generation_goes_on(make, bytes_tokenizer):
    prepared = prepare_prompts(make(ROWS), "train", bytes_tokenizer)
    rows = rows_of(prepared)
    assert [text(row["prompt_ids"]) for row in rows] == [row["prompt"] for row in ROWS]
    # A space between, unless the prompt ends with one or the answer begins with one.
    assert [text(row["answer_ids"]) for row in rows] == [" Paris", "short", "    x = 1"]
    assert all(row["answer_ids"][-1] == EOS for row in rows)
    assert [row["answers"] for row in rows] == [["Paris", "paris"], ["short"], ["    x = 1"]]
    assert [row["max_new_tokens"] for row in rows] == [32, 7, 32]
    assert [row["task"] for row in rows] == ["ruler_squadqa", "", ""]
    assert [row["id"] for row in rows] == ["rows.jsonl:0", "rows.jsonl:1", "rows.jsonl:2"]
    assert [row["row"] for row in rows] == [0, 1, 2]
    statistics = prepared.statistics
    assert (statistics.rows, statistics.truncated, statistics.tasks) == (3, 0, {"": 2, "ruler_squadqa": 1})
    assert (statistics.shortest_prompt, statistics.longest_prompt, statistics.longest_answer) == (5, 14, 10)


def test_settings_of_the_join_and_of_rows_without_columns(make, bytes_tokenizer):
    settings = make(ROWS, answer_separator="", task="trec", max_new_tokens=3)
    rows = rows_of(prepare_prompts(settings, "train", bytes_tokenizer))
    assert [text(row["answer_ids"]) for row in rows] == ["Paris", "short", "    x = 1"]
    assert [row["task"] for row in rows] == ["ruler_squadqa", "trec", "trec"]
    assert [row["max_new_tokens"] for row in rows] == [3, 7, 3]


def test_special_tokens_go_by_position_never_by_id(make):
    tokenizer = llama_like()
    assert tokenizer("A")["input_ids"][0] == 0 and tokenizer("A")["input_ids"][-1] == 1  # what is to be undone
    rows = rows_of(prepare_prompts(make([{"prompt": "</s>A:", "answer": "Paris"}]), "train", tokenizer))
    prompt, answer = rows[0]["prompt_ids"].tolist(), rows[0]["answer_ids"].tolist()
    # BOS in front stays, the end of sequence behind goes, and one that the text itself has stays.
    assert prompt[:2] == [0, 1] and prompt.count(1) == 1
    assert answer == [tokenizer.convert_tokens_to_ids("▁Paris"), 1]
    assert tokenizer.decode(prompt + answer, skip_special_tokens=True).endswith("A: Paris")


def test_continuations_take_no_space_of_their_own():
    tokenizer = llama_like()
    ids = [list(map(int, found)) for found in encode_continuations(tokenizer, [" Paris", "Paris", "x"])]
    assert [tokenizer.convert_ids_to_tokens(found) for found in ids] == [["▁Paris"], ["Paris"], ["x"]]
    plain = tokenizer("Paris", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(plain) == ["▁Paris"]  # what a plain call would have given


def test_the_answer_does_not_touch_the_prompt(make, bytes_tokenizer):
    first = rows_of(prepare_prompts(make(ROWS), "train", bytes_tokenizer))
    changed = [{**row, "answer": "zzz"} for row in ROWS]
    second = rows_of(prepare_prompts(make(changed, "other.jsonl"), "train", bytes_tokenizer))
    for one, other in zip(first, second, strict=True):
        assert one["prompt_ids"].tolist() == other["prompt_ids"].tolist()
        assert one["document_id"] == other["document_id"]
        assert one["answer_ids"].tolist() != other["answer_ids"].tolist()


@pytest.mark.parametrize(
    ("policy", "expected"), [("left", "efghij"), ("right", "abcdef"), ("middle", "abchij"), ("middle5", "abcij")]
)
def test_overlong_prompts_are_cut_and_counted(make, bytes_tokenizer, policy, expected, caplog):
    rows = [{"prompt": "abcdefghij", "answer": "x"}, {"prompt": "short", "answer": "x"}]
    limit = len(expected)
    settings = make(rows, max_prompt_length=limit, overlong_prompts=policy.rstrip("5"))
    prepared = prepare_prompts(settings, "train", bytes_tokenizer)
    found = rows_of(prepared)
    assert [text(row["prompt_ids"]) for row in found] == [expected, "short"]
    assert [row["truncated"] for row in found] == [True, False]
    assert (prepared.statistics.truncated, prepared.statistics.tokens_dropped) == (1, 10 - limit)
    assert f"1 of 2 prompts are longer than data.max_prompt_length={limit}" in caplog.text


def test_cutting_keeps_the_special_tokens_in_front():
    tokenizer = llama_like()
    (ids,), added = encode_prompts(tokenizer, ["abcdef"], special_tokens=True)
    assert added.tolist() == [1]
    for policy, expected in (("left", "ef"), ("right", "▁a"), ("middle", "▁f")):
        cut = cut_prompt(ids, 1, 3, policy)
        assert cut[0] == 0
        assert "".join(tokenizer.convert_ids_to_tokens(cut[1:].tolist())) == expected
    assert cut_prompt(np.arange(3), 1, 3, "left").tolist() == [0, 1, 2]


def test_overlong_prompts_are_an_error_by_default(make, bytes_tokenizer, tmp_path):
    settings = make([{"prompt": "ab", "answer": "x"}, {"prompt": "abcdef", "answer": "x"}], max_prompt_length=4)
    with pytest.raises(DataError, match=r"rows.jsonl, line 2: .* 6 tokens.*max_prompt_length=4 \(1 of 2.*middle"):
        prepare_prompts(settings, "train", bytes_tokenizer)
    assert list((tmp_path / "cache").glob("*")) == []


def test_answers_beyond_the_limit_are_an_error(make, bytes_tokenizer):
    assert prepare_prompts(make(ROWS, max_answer_length=10), "train", bytes_tokenizer).statistics.longest_answer == 10
    with pytest.raises(DataError, match=r"line 3: the answer has 10 tokens.*max_answer_length=9 \(1 of 3"):
        prepare_prompts(make(ROWS, max_answer_length=9), "train", bytes_tokenizer)


def test_no_room_behind_the_special_tokens(make):
    settings = make(ROWS, max_prompt_length=1, overlong_prompts="left")
    with pytest.raises(DataError, match="no room for a prompt behind the 1 special"):
        prepare_prompts(settings, "train", llama_like())


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% if m.role == 'assistant' %}<|endoftext|>"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chatty(bytes_tokenizer, template):
    import copy

    tokenizer = copy.deepcopy(bytes_tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def test_chat_template(make, bytes_tokenizer):
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    rows = [{"prompt": "hi", "answer": " yo"}, {"prompt": messages, "answer": "yo"}]
    settings = make(rows, chat_template=True)
    found = rows_of(prepare_prompts(settings, "train", chatty(bytes_tokenizer, TEMPLATE)))
    assert [text(row["prompt_ids"]) for row in found] == [
        "<user>hi\n<assistant>",
        "<system>be kind\n<user>hi\n<assistant>",
    ]
    # The template's own end of turn is the end of sequence: it comes once.
    assert [row["answer_ids"].tolist() for row in found] == [[*b"yo", EOS]] * 2


def test_chat_template_that_changes_the_prompt_is_refused(make, bytes_tokenizer):
    changing = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match=r"line 1: with the answer.*chat_template=false"):
        prepare_prompts(make(ROWS, chat_template=True), "train", chatty(bytes_tokenizer, changing))
    with pytest.raises(DataError, match=r"line 1: the tokenizer's chat template refuses"):
        prepare_prompts(make(ROWS, chat_template=True), "train", chatty(bytes_tokenizer, "{{ raise_exception('no') }}"))
    with pytest.raises(DataError, match="no chat template"):
        prepare_prompts(make(ROWS, chat_template=True), "train", bytes_tokenizer)
    with pytest.raises(DataError, match="is a list; chat messages need data.chat_template=true"):
        prepare_prompts(make([{"prompt": [], "answer": "x"}]), "train", bytes_tokenizer)


BAD_ROWS = {
    "no prompt column": ({"answer": "x"}, r"no column 'prompt'; its columns are: answer\. .*data\.prompt_key"),
    "null prompt": ({"prompt": None, "answer": "x"}, r"prompt in column 'prompt' is missing \(null\)"),
    "blank prompt": ({"prompt": " \n", "answer": "x"}, "is empty or only white space"),
    "number prompt": ({"prompt": 3, "answer": "x"}, r"is a int \(3\), not a text"),
    "no answer column": ({"prompt": "p", "target": "x"}, r"no answer column.*prompt, target.*data\.answer_key"),
    "two answer columns": ({"prompt": "p", "answer": "x", "outputs": ["y"]}, r"several answer columns \(answer, out"),
    "null answer": ({"prompt": "p", "answer": None}, r"'answer' is missing \(null\); an answer is a string or a list"),
    "blank answer": ({"prompt": "p", "answer": ""}, "answer 0 in column 'answer' is empty"),
    "empty list": ({"prompt": "p", "answer": []}, "'answer' is an empty list"),
    "null reference": ({"prompt": "p", "answer": ["x", None]}, r"answer 1 in column 'answer' is missing \(null\)"),
    "wrong reference": ({"prompt": "p", "answer": ["x", 3]}, r"answer 1 .* is a int"),
    "answer object": ({"prompt": "p", "answer": {"text": "x"}}, "is a dict"),
    "task number": ({"prompt": "p", "answer": "x", "task": 3}, "'task' is 3, not the name of a task"),
    "budget": ({"prompt": "p", "answer": "x", "max_gen_tokens": 0}, "'max_gen_tokens' is 0; it must be an integer"),
    "classes": ({"prompt": "p", "answer": "x", "all_classes": "a"}, "must be a list of class names"),
    "surrogate": ({"prompt": "\ud800", "answer": "x"}, "not valid Unicode"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named(make, bytes_tokenizer, tmp_path, name):
    row, message = BAD_ROWS[name]
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2.*" + message):
        prepare_prompts(make([ROWS[0], row]), "train", bytes_tokenizer)
    assert not (tmp_path / "cache").exists() or list((tmp_path / "cache").iterdir()) == []


def test_parquet_rows_count_from_zero(tmp_path, bytes_tokenizer):
    path = tmp_path / "rows.parquet"
    table = {"question": ["a", "b"], "gold": [["x"], []], "name": ["n1", "n2"]}
    pq.write_table(pa.table(table), path)
    settings = PromptSettings(
        train_files=str(path), cache_dir=str(tmp_path / "c"), prompt_key="question", answer_key="gold", id_key="name"
    )
    with pytest.raises(DataError, match=r"rows\.parquet, row 1: 'gold' is an empty list"):
        prepare_prompts(settings, "train", bytes_tokenizer)
    pq.write_table(pa.table({**table, "gold": [["x"], ["y", "z"]]}), path)
    rows = rows_of(prepare_prompts(settings, "train", bytes_tokenizer))
    assert [(row["id"], row["answers"]) for row in rows] == [("n1", ["x"]), ("n2", ["y", "z"])]


def test_ids(make, bytes_tokenizer):
    rows = [{**ROWS[0], "id": 1}, {**ROWS[1], "id": 2}, {**ROWS[2], "id": 1}]
    with pytest.raises(DataError, match=r"line 3 has the id '1', which .*line 1 has already.*'id'"):
        prepare_prompts(make(rows, id_key="id"), "train", bytes_tokenizer)
    with pytest.raises(DataError, match=r"line 1: 'id' is 1\.5; an id is"):
        prepare_prompts(make([{**ROWS[0], "id": 1.5}], id_key="id"), "train", bytes_tokenizer)
    with pytest.raises(DataError, match="no column 'key'.*data.id_key"):
        prepare_prompts(make(ROWS, id_key="key"), "train", bytes_tokenizer)


def test_a_column_that_was_named_for_the_task_is_there(make, bytes_tokenizer):
    with pytest.raises(DataError, match="no column 'kind'.*data.task_key"):
        prepare_prompts(make(ROWS, task_key="kind"), "train", bytes_tokenizer)
    stands_in = prepare_prompts(make(ROWS, task_key="kind", task="trec"), "train", bytes_tokenizer)
    assert {row["task"] for row in rows_of(stands_in)} == {"trec"}
    named = [{**row, "kind": "qasper"} for row in ROWS]
    prepared = prepare_prompts(make(named, "named.jsonl", task_key="kind"), "train", bytes_tokenizer)
    assert {row["task"] for row in rows_of(prepared)} == {"qasper"}


def test_a_tokenizer_is_trained_on_the_prompts(make):
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    settings = make([{"prompt": "one", "answer": "x"}, {"prompt": messages, "answer": "y"}], chat_template=True)
    assert list(iterate_split_texts(settings, "train")) == ["one", "be kind", "hi"]
    assert list(iterate_split_texts(settings, "train", limit_characters=4)) == ["one", "be kind"]


def test_document_ids_do_not_depend_on_place(make, bytes_tokenizer):
    rows = [*ROWS, ROWS[0]]
    there = rows_of(prepare_prompts(make(rows), "train", bytes_tokenizer))
    back = rows_of(prepare_prompts(make(rows[::-1], "back.jsonl"), "train", bytes_tokenizer))
    assert len({row["document_id"] for row in there}) == 4  # the repeated prompt has a number of its own
    assert all(0 <= row["document_id"] < 2**63 for row in there)
    assert sorted(row["document_id"] for row in there) == sorted(row["document_id"] for row in back)
    assert there[1]["document_id"] == back[2]["document_id"]
    named = [{**row, "id": f"n{index}"} for index, row in enumerate(ROWS)]
    first = rows_of(prepare_prompts(make(named, "n.jsonl", id_key="id"), "train", bytes_tokenizer))
    second = rows_of(prepare_prompts(make(named[::-1], "m.jsonl", id_key="id"), "train", bytes_tokenizer))
    assert {row["id"]: row["document_id"] for row in first} == {row["id"]: row["document_id"] for row in second}


def test_what_is_needed_of_prompts(make, bytes_tokenizer):
    with pytest.raises(
        DataError, match=r"line 2: the prompt has 5 tokens, but at least 6 are needed because k=5 \(2 of"
    ):
        prepare_prompts(make(ROWS), "train", bytes_tokenizer, minimum_prompt_length=6, reason="k=5")
    with pytest.raises(DataError, match="gives 3 prompts, but at least 4 are needed because of the batch"):
        prepare_prompts(make(ROWS), "train", bytes_tokenizer, minimum_sequences=4, sequences_reason="of the batch")
    with pytest.raises(DataError, match="max_prompt_length=3 is too short: prompts need at least 6 tokens because k=5"):
        settings = make(ROWS, max_prompt_length=3)
        prepare_prompts(settings, "train", bytes_tokenizer, minimum_prompt_length=6, reason="k=5")


def test_cache(make, bytes_tokenizer, tmp_path):
    first = prepare_prompts(make(ROWS), "train", bytes_tokenizer)
    again = prepare_prompts(make(ROWS, num_workers=2), "train", bytes_tokenizer)
    assert not first.reused
    # Written again, so changed; the same rows all the same.
    assert [row["answers"] for row in rows_of(first)] == [row["answers"] for row in rows_of(again)]
    settings = PromptSettings(train_files=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
    assert prepare_prompts(settings, "train", bytes_tokenizer).reused
    for change in ({"answer_separator": ""}, {"max_new_tokens": 5}, {"task": "trec"}, {"max_prompt_length": 99}):
        changed = PromptSettings(train_files=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"), **change)
        assert not prepare_prompts(changed, "train", bytes_tokenizer).reused
    assert not list((tmp_path / "cache").glob(".building*"))


def test_several_processes_give_the_same(tmp_path, bytes_tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{n} ", "answer": f"a{n}"}) + "\n" for n in range(200)))
    found = []
    for workers in (1, 2):
        settings = PromptSettings(
            train_files=str(path), cache_dir=str(tmp_path / f"cache{workers}"), num_workers=workers
        )
        found.append(
            [
                (text(r["prompt_ids"]), text(r["answer_ids"]), r["document_id"])
                for r in rows_of(prepare_prompts(settings, "train", bytes_tokenizer))
            ]
        )
    assert found[0] == found[1]
    assert found[0][150][:2] == ("p150 ", "a150")


def test_sources_without_columns_are_refused(tmp_path, bytes_tokenizer):
    (tmp_path / "a.txt").write_text("x")
    for name in (str(tmp_path / "a.txt"), "python_stdlib"):
        settings = PromptSettings(train_files=name, cache_dir=str(tmp_path / "cache"))
        with pytest.raises(DataError, match="has no columns: prompts and answers are read from .parquet, .jsonl"):
            prepare_prompts(settings, "train", bytes_tokenizer)


def test_damaged_files(tmp_path, bytes_tokenizer):
    (tmp_path / "a.jsonl").write_text(json.dumps(ROWS[0]) + "\n{broken")
    (tmp_path / "b.jsonl").write_text("[1]\n")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 nothing")
    (tmp_path / "d.jsonl").write_text("\n")
    for name, message in (
        ("a.jsonl", r"a\.jsonl, line 2 is not valid json"),
        ("b.jsonl", r"b\.jsonl, line 1 holds a json array"),
        ("c.parquet", r"c\.parquet is not a readable parquet file"),
        ("d.jsonl", r"d\.jsonl holds no rows"),
    ):
        settings = PromptSettings(train_files=str(tmp_path / name), cache_dir=str(tmp_path / "cache"))
        with pytest.raises(DataError, match=message):
            prepare_prompts(settings, "train", bytes_tokenizer)


def test_same_file_names_in_two_directories_stay_apart(tmp_path, bytes_tokenizer):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    settings = PromptSettings(
        train_files=[str(tmp_path / "one"), str(tmp_path / "two")], cache_dir=str(tmp_path / "cache")
    )
    ids = [row["id"] for row in rows_of(prepare_prompts(settings, "train", bytes_tokenizer))]
    assert ids == [f"{tmp_path}/{name}/rows.jsonl:0" for name in ("one", "two")]


def test_tokenizer_without_an_end(make, bytes_tokenizer):
    import copy

    tokenizer = copy.deepcopy(bytes_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        prepare_prompts(make(ROWS), "train", tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"overlong_prompts": "midle"},
            r"data\.overlong_prompts: unknown value 'midle'. Allowed: error, middle.*Did you mean 'mid",
        ),
        ({"overlong_prompts": "left"}, "has no effect without a limit"),
        ({"overlong_prompts": "left", "max_prompt_length": 9, "chat_template": True}, "would cut the chat template"),
        ({"max_prompt_length": 0}, r"data\.max_prompt_length: must be at least 1, got 0"),
        ({"max_answer_length": "9"}, r"data\.max_answer_length: must be an integer or null, got '9'"),
        ({"max_new_tokens": 0}, r"data\.max_new_tokens: must be at least 1, got 0"),
        ({"prompt_key": ""}, r"data\.prompt_key: is empty"),
        ({"answer_key": 3}, r"data\.answer_key: must be a string or null, got 3"),
        ({"chat_template": "yes"}, r"data\.chat_template: must be true or false, got 'yes'"),
        ({"answer_separator": "->"}, r"data\.answer_separator: '->' must be white space"),
        ({"train_files": [3]}, r"data\.train_files: holds 3"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        PromptSettings(**settings)


def test_settings_come_out_of_a_data_section():
    settings = PromptSettings.from_mapping({"val_files": "a.parquet", "text_key": "x", "task": "trec"})
    assert settings.files("validation") == ("a.parquet",)
    assert settings.files("train") == ()
    assert settings.task == "trec"


def test_hub_datasets(tmp_path, bytes_tokenizer, monkeypatch):
    import datasets

    from refine_verl.data import sources

    asked = []

    def load(repo, config, split, spec, key):
        asked.append((repo, config, split, key))
        return datasets.Dataset.from_list([{"prompt": "p: ", "answers": ["a", "b"]}, {"prompt": "q", "answers": []}])

    monkeypatch.setattr(sources, "_load_hub_dataset", load)
    settings = PromptSettings(val_files="org/name:tasks:test", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"org/name:tasks:test, row 1: 'answers' is an empty list"):
        prepare_prompts(settings, "validation", bytes_tokenizer)
    assert asked == [("org/name", "tasks", "test", "data.val_files")]
