"""What the documentation names exists: links, files, symbols, make targets, keys, metrics and commands."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from refine_verl.compose.acting_keys import ACTING
from refine_verl.compose.composition import base_schema, compose_config
from refine_verl.compose.recipes import RECIPES_PATH_VARIABLE, find_configs
from refine_verl.compose.validate import validate
from refine_verl.compose.verl_keys import STRATEGIES
from refine_verl.config import DataSettings, PromptSettings, list_settings
from refine_verl.models.adapters import FLA_THROUGH_THE_SAME_ADAPTER, FLA_VERIFIED_ON_CPU
from refine_verl.models.hybrid import MIXERS
from refine_verl.nsp import reward_metrics, rollout_metrics
from refine_verl.report.charts import SPECS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
TOP = ("refine_verl", "recipes", "docs", "tests", "examples", "benchmarks", ".ci")
SECTIONS = ("refine", "model", "data", "trainer", "actor_rollout_ref", "algorithm", "ray_kwargs")
# Attributes of a model in Python, not keys of the section of that name.
NOT_KEYS = {"model.base_model"}
FOR_VERL = {"custom_cls", "max_response_length"}


def fences(page: Path, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(page.read_text()) if name == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def inline(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def rows(page: Path) -> list[list[str]]:
    """The cells of all table rows, without separator lines."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("| ") and "| ---" not in line]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def row_of(page: Path, name: str) -> list[str]:
    found = [row for row in rows(page) if row[0] == f"`{name}`"]
    assert len(found) == 1, f"{page.name} has {len(found)} rows for {name}"
    return found[0]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def shown(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}; there are {sorted(anchors(file))}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths(page: Path) -> None:
    for text in inline(page):
        if re.fullmatch(rf"({'|'.join(map(re.escape, TOP))})/[\w./-]*", text):
            assert (ROOT / text).exists(), f"{page.name}: {text}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_symbols(page: Path) -> None:
    for text in inline(page):
        if re.fullmatch(r"refine_verl(\.\w+)+", text):
            resolve(text)


def resolve(dotted: str) -> object:
    """The module, class, function or attribute of that name.

    Raises:
        AttributeError, ImportError: there is none.
    """
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return found
    raise ImportError(dotted)


def test_a_symbol_that_is_not_there() -> None:
    with pytest.raises(AttributeError):
        resolve("refine_verl.nsp.rewards.cosine_rewards")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {name for text in [*inline(page), *fences(page, "bash")] for name in re.findall(r"\bmake ([a-z-]+)", text)}
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys(page: Path) -> None:
    schema = OmegaConf.create(OmegaConf.to_container(base_schema()))
    for text in inline(page):
        if not re.fullmatch(rf"\+?({'|'.join(SECTIONS)})(\.\w+)+(=\S*)?", text) or text in NOT_KEYS:
            continue
        if text.startswith("+"):  # a key that the section takes but does not list
            continue
        key = text.partition("=")[0]
        parent, _, name = key.rpartition(".")
        section = OmegaConf.select(schema, parent)
        assert isinstance(section, (dict, DictConfig)) and name in section, f"{page.name}: {text}"


# Commands


