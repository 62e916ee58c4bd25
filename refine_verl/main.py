"""`python -m refine_verl.main recipe=NAME key=value ...`: compose, check, prepare, train.

Exit codes are those of all commands (`refine_verl.command.front`), and 130 or 143 for a run that SIGINT or SIGTERM
stopped.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from refine_verl.command.front import FAILED, interruptible, run_command, say, say_error, show
from refine_verl.command.jobs import run_jobs
from refine_verl.compose.naming import given_overrides
from refine_verl.compose.recipes import RECIPES_PATH_VARIABLE, broken_configs, find_configs
from refine_verl.compose.validate import ValidConfig
from refine_verl.config import ConfigError, ModelError, Refusal, RunFailed, list_settings
from refine_verl.trainer.signals import Stopped, StopSignals

logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

USAGE = f"""\
python -m refine_verl.main recipe=NAME [model=PRESET] [KEY=VALUE ...]

Trains a fast-weight language model with REFINE on stock verl, on CPU or GPUs.

  python -m refine_verl.main recipe=quickstart
  python -m refine_verl.main recipe=midtrain model.path=DIR data.train_files=FILES
  python -m refine_verl.main recipe=[midtrain,mine] refine.nsp.chunks=4
  python -m refine_verl.main -m recipe=midtrain refine.nsp.chunks=2,4,8 ...    one run per value

  --cfg job --resolve   print the configuration and stop
  --config-dir DIR      more recipes (DIR/recipe/NAME.yaml, their first line `# @package _global_`) and
                        presets (DIR/model/NAME.yaml)
  --hydra-help          Hydra's own options

Recipes of your own: set {RECIPES_PATH_VARIABLE}=DIR[{os.pathsep}DIR...] to directories with NAME.yaml files.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        argv: arguments without the program's name; default: the process's.
    """
    with StopSignals() as signals:
        return run_command(argv, help=_help, run=lambda given: _main(given, signals))


def _main(arguments: list[str], signals: StopSignals) -> int:
    logging.getLogger("refine_verl").setLevel(logging.INFO)
    try:
        for broken in broken_configs().values():
            logger.warning("%s It is left out.", broken)
        with interruptible(lambda: signals.raised):
            return run_jobs(arguments, lambda valid: run(valid, signals), check=_check_job)
    except Stopped as stop:
        return say(str(stop), signals.exit_code)
    except KeyboardInterrupt:
        name = signals.received.name if signals.received else "SIGINT"
        cure = "the same command resumes from the last checkpoint, if there is one"
        return say(f"stopped at once by {name}; {cure}", signals.exit_code)


def _check_job(valid: ValidConfig) -> None:
    from refine_verl.preflight.run import check_run

    check_run(valid)


def run(valid: ValidConfig, signals: StopSignals | None = None) -> int:
    """Prepare the documents of a checked configuration and train. Returns the exit code.

    Args:
        valid: from `refine_verl.compose.validate.validate`.
        signals: what asks the run to stop; None: nothing does.

    Raises:
        Refusal: a file, model, cluster or checkpoint that cannot be used; nothing is written then.
        RunFailed: what ended the run, where one line says it.
    """
    # Only a sound configuration is worth the seconds that torch, transformers and verl take to load.
    from refine_verl.preflight.run import prepare_run
    from refine_verl.record.disk_space import free_space
    from refine_verl.trainer.launch import train

    directory = valid.config.trainer.default_local_dir
    try:
        prepared = prepare_run(valid, starts_here=True)
    except OSError as error:
        raise Refusal(f"while files were read and tokenised (data.cache_dir): {error}") from error
    try:
        launch_config = prepared.launch_config()
    except OSError as error:
        raise ConfigError("trainer.default_local_dir", f"{directory}: {error}") from error
    try:
        signals = signals or StopSignals()
        with interruptible(lambda: signals.raised):
            run_dir = train(launch_config, signals, given_overrides())
    except ModelError as error:  # from a worker, wrapped by Ray with its traceback
        return say_error(str(getattr(error, "cause", error)), FAILED)
    except (ConfigError, RunFailed):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            message = f"{error} ({free_space(Path(directory))}). Free some space; the same command resumes."
            return say_error(message, FAILED)
        traceback.print_exc()
        return FAILED
    show(_written_files(run_dir))
    return 0


def _written_files(run_dir: Path) -> str:
    """What the run directory holds, and what to do next."""
    contents = {
        "report.html": "curves of the run",
        "model": "the trained model, for AutoModelForCausalLM.from_pretrained",
        "adapter": "the trained LoRA adapter, for PeftModel.from_pretrained",
        "predictions.jsonl": "every generated answer with its scores",
        "metrics.jsonl": "every metric of every step",
        "config.yaml": "the resolved configuration",
    }
    names = [name for name in contents if (run_dir / name).exists()]
    width = max(map(len, names), default=0) + 1
    lines = [f"\nThe run is in {run_dir}", *(f"  {name:<{width}} {contents[name]}" for name in names)]
    if (run_dir / "model").is_dir():
        from refine_verl.command.show import typed

        model = typed("model.path", run_dir / "model")
        lines += [
            "Next: train this model on documents of your own (parquet, jsonl, txt or a directory of them)",
            f"  python -m refine_verl.main recipe=midtrain {model} data.train_files=FILES",
        ]
    elif (run_dir / "adapter").is_dir():
        from refine_verl.command.show import typed

        lines += [
            "Next: evaluate it (adapter=DIR), or merge it into a model that every command takes",
            f"  python -m refine_verl.export {typed('adapter', run_dir / 'adapter')} out=DIR",
        ]
    return "\n".join(lines)


def _help(_: list[str]) -> str:
    lines = [USAGE]
    files = find_configs()
    for title, group in (("Recipes (recipe=NAME)", "recipe"), ("Model presets (model=NAME)", "model")):
        lines += [f"{title}:", *(f"  {file.name:<16} {file.summary}" for file in files if file.group == group), ""]
    lines.append("Keys (verl's own keys work under verl's names, e.g. actor_rollout_ref.actor.optim.lr=1e-6):")
    for setting in list_settings():
        lines.append(f"  {setting.key}={'null' if setting.default is None else setting.default}\n      {setting.help}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
