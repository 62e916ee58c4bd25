"""`python tests/trajectories/record.py OUT_DIR [--only NAME] [--commands]`: what the code does, written down.

Without options every scenario is run and OUT_DIR/NAME.json gets its metrics, answers, files and weights. With
`--commands` OUT_DIR/commands.json gets the outputs of the command lines instead. `--old-run DIR` makes a run directory
to be resumed later, and OUT_DIR/old_run.json, the uninterrupted run; `--resume-old-run DIR` goes on from one and writes
OUT_DIR/old_run.json. The package is the one that PYTHONPATH names, or this checkout's.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from trajectories.process import (  # noqa: E402
    Done,
    normal_lines,
    package_directory,
    run_module,
    scratch_directory,
)
from trajectories.scenarios import OLD_RUN, OLD_RUN_RESUMED, SCENARIOS, Scenario, add_model, write_data  # noqa: E402

LEFT_OUT = {
    "timing_s/": "seconds",
    "perf/tokens_per_second": "a speed",
    "actor/log_prob_gap": "rounding, and nothing else, in float32",
    "answer/log_prob_gap": "the same",
    "perf/max_memory_gb": "memory of the process, which depends on the allocator and on what was imported",
}
"""Metrics that are not recorded, by the beginning of their name, and why: they differ from run to run."""

_PACKAGES = ("torch", "transformers", "flash-linear-attention", "verl", "ray", "numpy", "triton")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("out", type=Path, help="directory for the recordings")
    parser.add_argument("--only", action="append", choices=[item.name for item in SCENARIOS], help="this scenario")
    parser.add_argument("--commands", action="store_true", help="the outputs of the command lines instead")
    parser.add_argument("--old-run", type=Path, metavar="DIR", help="make a run directory to be resumed later")
    parser.add_argument("--resume-old-run", type=Path, metavar="DIR", help="go on from such a directory")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    with scratch_directory() as scratch:
        _say(f"recording {package_directory(scratch)}")
    started = time.monotonic()
    if options.commands:
        from trajectories.commands import record_commands

        write(options.out / "commands.json", record_commands())
    elif options.old_run:
        write(options.out / "old_run.json", make_old_run(options.old_run))
    elif options.resume_old_run:
        write(options.out / "old_run.json", resume_old_run(options.resume_old_run))
    else:
        _record_scenarios(options.out, options.only or [item.name for item in SCENARIOS])
    _say(f"{time.monotonic() - started:.0f} s in all")
    return 0


def _record_scenarios(out: Path, names: list[str]) -> None:
    for scenario in SCENARIOS:
        if scenario.name in names:
            started = time.monotonic()
            write(out / f"{scenario.name}.json", record(scenario))
            _say(f"{scenario.name}: {time.monotonic() - started:.0f} s")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def write(file: Path, recording: dict[str, Any]) -> None:
    """Python writes a float with as many digits as tell it from its neighbours."""
    file.write_text(json.dumps(recording, indent=1, ensure_ascii=False) + "\n")


Run: TypeAlias = Callable[[str, Sequence[str], Path, Path], Done]


def record(scenario: Scenario, run: Run = run_module) -> dict[str, Any]:
    """Run all commands of a scenario, in a directory of its own.

    Args:
        run: runs a module with arguments, in a directory and with one for its caches.

    Raises:
        RuntimeError: a command failed.
    """
    with scratch_directory() as scratch:
        package = package_directory(scratch)
        data, runs = scratch / "data", scratch / "runs"
        write_data(data)
        add_model(data)
        parts = []
        for command in scenario.commands:
            if command.killed_after is not None:
                cut_back(runs / command.run, command.killed_after)
            done = _train(command.resolve(data, runs), scratch, run)
            output = normal_lines(done.stdout, scratch, package), normal_lines(done.stderr, scratch, package)
            parts.append({**read_run(runs / command.run), "stdout": output[0], "stderr": output[1]})
    recording = {"about": scenario.about, "versions": versions(), "run": parts[0]}
    if len(parts) > 1:
        equal = parts[0]["steps"] == parts[1]["steps"] and parts[0]["model"] == parts[1]["model"]
        recording |= {"resumed_is_equal": equal, "resumed": parts[1]}
    return recording


def cut_back(run: Path, step: int) -> None:
    """Leave what a kill leaves: the checkpoint of `step`, metrics of that and the next step and half a line."""
    for path in run.glob("global_step_*"):
        if path.name != f"global_step_{step}":
            shutil.rmtree(path)
    shutil.rmtree(run / "model")
    (run / "report.html").unlink()
    (run / "latest_checkpointed_iteration.txt").write_text(str(step))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[: step + 2]) + lines[step + 2][:40])


def _train(arguments: list[str], scratch: Path, run: Run = run_module) -> Done:
    done = run("refine_verl.main", arguments, scratch, scratch)
    if done.code:
        raise RuntimeError(
            f"{shlex.join(arguments)}: exit code {done.code}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        )
    return done


def versions() -> dict[str, str]:
    """Of all that has a say in the last bits."""
    import torch

    there = {item.metadata["Name"]: item.version for item in importlib.metadata.distributions()}
    found = {name: there[name] for name in _PACKAGES if name in there}
    return {"python": platform.python_version(), **found, "processor": _processor(torch.backends.cpu)}


def _processor(backend: Any) -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    names = [fields.get(key, "?") for key in ("model name", "cpu family", "model")]
    return f"{names[0]}, family {names[1]}, model {names[2]}, {backend.get_cpu_capability()}"


# Run directories


def read_run(directory: Path) -> dict[str, Any]:
    """What a run directory holds: every step's metrics, answers, files and the final weights."""
    files = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    model = directory / "model" / "model.safetensors"
    return {
        "steps": [comparable(json.loads(line)) for line in (directory / "metrics.jsonl").read_text().splitlines()],
        "predictions": _lines(directory / "predictions.jsonl"),
        "checkpoint_files": sum(name.startswith("global_step_") for name in files),
        "files": files,
        "model": read_weights(model) if model.is_file() else None,
    }


