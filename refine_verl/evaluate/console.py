"""`refine-lm-eval`: lm-evaluation-harness's command line, with our models as model `refine`."""

from __future__ import annotations

import argparse
import sys

from refine_verl.command.front import BAD_INPUT, say_error
from refine_verl.config import ConfigError, Refusal

INSTALL = "pip install 'refine_verl[eval]'"


def require_lm_eval() -> None:
    """Import lm-evaluation-harness with our model in its registry.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import refine_verl.evaluate.lm  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise ConfigError("", f"lm-evaluation-harness is not installed. Install it with: {INSTALL}") from error


def main() -> int:
    """Run the harness's command line; 2 where model arguments, model or data cannot be used."""
    try:
        require_lm_eval()
        if _asks_for_vllm(sys.argv[1:]):
            from refine_verl.evaluate.lm_vllm import prepare

            prepare()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except Refusal as error:
        return say_error(str(error), BAD_INPUT)
    return 0


def _asks_for_vllm(arguments: list[str]) -> bool:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", "-M")
    return parser.parse_known_args(arguments)[0].model == "vllm"