@pytest.fixture
def recipes_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory with every file that the pages show, by the path in its first line."""
    write_shown_files(tmp_path, ("python", "yaml"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    HydraConfig.instance().cfg = None


def write_shown_files(directory: Path, languages: tuple[str, ...]) -> list[str]:
    """Write the code blocks that begin with a comment of their path; returns the others."""
    rest = []
    for page in PAGES:
        for language in languages:
            for body in fences(page, language):
                named = re.match(r"# ([\w/]+\.(?:py|yaml))\n", body)
                if named is None:
                    rest.append(body)
                elif not (ROOT / named[1]).exists():
                    (directory / named[1]).parent.mkdir(parents=True, exist_ok=True)
                    (directory / named[1]).write_text(body)
    return rest


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        exported = ""
        for line in [line for body in fences(page, "bash") for line in body.splitlines()]:
            if line.startswith("export "):
                exported = line.removeprefix("export ")
            elif "-m refine_verl.main" in line:
                found.append((page.name, f"{exported} {line}".strip()))
    return found


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_compose(page: str, command: str, recipes_of_the_docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command, comments=True)
    for word in words[: words.index("refine_verl.main")]:
        if word.startswith(f"{RECIPES_PATH_VARIABLE}="):
            value = word.partition("=")[2]
            monkeypatch.setenv(RECIPES_PATH_VARIABLE, str(ROOT / value if (ROOT / value).is_dir() else value))
    arguments = words[words.index("refine_verl.main") + 1 :]
    if "--help" in arguments:
        return
    sweep = "-m" in arguments
    overrides = [word for word in arguments if word not in ("-m", "--cfg", "job", "--resolve", "...")]
    if sweep:
        overrides = [word if "[" in word else word.partition(",")[0] for word in overrides]
    validate(compose_config(overrides), find_configs())


def test_there_are_commands() -> None:
    assert {page for page, _ in commands()} >= {"README.md", "recipes.md", "extending.md"}


def test_shown_code_is_the_examples() -> None:
    """A block that shows a part of a file of the repository shows it as it is."""
    for page in PAGES:
        for body in fences(page, "python") + fences(page, "yaml"):
            named = re.match(r"# ([\w/]+\.(?:py|yaml))\n", body)
            if named and (ROOT / named[1]).exists():
                assert body[named.end() :] in (ROOT / named[1]).read_text(), f"{page.name}: {named[1]}"


def test_code_runs(tmp_path: Path) -> None:
    """The Python of docs/extending.md, in a process of its own: it registers things under names."""
    rest = write_shown_files(tmp_path, ("python",))
    assert len(rest) >= 3
    (tmp_path / "run.py").write_text("\n\n".join(rest))
    path = os.pathsep.join([str(tmp_path), str(ROOT / "examples")])
    finished = subprocess.run(
        [sys.executable, "run.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]


def test_the_policy_loss_of_the_docs_has_a_gradient(recipes_of_the_docs: Path) -> None:
    script = """
