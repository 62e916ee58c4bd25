"""Assembles ``docs/results.md`` from the results that runs left in the examples' folders.

    python -m examples.miniature.results [--docs DIR]

Every example that has ``examples/NAME/results.json`` contributes a section: ``examples/NAME/section.py`` has
``section(results, figures_in)``, Markdown with headings from level 2, and ``figures(results)``, SVG by file name
(``NAME_*.svg``). Tables and figures are made from these files alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EXAMPLES = ("recall", "paths", "text", "keep")
ROOT = Path(__file__).resolve().parents[2]
INTRODUCTION = """# Results in miniature

What REFINE does to models small enough for a laptop, against the next-token loss alone (SFT), with the package's own
parts: positions, forked rollouts, rewards, advantages and the objective are those of the trainer. Every comparison
starts from the same weights and sees the same data in the same order; intervals are 95% Student-t intervals over seeds,
and a difference is the mean over seeds of what two methods differ by on the same seed. Intervals are not corrected for
their number: of twenty comparisons of equals, one is expected to leave zero outside.

These are results of miniatures. They say how the estimators behave and what the machinery does; they do not repeat the
paper's experiments, whose models are ten thousand times as large. `python -m examples.miniature.results` makes this
page from the runs' files.
"""


def project_sources() -> dict[str, Path]:
    """The committed results, from which the project's own page is made."""
    return {name: ROOT / f"examples/{name}/results.json" for name in EXAMPLES}


class ResultsError(Exception):
    """Results that cannot be shown: which file, and what is wrong with it."""


def read_results(path: Path) -> dict[str, Any]:
    """The results of one example.

    Raises:
        ResultsError: no JSON object there.
    """
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise ResultsError(f"{path}: no JSON ({error}). Run the example again.") from error
    if not isinstance(results, dict):
        raise ResultsError(f"{path}: expected an object, got a {type(results).__name__}. Run the example again.")
    return results


def assemble(sources: Mapping[str, Path], docs: Path) -> Path:
    """Write ``results.md`` and ``figures/`` below ``docs``; returns the page.

    Args:
        sources: results file by example; those that do not exist are left out.
        docs: directory of the page.

    Raises:
        ResultsError: none of the files exists, or one cannot be shown; then nothing is written.
    """
    found = {name: path for name, path in sources.items() if path.is_file()}
    if not found:
        names = ", ".join(str(path) for path in sources.values())
        raise ResultsError(f"no results: none of {names} exists. Run python -m examples.recall first.")
    texts, drawn = [], {}
    for name, path in found.items():
        module, results = importlib.import_module(f"examples.{name}.section"), read_results(path)
        try:
            texts.append(module.section(results, "figures"))
            figures: dict[str, str] = module.figures(results)
        except KeyError as error:
            raise ResultsError(f"{path}: no {error} in it. Run the example again.") from error
        wrong = [figure for figure in figures if not re.fullmatch(rf"{name}_\w+\.svg", figure)]
        if wrong:
            raise ResultsError(f"examples.{name}: figures must be named {name}_*.svg, not {', '.join(wrong)}")
        drawn.update(figures)
    folder, page = docs / "figures", docs / "results.md"
    folder.mkdir(parents=True, exist_ok=True)
    for name in found:
        for old in set(folder.glob(f"{name}_*.svg")) - {folder / figure for figure in drawn}:
            old.unlink()
    for figure, svg in drawn.items():
        (folder / figure).write_text(svg)
    page.write_text("\n".join([INTRODUCTION, *(text.strip() + "\n" for text in texts)]))
    return page


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="directory of the page (default: docs)")
    arguments = parser.parse_args()
    try:
        print(assemble(project_sources(), arguments.docs))
    except ResultsError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
