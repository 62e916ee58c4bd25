"""Output directories: whole files or none, one process at a time, nothing of another command's."""

import fcntl

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refine_verl.data import DataError
from refine_verl.prepare.output import Output, join_parts, write_table

TABLE = pa.table({"x": [1, 2]})


def test_finished_files_are_remembered(tmp_path):
    with Output(tmp_path / "out", "it", {"a": 1}) as output:
        assert output.finished("a.parquet") is None
        write_table(output, "a.parquet", TABLE, {"rows": 2})
    with Output(tmp_path / "out", "it", {"a": 1}) as output:
        assert output.finished("a.parquet") == {"rows": 2}
        (tmp_path / "out" / "a.parquet").unlink()
    with Output(tmp_path / "out", "it", {"a": 1}) as output:
        assert output.finished("a.parquet") is None
    assert not (tmp_path / "out").exists()


def test_a_failure_while_writing_leaves_no_file(tmp_path):
    with Output(tmp_path / "out", "it", {}) as output:
        write_table(output, "a.parquet", TABLE, {})
        with pytest.raises(RuntimeError), output.writing("b.parquet") as path:
            path.write_text("half")
            raise RuntimeError
        assert sorted(item.name for item in (tmp_path / "out").iterdir()) == [
            ".prepare.json",
            ".prepare.lock",
            "a.parquet",
        ]


def test_remains_of_a_killed_process_are_removed(tmp_path):
    with Output(tmp_path / "out", "it", {}) as output:
        write_table(output, "a.parquet", TABLE, {})
    (tmp_path / "out" / ".partial-xyz").write_text("half")
    (tmp_path / "out" / ".prepare.lock").write_text("")  # the lock itself died with its process
    with Output(tmp_path / "out", "it", {}):
        pass
    assert sorted(item.name for item in (tmp_path / "out").iterdir()) == [".prepare.json", "a.parquet"]


def test_one_process_at_a_time(tmp_path):
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".prepare.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="being filled by another process"), Output(tmp_path / "out", "it", {}):
            pass
    with Output(tmp_path / "out", "it", {}) as output:
        write_table(output, "a.parquet", TABLE, {})


def test_directories_of_others_stay_as_they_are(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds other files \(note.txt\)"), Output(tmp_path / "mine", "it", {}):
        pass
    assert [item.name for item in (tmp_path / "mine").iterdir()] == ["note.txt"]
    with Output(tmp_path / "out", "it", {"a": 1}) as output:
        write_table(output, "a.parquet", TABLE, {})
    with pytest.raises(DataError, match="with other arguments"), Output(tmp_path / "out", "it", {"a": 2}):
        pass
    (tmp_path / "out" / ".prepare.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"), Output(tmp_path / "out", "it", {"a": 1}):
        pass
    assert sorted(item.name for item in (tmp_path / "out").iterdir()) == [".prepare.json", "a.parquet"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"), Output(tmp_path / "file" / "out", "it", {}):
        pass


def test_parts_become_one_file(tmp_path):
    with Output(tmp_path / "out", "it", {}) as output:
        for number in range(3):
            write_table(output, f".part{number}", pa.table({"x": [number]}), {})
        join_parts(output, "all.parquet", [f".part{number}" for number in range(3)], {"rows": 3})
        assert output.done == {"all.parquet": {"rows": 3}}
    assert pq.read_table(tmp_path / "out" / "all.parquet").column("x").to_pylist() == [0, 1, 2]
    assert not list((tmp_path / "out").glob(".part*"))
