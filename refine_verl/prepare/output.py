"""Output directories: files appear whole or not at all, and an interrupted command resumes where it was."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from refine_verl.config import DataError
from refine_verl.data.cache import make_key
from refine_verl.record.files import AlreadyLockedError, locked

MANIFEST = ".prepare.json"
_PARTIAL = ".partial-"
_LOCK = ".prepare.lock"
COMPRESSION = "zstd"


class Output:
    """A directory that one command fills, with a manifest of what is finished. Use it in a `with`.

    A command that fails before anything is finished leaves nothing behind.

    Args:
        directory: is created where it is missing.
        command: name of the command, for messages.
        arguments: everything the content depends on, inputs and tokenizer included; json-serialisable.

    Raises:
        DataError: on entering, if the directory cannot be written, is in use by another process, or holds the
            output of other arguments or other files.
    """

    def __init__(self, directory: Path, command: str, arguments: Mapping[str, Any]) -> None:
        self.directory, self.command = directory, command
        self.done: dict[str, dict[str, Any]] = {}
        self._key = make_key([command, arguments])
        self._stack = ExitStack()

    def __enter__(self) -> Output:
        """Take the directory, and read what is finished in it."""
        with ExitStack() as stack:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                stack.callback(self._remove_if_empty)
                stack.enter_context(locked(self.directory / _LOCK))
                self._open()
                stack.callback(self._remove_unused_manifest)
            except AlreadyLockedError as error:
                raise DataError(
                    f"--out {self.directory} is being filled by another process. Wait for it, or give another one."
                ) from error
            except OSError as error:
                raise DataError(
                    f"--out {self.directory} cannot be written: {error}. Choose another directory."
                ) from error
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _open(self) -> None:
        manifest = self.directory / MANIFEST
        names = sorted(path.name for path in self.directory.iterdir())
        others = [name for name in names if not name.startswith((_PARTIAL, _LOCK))]
        if manifest.exists():
            self.done = self._read(manifest)
        elif others:
            raise DataError(
                f"--out {self.directory} holds other files ({', '.join(others[:3])}{' ...' * (len(others) > 3)}), "
                f"not the output of `{self.command}`. Give an empty or new directory."
            )
        for left in self.directory.glob(f"{_PARTIAL}*"):  # of a process that was killed: the lock is ours
            left.unlink()
        if not manifest.exists():
            self._save()

    def _remove_unused_manifest(self) -> None:
        if not self.done:
            (self.directory / MANIFEST).unlink(missing_ok=True)

    def _remove_if_empty(self) -> None:
        if not any(self.directory.iterdir()):
            self.directory.rmdir()

    def _read(self, manifest: Path) -> dict[str, dict[str, Any]]:
        try:
            content = json.loads(manifest.read_text())
            key, done = content["key"], dict(content["done"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{manifest} cannot be read ({error}); delete {self.directory} and start over.") from error
        if key != self._key:
            raise DataError(
                f"--out {self.directory} holds the output of `{self.command}` with other arguments, another tokenizer "
                "or changed input files. Give another directory, or delete this one."
            )
        return {name: entry for name, entry in done.items() if (self.directory / name).is_file()}

    def finished(self, name: str) -> dict[str, Any] | None:
        """What `finish` recorded for a file that is complete, else None."""
        return self.done.get(name)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path to write to. It becomes `name` on leaving, unless there was an error or it was deleted meanwhile."""
        partial = self.directory / f"{_PARTIAL}{name}"
        try:
            yield partial
            if partial.exists():
                partial.replace(self.directory / name)
        except OSError as error:
            raise DataError(f"{self.directory / name} cannot be written: {error}.") from error
        finally:
            partial.unlink(missing_ok=True)

    def finish(self, name: str, entry: Mapping[str, Any]) -> None:
        """Record that `name` is complete, with what the command wants to know about it later."""
        self.done[name] = dict(entry)
        self._save()

    def remove(self, name: str) -> None:
        """Delete a file that was only a step on the way, and its entry."""
        self.done.pop(name, None)
        self._save()
        (self.directory / name).unlink(missing_ok=True)

    def _save(self) -> None:
        with self.writing(MANIFEST) as path:
            path.write_text(json.dumps({"key": self._key, "done": self.done}, indent=1) + "\n")


def write_table(output: Output, name: str, table: pa.Table, entry: Mapping[str, Any]) -> None:
    """Write a table as one parquet file and record it."""
    with output.writing(name) as path:
        pq.write_table(table, path, compression=COMPRESSION)
    output.finish(name, entry)


def join_parts(output: Output, name: str, parts: list[str], entry: Mapping[str, Any]) -> None:
    """Put part files together into one, a row group each, and delete them."""
    schema = pq.read_schema(output.directory / parts[0])
    with output.writing(name) as path, pq.ParquetWriter(path, schema, compression=COMPRESSION) as writer:
        for part in parts:
            writer.write_table(pq.read_table(output.directory / part))
    output.finish(name, entry)
    for part in parts:
        output.remove(part)
