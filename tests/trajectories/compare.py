"""`python tests/trajectories/compare.py OLD NEW [--exact]`: what is different in two recordings.

OLD and NEW are directories of recordings, or two files. Floats may differ by the tolerance of `FLOATS` unless `--exact`
is given, which also compares hashes of weights; everything else must be equal. Versions are shown but do not count.
Exit status: 0 no differences, 1 some.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLOATS = 1e-4
"""Relative: another processor or build of torch adds up in another order."""
NEAR_ZERO = 1e-6
"""Absolute, for sums of terms that cancel: policy loss and divergence."""

IGNORED = ("versions",)
HASHED = ("hashes",)
"""Equal only where every bit is."""
PROGRESS = "training "
"""The lines that begin so hold rounded metrics, which may be rounded otherwise."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--exact", action="store_true", help="bit for bit")
    options = parser.parse_args(argv)
    found = 0
    names = _names(options.old, options.new)
    for old, new in names:
        for line in _compare_files(old, new, 0.0 if options.exact else FLOATS):
            found += 1
            sys.stdout.write(f"{new.stem}: {line}\n")
    sys.stdout.write(f"{len(names)} recordings compared, {found} differences\n")
    return int(bool(found))


def _names(old: Path, new: Path) -> list[tuple[Path, Path]]:
    if old.is_file():
        return [(old, new)]
    names = sorted({path.name for directory in (old, new) for path in directory.glob("*.json")})
    return [(old / name, new / name) for name in names]


def _compare_files(old: Path, new: Path, tolerance: float) -> Iterator[str]:
    missing = [path for path in (old, new) if not path.is_file()]
    if missing:
        yield f"{missing[0]} is missing"
        return
    left, right = (json.loads(path.read_text()) for path in (old, new))
    if left.get("versions") != right.get("versions"):
        sys.stdout.write(f"{new.stem}: note: recorded with {left['versions']} and {right['versions']}\n")
    yield from differences(left, right, tolerance)


def differences(old: Any, new: Any, tolerance: float = FLOATS, place: str = "") -> Iterator[str]:
    """A line for each place where two recordings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            if key in IGNORED or (key in HASHED and tolerance):
                continue
            where = f"{place}.{key}" if place else key
            if key not in old or key not in new:
                yield f"{where}: only in the {'new' if key in new else 'old'} one"
            else:
                yield from differences(old[key], new[key], tolerance, where)
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            yield f"{place}: {len(old)} entries, now {len(new)}: {_first_other(old, new)}"
            return
        for index, (left, right) in enumerate(zip(old, new, strict=True)):
            yield from differences(left, right, tolerance, f"{place}[{index}]")
    elif not _equal(old, new, tolerance):
        yield f"{place}: {old!r}, now {new!r}"


def _first_other(old: list[Any], new: list[Any]) -> str:
    for left, right in zip(old, new, strict=False):
        if left != right:
            return f"{left!r}, now {right!r}"
    longer = old if len(old) > len(new) else new
    return f"{'no longer' if longer is old else 'now also'} {longer[min(len(old), len(new))]!r}"


def _equal(old: Any, new: Any, tolerance: float) -> bool:
    if type(old) is not type(new):
        return False
    if old == new or tolerance == 0:
        return bool(old == new) or (isinstance(old, float) and math.isnan(old) and math.isnan(new))
    if isinstance(old, float):
        return math.isclose(old, new, rel_tol=tolerance, abs_tol=min(tolerance, NEAR_ZERO))
    return isinstance(old, str) and old.startswith(PROGRESS) and new.startswith(PROGRESS)


if __name__ == "__main__":
    sys.exit(main())
