"""Mid-training on real text in miniature: REFINE against the next-token loss, from base models at their plateau.

    python -m examples.text --fast

Everything that is finished is kept in the output directory; the same command goes on where it was cut.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from examples.text.plan import PLANS, collect
from examples.text.section import figures, section


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the plan, then write ``results.json``, ``section.md`` and the figures."""
    parser = argparse.ArgumentParser("python -m examples.text", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--fast", action="store_true", help="a smaller model and few steps: three minutes")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: outputs/text, with --fast outputs/text_fast")
    parser.add_argument("--threads", type=int, default=1, help="of the processor (default: 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.getLogger("refine_verl").setLevel(logging.ERROR)  # random weights are meant here
    out = options.out or Path("outputs/text_fast" if options.fast else "outputs/text")
    results = collect(PLANS["fast" if options.fast else "full"], out)
    (out / "section.md").write_text(section(results))
    for name, drawing in figures(results).items():
        (out / name).write_text(drawing)
    print(f"{out / 'results.json'}, {out / 'section.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
