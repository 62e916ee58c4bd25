"""Put the figures of `benchmarks.gpu_check` into docs/performance.md.

    python -m benchmarks.gpu_section gpu_check.json --commit COMMIT

Replaces what stands between the two marks there. Figures of another device than a GPU, or of tiny models, are refused.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import PASSED, PIECE_SIZES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- gpu check -->\n", "<!-- end of gpu check -->\n"
KINDS = {"sft": "next-token step", "fork": "two-phase step", "fused": "fused step"}
COSTS = {
    "cost": "DeltaNet-1.3B, layers recomputed",
    "cost_kept": "DeltaNet-1.3B, activations kept",
    "cost_lact": "LaCT-760M, layers recomputed",
}


def section(report: dict[str, Any], commit: str) -> str:
    """The figures as Markdown.

    Args:
        report: what `benchmarks.gpu_check` has written.
        commit: what was measured.

    Raises:
        SystemExit: nothing that could be quoted.
    """
    if report["device"] != "cuda" or report["size"] != "full":
        raise SystemExit(
            f"these figures are of device {report['device']}, size {report['size']}. Only those of a GPU and of full "
            "size are quoted: run `make gpu-check` on a GPU machine."
        )
    machine = report["environment"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "triton", "transformers"))
    blocks = [
        f"{machine['device']}, {machine['memory_gib']} GiB, compute capability {machine['capability']}, CUDA "
        f"{machine['cuda']}; {versions}, fla {machine['flash-linear-attention']}, Python {machine['python']}; commit "
        f"`{commit}`; `make gpu-check`.",
        _table(["piece", "", "seconds"], _pieces(report["pieces"])),
        _table(["16K tokens a document", "step", "s", "over next-token", "tokens/s", "peak GiB"], _costs(report)),
        _table(["launches a document", "DeltaNet, 24 layers, 16K tokens"], _launches(report)),
        _table(["operators of DeltaNet-1.3B in pieces of", "step", "s", "peak GiB"], _piece_sizes(report)),
        _table(["longest document, DeltaNet-1.3B, layers recomputed", "tokens"], _longest(report)),
    ]
    return "\n\n".join(filter(None, blocks)) + "\n"


def _figures(report: dict[str, Any], piece: str) -> dict[str, Any]:
    found: dict[str, Any] = report["pieces"].get(piece, {}).get("figures", {})
    return found


def _pieces(pieces: dict[str, Any]) -> Iterator[list[str]]:
    for name, piece in pieces.items():
        reason = "" if piece["status"] == PASSED else f": {piece['error'].splitlines()[-1]}".replace("|", "/")
        yield [f"`{name}`", piece["status"] + reason, f"{piece['seconds']:.0f}"]


def _costs(report: dict[str, Any]) -> Iterator[list[str]]:
    for piece, about in COSTS.items():
        found = _figures(report, piece)
        for kind, name in KINDS.items():
            if f"{kind}_peak_gib" not in found:
                continue
            times = sorted(found.get(f"{kind}_seconds", []))
            median = f"{times[len(times) // 2]:.2f}" if times else "-"
            ratio = "1" if kind == "sft" else _number(found.get(f"{kind}_over_sft"), ".2f")
            speed = _number(found.get(f"{kind}_tokens_per_second"), ",.0f")
            yield [about, name, median, ratio, speed, str(found[f"{kind}_peak_gib"])]


def _launches(report: dict[str, Any]) -> Iterator[list[str]]:
    found = _figures(report, "launches")
    for kind in ("sft", "two-phase", "fused"):
        if kind in found:
            yield [kind, f"{found[kind]:,}"]


def _piece_sizes(report: dict[str, Any]) -> Iterator[list[str]]:
    found = _figures(report, "piece_sizes")
    for kind, name in KINDS.items():
        for size in PIECE_SIZES["full"]:
            if f"{kind}_{size}_peak_gib" in found:
                times = sorted(found.get(f"{kind}_{size}_seconds", []))
                median = f"{times[len(times) // 2]:.2f}" if times else "-"
                yield [f"{size:,}", name, median, str(found[f"{kind}_{size}_peak_gib"])]


def _longest(report: dict[str, Any]) -> Iterator[list[str]]:
    found = _figures(report, "longest")
    for kind, name in KINDS.items():
        if f"{kind}_longest" in found:
            untried = " (longer ones were not tried)" if kind in found.get("longer_were_not_tried", KINDS) else ""
            yield [name, f"{found[f'{kind}_longest']:,}{untried}"]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(titles: list[str], rows: Iterator[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    head = [f"| {' | '.join(titles)} |", f"| {' | '.join('---' for _ in titles)} |"]
    return "\n".join([*head, *lines]) if lines else ""


def put_between(page: str, text: str, begin: str = BEGIN, end: str = END) -> str:
    """The page with other text between the marks."""
    before, _, rest = page.partition(begin)
    _, mark, after = rest.partition(end)
    if not mark:
        raise SystemExit(f"{PAGE} has no {begin.strip()} ... {end.strip()}: put these two lines where figures belong")
    return f"{before}{begin}{text}{end}{after}"


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path)
    parser.add_argument("--commit", required=True, help="the commit that was measured")
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args(argv)
    text = section(json.loads(arguments.figures.read_text()), arguments.commit)
    arguments.page.write_text(put_between(arguments.page.read_text(), text))


if __name__ == "__main__":
    main()
