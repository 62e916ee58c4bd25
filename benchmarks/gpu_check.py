"""Everything worth knowing of a new GPU machine, in at most eight minutes.

    python -m benchmarks.gpu_check                  # all pieces; make gpu-check
    python -m benchmarks.gpu_check modes longest    # these
    python -m benchmarks.gpu_check --list

Each piece (`benchmarks.gpu_pieces`) runs in a process of its own, the most valuable first. It gets as long as its own
limit and what is left of the whole allow. One that fails is reported and the next one begins; the file of figures is
written after each. Exit code 1 if a piece failed, did not finish, was cut off by the end of the whole or never began.
Needs torch, triton, transformers and fla only. `--device cpu --size tiny` tries the pieces where there is no GPU; what
it measures is worth nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 480
PASSED, FAILED, TIMED_OUT, CUT_OFF, NOT_RUN = "passed", "failed", "timed out", "cut off", "not run"
"""Cut off and not run: by the end of the time for all pieces. Timed out: by the piece's own limit."""

PIECE_SIZES = {"full": (2048, 4096, 8192), "tiny": (32, 64)}
"""Tokens, by ``--size``."""

# What is compiled and tuned in one piece is not compiled and tuned again in the next.
TUNING_KEPT = {"TRITON_CACHE_AUTOTUNING": "1"}
# fla asserts that some operators do not get float32, and Triton multiplies it as TF32: no comparison could be strict.
FLOAT32 = {"PYTHONOPTIMIZE": "1", "TRITON_F32_DEFAULT": "ieee"}


@dataclass(frozen=True)
class Piece:
    """One part of the check.

    Attributes:
        about: what it does.
        seconds: the most it may take.
        environment: variables of its process.
    """

    about: str
    seconds: int
    environment: dict[str, str] = field(default_factory=dict)


# By value: whether it computes the right thing, what it costs, what is to be set otherwise. The limits add up to more
# than there is, because a piece seldom needs its own.
PIECES = {
    "doctor": Piece("versions, and the kernels' gradients against token-by-token recurrences", 75),
    "bf16": Piece("forked equals recomputed under bf16 autocast: three families, values and gradients", 100),
    "modes": Piece("every mode of the actor for three families, with and without activation checkpointing", 100),
    "hybrids": Piece("the same for three hybrids: attention over shared keys and values, and its gradients", 100),
    "cost": Piece("seconds and peak memory of DeltaNet-1.3B's steps, 16K tokens: sft, two-phase, fused", 120),
    "float32": Piece("forked equals recomputed in float32, more strictly", 75, FLOAT32),
    "longest": Piece("the longest document of DeltaNet-1.3B that fits", 90),
    "piece_sizes": Piece("seconds of these steps with operators cut into pieces of 2048, 4096 and 8192 tokens", 75),
    "cost_lact": Piece("seconds and peak memory of LaCT-760M's steps", 90),
    "launches": Piece("kernel launches of a document of 16K tokens, DeltaNet-1.3B", 45),
    "cost_kept": Piece("DeltaNet-1.3B's steps without activation checkpointing", 75),
}


def run_piece(name: str, device: str, size: str, seconds: float) -> dict[str, Any]:
    """Run one piece in a process of its own.

    Args:
        name: of `PIECES`.
        device, size: see the command line.
        seconds: the most it may take.

    Returns:
        ``status``, ``seconds``, the ``figures`` it left (maybe not all of them, if it failed), and the ``error``.
    """
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "figures.json"
        command = [sys.executable, "-m", "benchmarks.gpu_pieces", name, device, size, str(target)]
        environment = {**os.environ, **TUNING_KEPT, **PIECES[name].environment, "PYTHONPATH": _search_path()}
        started = time.monotonic()
        try:
            done = subprocess.run(
                command, env=environment, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=seconds
            )
            status, error = (PASSED, "") if done.returncode == 0 else (FAILED, _last_lines(done.stderr))
        except subprocess.TimeoutExpired:
            status, error = TIMED_OUT, f"not finished after {seconds:.0f} s"
        figures = json.loads(target.read_text()) if target.exists() else {}
    taken = round(time.monotonic() - started, 1)
    return {"status": status, "seconds": taken, "figures": figures, **({"error": error} if error else {})}


def _search_path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-5:]) or "it said nothing"


def check(names: list[str], device: str, size: str, target: Path, total: float = TOTAL_SECONDS) -> bool:
    """Run pieces one after another and write ``target`` after each; whether all passed."""
    started = time.monotonic()
    report: dict[str, Any] = {"device": device, "size": size, "environment": {}, "pieces": {}}
    over = f"the {total:g} s for all pieces were over"
    for name in names:
        left = total - (time.monotonic() - started)
        seconds = min(PIECES[name].seconds, left)
        if left > 0:
            result = run_piece(name, device, size, seconds)
            if result["status"] == TIMED_OUT and seconds < PIECES[name].seconds:
                result |= {"status": CUT_OFF, "error": over}
        else:
            result = {
                "status": NOT_RUN,
                "seconds": 0.0,
                "figures": {},
                "error": f"the {total:g} s for all pieces were over",
            }
        report["environment"] = result["figures"].pop("environment", None) or report["environment"]
        report["pieces"][name] = result
        _write(target, report)
        _say(name, result)
    failed = [name for name, result in report["pieces"].items() if result["status"] != PASSED]
    print(f"{target} has the figures." + (f" Not passed: {', '.join(failed)}." if failed else " All pieces passed."))
    return not failed


def _write(target: Path, report: dict[str, Any]) -> None:
    temporary = target.with_name(f"{target.name}.tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    temporary.replace(target)


def _say(name: str, result: dict[str, Any]) -> None:
    print(f"{name:<13}{result['status']:<12}{result['seconds']:>6.1f} s", flush=True)
    for line in result.get("error", "").splitlines():
        print(f"    {line}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help=f"of: {', '.join(PIECES)} (default: all)")
    parser.add_argument("--list", action="store_true", help="say what the pieces are, and end")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="of models and documents")
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), help="where the figures go")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for all pieces together")
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.pieces if name not in PIECES]:
        parser.error(f"no such piece: {', '.join(unknown)}. There are: {', '.join(PIECES)}")
    if arguments.list:
        print("\n".join(f"{name:<13}{piece.seconds:>4} s  {piece.about}" for name, piece in PIECES.items()))
        return 0
    passed = check(
        arguments.pieces or list(PIECES), arguments.device, arguments.size, arguments.json, arguments.seconds
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