import types, torch, my_algorithms
counts = {"dp_size": 1, "batch_num_tokens": 6, "global_batch_size": 2}
new = torch.zeros(2, 3, requires_grad=True)
config = types.SimpleNamespace(global_batch_info=counts)
advantages = torch.tensor([[1.0], [-1.0]]).expand(2, 3)
mask = torch.ones(2, 3, dtype=torch.bool)
loss, _ = my_algorithms.reinforce(new, new, advantages, mask, "seq-mean-token-mean", config)
loss.backward()
torch.testing.assert_close(new.grad, -advantages / 6)
"""
    command = [sys.executable, "-c", script]
    finished = subprocess.run(command, cwd=recipes_of_the_docs, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr[-3000:]


# Tables


def test_every_setting_is_documented_as_it_is() -> None:
    page = ROOT / "docs/recipes.md"
    for setting in list_settings():
        _, default, meaning, paper = row_of(page, setting.key)
        assert default == f"`{shown(setting.default)}`", setting.key
        assert paper == (setting.paper or ""), setting.key
        assert meaning.startswith(setting.help), setting.key
        assert all(f"`{choice}`" in meaning for choice in setting.choices or ()), setting.key
    known = {setting.key for setting in list_settings()}
    documented = {row[0].strip("`") for row in rows(page) if re.match(r"`(refine|model)\.", row[0])}
    assert documented <= known


def test_every_data_key_is_documented_as_it_is() -> None:
    settings = {setting.key: setting.default for setting in list_settings(DataSettings, PromptSettings)}
    verls = yaml.safe_load((ROOT / "refine_verl/conf/base.yaml").read_text())["data"]
    data = {key.removeprefix("data."): default for key, default in settings.items()} | verls
    documented = {row[0].strip("`") for row in rows(ROOT / "docs/recipes.md") if row[0].startswith("`data.")}
    assert documented == {f"data.{name}" for name in data if name not in FOR_VERL}
    for key in documented:
        assert row_of(ROOT / "docs/recipes.md", key)[1] == f"`{shown(data[key.removeprefix('data.')])}`", key


def test_the_keys_of_verl_that_act_are_documented() -> None:
    page = ROOT / "docs/recipes.md"
    named = set(inline(page))
    assert set(ACTING) <= named, sorted(set(ACTING) - named)
    table = page.read_text().partition("### verl's keys that act")[2].partition("## Metrics")[0]
    for key in re.findall(r"`([\w.]+)`", "".join(line.split("|")[1] for line in table.splitlines() if "|" in line)):
        assert key in ACTING, key
    _, default, meaning = row_of(page, "actor_rollout_ref.actor.strategy")
    assert set(re.findall(r"`(\w+)`", default + meaning)) == set(STRATEGIES)


def test_every_recipe_and_preset_is_documented() -> None:
    names = {file.name for file in find_configs({})}
    assert names == {row[0].strip("`") for row in rows(ROOT / "docs/recipes.md")} & names


def test_the_papers_settings_are_those_of_the_recipe() -> None:
    config = compose_config(["recipe=midtrain", "model.path=DIR", "data.train_files=FILES"])
    checked = 0
    for row in rows(ROOT / "docs/paper_map.md"):
        if len(row) != 4 or not re.search(r"^(default, )?[\d\[a-z]", row[3]) or not row[2].startswith("`"):
            continue
        keys = re.findall(r"`([\w.]+)`", row[2])
        written = re.sub(r"default, | \(see below\)", "", row[3])
        values = yaml.safe_load(f"[{written}]")
        for key, value in zip(keys, values, strict=True):
            assert OmegaConf.select(config, key) == value, key
            checked += 1
    assert checked >= 16


def test_every_equation_has_its_place() -> None:
    numbers = {row[0] for row in rows(ROOT / "docs/paper_map.md")}
    assert {str(number) for number in range(1, 13)} <= numbers


def test_every_metric_is_documented() -> None:
    """What rollouts and answers are described by, what reports draw, and what the trainers name themselves."""
    values = dict.fromkeys(("rewards", "reward_cosine", "reward_binary"), torch.rand(2, 3, 4))
    values |= {"entropy_mean": torch.rand(2), "entropy_selected": torch.rand(2, 3)}
    made = {*rollout_metrics(values, "sequence"), *reward_metrics("answer", torch.rand(2, 1, 4))}
    drawn = {key for specs in SPECS.values() for spec in specs for key in spec.lines}
    named = {
        name
        for source in (ROOT / "refine_verl/trainer").glob("*.py")
        for name in re.findall(r'"((?:refine|nsp|actor|answer|ttt|val|perf)/[a-z_/]+)"', source.read_text())
        if name != "perf/max_memory_allocated_gb"  # verl's name, renamed on the way
    }
    documented = {
        name for row in rows(ROOT / "docs/recipes.md") for name in re.findall(r"`([a-z_]+/[a-z_/]+)`", row[0])
    }
    written = made | drawn | named
    assert len(made) == 14 and len(drawn) > 20 and len(named) > 8
    assert written <= documented, sorted(written - documented)


def test_every_family_is_in_the_support_table() -> None:
    cells = " ".join(row[0] for row in rows(ROOT / "README.md"))
    for family in (*FLA_VERIFIED_ON_CPU, *FLA_THROUGH_THE_SAME_ADAPTER, "lact_swiglu", *MIXERS):
        assert f"`{family}`" in cells, family


@pytest.mark.parametrize("name", ["cpu", "gpu", "cpu_lact", "gpu_lact"])
def test_the_benchmarks_presets_are_documented_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    preset = importlib.import_module("benchmarks.step_cost").PRESETS[name]
    model = preset.model
    row = next(row for row in rows(ROOT / "docs/performance.md") if row[0] == f"`{name}`" and row[1].isdigit())
    sizes = [model["num_hidden_layers"], model["hidden_size"], model["vocab_size"], preset.length, preset.documents]
    assert row[1:] == [*map(str, sizes), preset.activation_checkpointing]
