"""Formats and their errors: what is read, and what the message says when it cannot be."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refine_verl.data import DataError
from refine_verl.data.sources import FileSource, iterate_documents

DOCUMENTS = ["first document", "zweites Dokument: äöü", "third\nwith a second line"]


def read(path, text_key="text"):
    documents = list(iterate_documents([FileSource(path)], text_key))
    return [document["text"] for document in documents], [document["row"] for document in documents]


def json_lines(texts):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def write(path, data):
    path.write_bytes(data)
    return path


def compress(data):
    return pa.compress(data, codec="zstd", asbytes=True)


def write_parquet(path, texts, kind=None, column="text"):
    values = pa.array(texts, kind) if kind else pa.array(texts)
    pq.write_table(pa.table({"id": pa.array(range(len(texts))), column: values}), path)
    return path


def test_parquet(tmp_path):
    assert read(write_parquet(tmp_path / "a.parquet", DOCUMENTS)) == (DOCUMENTS, [0, 1, 2])


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_string_types(tmp_path, kind):
    table = pa.table({"text": pa.array(DOCUMENTS).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0] == DOCUMENTS


def test_parquet_rows_count_through_batches(tmp_path):
    texts = [f"text {i}" for i in range(1000)]
    assert read(write_parquet(tmp_path / "a.parquet", texts)) == (texts, list(range(1000)))


def test_json_lines_skip_blank_lines_and_keep_line_numbers(tmp_path):
    data = json_lines(DOCUMENTS[:1]) + b"\n  \n" + json_lines(DOCUMENTS[1:])
    assert read(write(tmp_path / "a.jsonl", data)) == (DOCUMENTS, [0, 3, 4])


def test_json_lines_with_byte_order_mark_and_windows_line_ends(tmp_path):
    data = b"\xef\xbb\xbf" + json_lines(DOCUMENTS).replace(b"\n", b"\r\n")
    assert read(write(tmp_path / "a.jsonl", data))[0] == DOCUMENTS


def test_json_lines_zst_of_several_frames(tmp_path):
    data = compress(json_lines(DOCUMENTS[:2])) + compress(json_lines(DOCUMENTS[2:]))
    assert read(write(tmp_path / "a.jsonl.zst", data)) == (DOCUMENTS, [0, 1, 2])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "A.JSONL.GZ"])
def test_json_lines_gz_of_several_members(tmp_path, name):
    data = gzip.compress(json_lines(DOCUMENTS[:2])) + gzip.compress(json_lines(DOCUMENTS[2:]))
    assert read(write(tmp_path / name, data)) == (DOCUMENTS, [0, 1, 2])


def test_damaged_gz(tmp_path):
    data = gzip.compress(json_lines([f"document number {i} of many" for i in range(5000)]))
    for damaged in (data[: len(data) // 2], data[:-9], b"plain text"):
        with pytest.raises(DataError, match=r"a\.jsonl\.gz is not a readable gzip-compressed file"):
            read(write(tmp_path / "a.jsonl.gz", damaged))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.txt"])
def test_a_file_git_lfs_did_not_fetch(tmp_path, name):
    with pytest.raises(DataError, match="is a Git LFS pointer and not the file itself"):
        read(write(tmp_path / name, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"))


def test_text_file_is_one_document_with_its_line_ends(tmp_path):
    assert read(write(tmp_path / "a.txt", "ä\r\nb\n".encode())) == (["ä\r\nb\n"], [0])


def test_other_column(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", DOCUMENTS, column="content")
    assert read(path, "content")[0] == DOCUMENTS


@pytest.mark.parametrize("name", ["a.csv", "a", "a.json", "a.txt.zst"])
def test_unsupported_suffix(tmp_path, name):
    with pytest.raises(
        DataError, match=r"unsupported suffix .*\.parquet, \.jsonl, \.jsonl\.zst, \.jsonl\.gz, \.json\.gz, \.txt"
    ):
        read(write(tmp_path / name, b"x"))


def test_wrong_column_lists_the_columns(tmp_path):
    with pytest.raises(
        DataError, match=r"a\.parquet has no column 'body'; its columns are: id, text\..*data\.text_key"
    ):
        read(write_parquet(tmp_path / "a.parquet", DOCUMENTS), "body")
    with pytest.raises(DataError, match=r"a\.jsonl, line 1 has no column 'body'; its columns are: id, text\."):
        read(write(tmp_path / "a.jsonl", json_lines(DOCUMENTS)), "body")
    with pytest.raises(DataError, match=r"a\.txt has no column 'body'; its columns are: text\."):
        read(write(tmp_path / "a.txt", b"words"), "body")


def test_column_of_numbers(tmp_path):
    with pytest.raises(DataError, match=r"a\.parquet, row 0 .*'id' holds int64, not strings.*columns are: id, text"):
        read(write_parquet(tmp_path / "a.parquet", DOCUMENTS), "id")


@pytest.mark.parametrize(
    ("value", "what"), [(None, "null"), ("", "is empty"), (" \n\t\u3000", "is empty or only white space")]
)
def test_parquet_row_without_text(tmp_path, value, what):
    texts = ["good"] * 200
    texts[150] = value
    with pytest.raises(DataError, match=rf"a\.parquet, row 150: the text in column .text. .*{what}"):
        read(write_parquet(tmp_path / "a.parquet", texts, pa.string()))


@pytest.mark.parametrize(
    ("value", "what"),
    [(None, "is missing"), (7, "is a int .7., not a text"), (["x"], "is a list"), ("  ", "is empty or only")],
)
def test_json_line_without_text(tmp_path, value, what):
    path = write(tmp_path / "a.jsonl", json_lines(["good", "good", value, "good"]))
    with pytest.raises(DataError, match=rf"a\.jsonl, line 3.*{what}"):
        read(path)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"text": "cut of', " is not valid json"),
        (b'["text"]', " holds a json array, not an object"),
        (b'{"text": "\xff"}', " is not valid json"),
        (b'{"text": "\\ud800"}', ": the text in column 'text' is not valid Unicode text"),
    ],
)
def test_bad_json_line(tmp_path, line, what):
    path = write(tmp_path / "a.jsonl", json_lines(["good"]) + line + b"\n" + json_lines(["good"]))
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2{what}"):
        read(path)


def test_corrupt_parquet(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [f"document number {i} of many" for i in range(5000)])
    data = path.read_bytes()
    middle = len(data) * 2 // 3
    text_page = data[:middle] + b"\xff" * 1000 + data[middle + 1000 :]
    for damaged in (data[: len(data) // 2], b"", b"PAR1 not really", text_page):
        with pytest.raises(DataError, match=r"a\.parquet is not a readable parquet file"):
            read(write(path, damaged))


def test_damaged_zst(tmp_path):
    data = compress(json_lines([f"document number {i} of many" for i in range(5000)]))
    cut = write(tmp_path / "a.jsonl.zst", data[: len(data) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.zst is not a readable zstd-compressed file.*[Tt]runcated"):
        read(cut)
    with pytest.raises(DataError, match=r"is not a readable zstd-compressed file"):
        read(write(cut, b"plain text"))


def test_text_file_that_is_not_utf8(tmp_path):
    with pytest.raises(DataError, match=r"a\.txt, row 0 is not UTF-8 text \(byte 2"):
        read(write(tmp_path / "a.txt", b"ab\xff"))


def test_empty_text_file(tmp_path):
    with pytest.raises(DataError, match=r"a\.txt, row 0: the text in column .text. is empty"):
        read(write(tmp_path / "a.txt", b" \n"))