def comparable(metrics: dict[str, Any]) -> dict[str, Any]:
    """A step's metrics without those of ``LEFT_OUT``."""
    return {name: value for name, value in metrics.items() if not name.startswith(tuple(LEFT_OUT))}


def _lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def read_weights(file: Path) -> dict[str, Any]:
    """Norms of all tensors, and what is equal only where every bit is: the hash of each and of all."""
    from safetensors import safe_open

    whole = hashlib.sha256()
    norms, tensors = {}, {}
    with safe_open(file, framework="np") as content:
        for name in sorted(content.keys()):
            tensor = np.ascontiguousarray(content.get_tensor(name))
            data = tensor.tobytes()
            whole.update(f"{name} {tensor.dtype} {tensor.shape} ".encode() + data)
            norms[name] = float(np.linalg.norm(tensor.astype(np.float64)))
            tensors[name] = f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()[:12]}"
    return {"norms": norms, "hashes": {"sha256": whole.hexdigest(), **tensors}}


# A run directory for later versions


def make_old_run(directory: Path) -> dict[str, Any]:
    """Make DIRECTORY/data and DIRECTORY/run, a run of two steps.

    Returns:
        The recording of the uninterrupted run.
    """
    shutil.rmtree(directory, ignore_errors=True)
    write_data(directory / "data")
    with scratch_directory() as scratch:
        _train(OLD_RUN.resolve(directory / "data", directory), scratch)
        _train(OLD_RUN_RESUMED.resolve(directory / "data", scratch), scratch)
        expected = read_run(scratch / "run")
    shutil.rmtree(directory / "data" / "cache")
    return {"versions": versions(), "run": expected}


def resume_old_run(directory: Path, run: Run = run_module) -> dict[str, Any]:
    """Go on from such a directory, in place."""
    with scratch_directory() as scratch:
        _train(OLD_RUN_RESUMED.resolve(directory / "data", directory), scratch, run)
    return {"versions": versions(), "run": read_run(directory / "run")}


if __name__ == "__main__":
    sys.exit(main())
