"""Mid-training on real text in miniature: REFINE against the next-token loss, from base models at their plateau.

    python -m examples.text --fast

Everything that is finished is kept in the output directory; the same command resumes where it was cut.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from examples.miniature.results import ROOT, assemble, project_sources
from examples.text.plan import PLANS, collect


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the plan, then make the page with its figures."""
    parser = argparse.ArgumentParser("python -m examples.text", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--fast", action="store_true", help="a smaller model and few steps: three minutes")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: outputs/text, with --fast outputs/text_fast")
    parser.add_argument("--threads", type=int, default=1, help="of the processor (default: 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.getLogger("refine_verl").setLevel(logging.ERROR)  # random weights are meant here
    out = options.out or Path("outputs/text_fast" if options.fast else "outputs/text")
    collect(PLANS["fast" if options.fast else "full"], out)
    print(publish(out, whole=not options.fast))
    return 0


def publish(out: Path, whole: bool) -> Path:
    """Make the page: of a whole full run the project's, else one in ``out``."""
    if not whole:
        return assemble({"text": out / "results.json"}, out)
    project_sources()["text"].write_bytes((out / "results.json").read_bytes())
    return assemble(project_sources(), ROOT / "docs")


if __name__ == "__main__":
    sys.exit(main())
