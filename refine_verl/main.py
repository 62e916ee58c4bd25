"""`python -m refine_verl.main recipe=NAME key=value ...`: compose, check, prepare, train.

Exit codes: 0 the run finished, 1 it failed, 2 the configuration or its files are unusable (nothing is
written then), 130 and 143 it was stopped by SIGINT or SIGTERM.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from yaml import YAMLError

from refine_verl.command.commandline import (
    CommandLine,
    exclude_shared,
    read_command_line,
    refuse_shared_directory,
    sweep_jobs,
)
from refine_verl.command.quiet import quieten_third_parties
from refine_verl.compose.composition import (
    CONFIG_DIR,
    CONFIG_NAME,
    RECIPES_PATH_VARIABLE,
    ConfigFile,
    base_schema,
    broken_configs,
    compose_config,
    find_configs,
    read_config_dir,
    register_configs,
    without_hydra,
)
from refine_verl.compose.messages import readable
from refine_verl.compose.validate import validate
from refine_verl.config import ConfigError, DataError, ModelError, list_settings
from refine_verl.trainer.signals import Stopped, StopSignals

logger = logging.getLogger(__name__)

FAILED = 1
BAD_INPUT = 2
FULL_ERROR = "HYDRA_FULL_ERROR"
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
        try:
            return _main(list(sys.argv[1:] if argv is None else argv), signals)
        except Stopped as stop:
            return _fail(str(stop), signals.exit_code, prefix="")
        except KeyboardInterrupt:
            name = signals.received.name if signals.received else "SIGINT"
            return _fail(
                f"stopped at once by {name}; the same command goes on from the last checkpoint, if there is one",
                signals.exit_code,
                prefix="",
            )


def _main(arguments: list[str], signals: StopSignals) -> int:
    _configure_logging()
    shows = False
    try:
        if {"-h", "--help"} & set(arguments):
            _print_help()
            return 0
        command = read_command_line(arguments)
        shows = command.shows
        register_configs()
        for broken in broken_configs().values():
            logger.warning("%s It is left out.", broken)
        return _run_hydra(_prepare_sweep(command) if command.multirun else command.arguments, signals)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        return BAD_INPUT if code and shows else code
    except (ConfigError, DataError, HydraException, OmegaConfBaseException, YAMLError) as error:
        return _refuse(error)
    except ValueError as error:
        if not str(error).startswith("Config group override"):
            raise
        return _fail("recipe=, model= and verl's groups take names: recipe=midtrain, model=tiny_deltanet.", BAD_INPUT)


def _prepare_sweep(command: CommandLine) -> list[str]:
    """Check all jobs of a sweep before the first one starts; returns the arguments for Hydra.

    Raises:
        ConfigError, DataError, hydra.errors.HydraException: what is wrong with the first job that cannot run, or two
            jobs with one run directory.
    """
    apart = exclude_shared(command.overrides)
    jobs = sweep_jobs(command.overrides) or []
    directories = [command.config_dir] if command.config_dir else []
    files = find_configs() + [file for item in directories for file in read_config_dir(Path(item))]
    runs = [validate(compose_config([*job, apart, "hydra.mode=MULTIRUN"], directories), files) for job in jobs]
    refuse_shared_directory(jobs, [run.config.trainer.default_local_dir for run in runs])
    quieten_third_parties()
    from refine_verl.preflight.run import check_run

    for valid in runs:
        try:
            check_run(valid)
        except ModelError as error:
            raise ConfigError("", str(error)) from error
    return [*command.arguments, apart]


def _run_hydra(arguments: list[str], signals: StopSignals) -> int:
    """Let Hydra parse `arguments` and call `job`; its errors come out as exceptions, not as messages of its own."""

    def job(config: DictConfig) -> None:
        # leaves with SystemExit unless all went well, which also ends a multirun
        code = run(without_hydra(config), _files_in_use(), signals)
        if code:
            raise SystemExit(code)

    before = sys.argv, os.environ.get(FULL_ERROR)
    sys.argv = [sys.argv[0], *arguments]
    os.environ[FULL_ERROR] = "1"
    try:
        hydra.main(config_path=str(CONFIG_DIR), config_name=CONFIG_NAME, version_base=None)(job)()
    finally:
        sys.argv = before[0]
        _restore_environment(before[1])
    return 0


def _restore_environment(full_error: str | None) -> None:
    if full_error is None:
        os.environ.pop(FULL_ERROR, None)
    else:
        os.environ[FULL_ERROR] = full_error


def run(config: DictConfig, files: Sequence[ConfigFile] = (), signals: StopSignals | None = None) -> int:
    """Check `config`, prepare its documents and train. Returns the exit code.

    Args:
        config: as composed, without Hydra's own section.
        files: recipes and presets that may have contributed, for messages.
        signals: what asks the run to stop; None: nothing does.
    """
    try:
        valid = validate(config, files)
    except (ConfigError, DataError) as error:
        return _refuse(error)
    quieten_third_parties()
    # Only a sound configuration is worth the seconds that torch, transformers and verl take to load.
    from refine_verl.plugin import PluginError
    from refine_verl.preflight.run import prepare_run
    from refine_verl.record.checkpoint_files import CheckpointError
    from refine_verl.record.disk_space import free_space
    from refine_verl.trainer.attempts import WorkerLost
    from refine_verl.trainer.launch import train
    from refine_verl.trainer.refine_trainer import TrainingDiverged
    from refine_verl.trainer.resources import ResourceError

    try:
        prepared = prepare_run(valid, starts_here=True)
    except (ConfigError, DataError, ModelError) as error:
        return _refuse(error)
    except OSError as error:
        return _fail(f"while files were read and tokenised (data.cache_dir): {error}", BAD_INPUT)
    try:
        launch_config = prepared.launch_config()
    except OSError as error:
        return _fail(f"trainer.default_local_dir={valid.config.trainer.default_local_dir}: {error}", BAD_INPUT)
    try:
        run_dir = train(launch_config, signals)
    except ConfigError as error:
        return _refuse(error)
    except ModelError as error:  # from a worker, wrapped by Ray with its traceback
        return _fail(str(getattr(error, "cause", error)))
    except (PluginError, ResourceError, TrainingDiverged, WorkerLost, CheckpointError) as error:
        return _fail(str(error))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            directory = Path(valid.config.trainer.default_local_dir)
            return _fail(f"{error} ({free_space(directory)}). Free some space; the same command goes on.")
        traceback.print_exc()
        return FAILED
    _say_what_is_where(run_dir)
    return 0


def _say_what_is_where(run_dir: Path) -> None:
    console = Console(soft_wrap=True)
    contents = (
        ("report.html", "curves of the run"),
        ("model", "the trained model, for AutoModelForCausalLM.from_pretrained"),
        ("predictions.jsonl", "every generated answer with its scores"),
        ("metrics.jsonl", "every metric of every step"),
        ("config.yaml", "the resolved configuration"),
    )
    lines = [f"\nThe run is in {run_dir}"]
    there = [(name, meaning) for name, meaning in contents if (run_dir / name).exists()]
    width = max((len(name) for name, _ in there), default=0) + 1
    lines += [f"  {name:<{width}} {meaning}" for name, meaning in there]
    if (run_dir / "model").is_dir():
        lines += [
            "Next: go on from this model with documents of your own (parquet, jsonl, txt or a directory of them)",
            f"  python -m refine_verl.main recipe=midtrain model.path={run_dir / 'model'} data.train_files=FILES",
        ]
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _files_in_use() -> list[ConfigFile]:
    files = find_configs()
    for source in HydraConfig.get().runtime.config_sources:
        if source.provider == "command-line" and source.schema == "file":
            files += read_config_dir(Path(source.path))
    return files


def _refuse(error: Exception) -> int:
    said_by_us = isinstance(error, ValueError) and not isinstance(error, (HydraException, OmegaConfBaseException))
    return _fail(str(error) if said_by_us else readable(error, base_schema()), BAD_INPUT)


def _fail(message: str, code: int = FAILED, prefix: str = "error: ") -> int:
    Console(stderr=True, soft_wrap=True).print(f"{prefix}{message}", markup=False, highlight=False)
    return code


def _print_help() -> None:
    console = Console(soft_wrap=True)

    def show(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    show(USAGE)
    files = find_configs()
    for title, group in (("Recipes (recipe=NAME)", "recipe"), ("Model presets (model=NAME)", "model")):
        show(f"{title}:")
        for file in files:
            if file.group == group:
                show(f"  {file.name:<16} {file.summary}")
        show("")
    show("Keys (verl's own keys work under verl's names, e.g. actor_rollout_ref.actor.optim.lr=1e-6):")
    for setting in list_settings():
        show(f"  {setting.key}={'null' if setting.default is None else setting.default}\n      {setting.help}")


def _configure_logging() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("refine_verl").setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
