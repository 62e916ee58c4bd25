"""Mid-training on real text in miniature: REFINE against the next-token loss, from base models at their plateau.

    python -m examples.text --fast
    python -m examples.text --many   # the runs with many rollouts, from a base trained anew; the rest stays

Everything that is finished is kept in the output directory; the same command resumes where it was cut.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from examples.miniature.results import ROOT, assemble, project_sources
from examples.text.plan import PLANS, collect


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the plan, then make the page with its figures."""
    parser = argparse.ArgumentParser("python -m examples.text", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--fast", action="store_true", help="a smaller model and few steps: three minutes")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: outputs/text, with --fast outputs/text_fast")
    parser.add_argument("--threads", type=int, default=1, help="of the processor (default: 1)")
    parser.add_argument(
        "--many", action="store_true", help="only the runs with many rollouts and the gradients; the rest stays"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.getLogger("refine_verl").setLevel(logging.ERROR)  # random weights are meant here
    out = options.out or Path("outputs/text_fast" if options.fast else "outputs/text")
    collect(PLANS["fast" if options.fast else "full"], out, only_many=options.many)
    print(publish(out, whole=not options.fast, only_many=options.many))
    return 0


def publish(out: Path, whole: bool, only_many: bool = False) -> Path:
    """Make the page: of a whole full run the project's, else one in ``out``.

    ``only_many``: what else the project's results have stays in them.
    """
    if not whole:
        return assemble({"text": out / "results.json"}, out)
    file, found = project_sources()["text"], (out / "results.json").read_text()
    if only_many:
        found = json.dumps(with_many(json.loads(file.read_text()), json.loads(found)), indent=1) + "\n"
    file.write_text(found)
    return assemble(project_sources(), ROOT / "docs")


def with_many(known: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Results with the runs of ``new`` with many rollouts and its gradients, which have a base model of their own."""
    more = {name: new["plan"][name] for name in ("many_steps", "many_seeds")}
    taken = {name: new[name] for name in ("many", "signal")}
    return {**known, "plan": {**known["plan"], **more}, **taken, "many_bases": new["bases"]}


if __name__ == "__main__":
    sys.exit(main())
