"""What the miniatures share: the training loop against the slow reference, statistics by hand, figures, the page."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.adaptation import adapt_slowly
from reference.toy import relative, tiny_config
from torch import Tensor, nn

from examples.miniature.figures import Row, Series, curves, forest
from examples.miniature.results import ResultsError, assemble
from examples.miniature.statistics import Estimate, estimate, paired
from examples.miniature.training import Compute, Loop
from refine_verl.adaptation import Prompts
from refine_verl.adaptation.settings import AdaptSettings, read_settings
from refine_verl.config import LossSettings, NSPSettings
from refine_verl.models import Documents, load_model, make_actor

LENGTHS = (23, 31, 17, 31)
NSP = NSPSettings(chunks=3, rollout_length=4, rollouts_per_position=2)
# float64 rounding, amplified by AdamW where a gradient is close to 0
RELATIVE = 1e-6


def model(dtype: torch.dtype = torch.float64) -> Any:
    """Larger weights than at initialisation, so that rewards differ."""
    found: Any = load_model(None, config=tiny_config("delta_net"), dtype=torch.float32, seed=1)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(2)
        for parameter in found.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return found.to(dtype)


def rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 61, (length,), generator=generator) for length in LENGTHS]


def documents() -> Documents:
    return Documents.from_tensors(nn.utils.rnn.pad_sequence(rows(), batch_first=True), LENGTHS)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in module.parameters()])


def trained(settings: AdaptSettings) -> tuple[Tensor, dict[str, float], Compute]:
    actor = make_actor(model())
    loop = Loop(actor, settings)
    ids = Prompts.read(rows(), vocabulary=61, shortest=1, needs="").ids
    metrics = loop.train(1, documents(), ids)
    return weights(actor) - weights(model()), metrics, loop.compute


BATCH = AdaptSettings(nsp=NSP, loss=LossSettings(), lr=1e-3, mini_batch_size=2)


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_the_loop_is_the_slow_reference(micro_batch_size: int) -> None:
    """Prefixes recomputed, advantages and the loss written out: the same weights after two mini-batches."""
    slow = model()
    nsp = {"chunks": 3, "rollout_length": 4, "rollouts_per_position": 2, "reward": "cosine", "rollout": "prefix"}
    reference = read_settings({"nsp": nsp, "loss": {"rl_coef": 0.2}, "lr": 1e-3, "mini_batch_size": 2})
    losses = adapt_slowly(slow, rows(), reference)
    moved, metrics, _ = trained(replace(BATCH, micro_batch_size=micro_batch_size))
    assert relative(moved, weights(slow) - weights(model())) < RELATIVE
    assert metrics["actor/loss"] == pytest.approx(sum(losses) / 2, rel=RELATIVE)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"loss": LossSettings(rl_coef=0.5)},
        {"norm_adv_by_std_in_grpo": False},
        {"method": "sft"},
        {"mini_batch_size": 4},
        {"nsp": replace(NSP, group="position")},
        {"nsp": replace(NSP, reward="hybrid")},
    ],
    ids=lambda other: next(iter(other)),
)
def test_every_setting_matters(other: dict[str, Any]) -> None:
    """Negative control of the comparison above."""
    assert relative(trained(BATCH)[0], trained(replace(BATCH, **other))[0]) > 100 * RELATIVE


def test_sft_is_the_next_token_loss() -> None:
    """The mean over all predicted tokens, of the model's own forward pass."""
    actor = make_actor(model())
    gradient, metrics = Loop(actor, AdaptSettings(method="sft")).flat_gradient(documents(), None)
    own = model()
    losses = [
        nn.functional.cross_entropy(own(input_ids=row[None]).logits[0, :-1], row[1:], reduction="sum") for row in rows()
    ]
    loss = torch.stack(losses).sum() / (sum(LENGTHS) - len(LENGTHS))
    expected = torch.autograd.grad(loss, list(own.parameters()))
    assert relative(gradient, torch.cat([gradient.flatten() for gradient in expected])) < RELATIVE
    assert metrics["actor/loss"] == pytest.approx(loss.item())


def test_compute_is_counted() -> None:
    _, _, sft = trained(replace(BATCH, method="sft"))
    assert (sft.rollout_tokens, sft.trained_tokens, sft.steps) == (0, sum(LENGTHS), 2)
    assert sft.token_passes == 3 * sum(LENGTHS)
    _, _, refine = trained(BATCH)
    branches = len(LENGTHS) * NSP.chunks * NSP.rollouts_per_position
    assert refine.trained_tokens == sum(LENGTHS) + branches * (NSP.rollout_length - 1)
    assert refine.rollout_tokens >= sum(LENGTHS) + branches * NSP.rollout_length


def test_a_gradient_that_is_not_finite_ends_the_training() -> None:
    actor = make_actor(model())
    loop = Loop(actor, BATCH)
    with torch.no_grad():
        actor.lm_head.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not finite .* at step 1"):
        loop.step(documents(), None)
    assert loop.compute.steps == 0


# Statistics


def test_intervals_by_hand() -> None:
    """1, 2, 3: standard error 1/sqrt(3), two degrees of freedom, t = 4.3027."""
    one = estimate([1.0, 2.0, 3.0])
    assert one.mean == 2.0 and one.count == 3
    assert one.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert one.text() == "2.000 ± 2.484" and one.sign == 0
    assert estimate([1.0, 1.01]).sign == 1 and estimate([-1.0, -1.01]).sign == -1
    alone = estimate([0.5])
    assert math.isnan(alone.half_width) and alone.text() == "0.500" and alone.sign == 0
    with pytest.raises(ValueError):
        estimate([])


def test_pairs_are_made_by_seed() -> None:
    """The order of seeds does not matter, and seeds that only one has do not count."""
    one = paired({"1": 5.0, "0": 1.0, "7": 100.0}, {"0": 0.5, "1": 4.5})
    assert (one.mean, one.half_width, one.count) == (0.5, 0.0, 2)
    with pytest.raises(ValueError, match="nothing to pair"):
        paired({"0": 1.0}, {"1": 1.0})


# Figures


def circles(svg: str) -> list[dict[str, str]]:
    return [dict(one.attrib) for one in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}circle")]


def test_forest() -> None:
    """Larger means lie further to the right; headings have no mark; labels are escaped."""
    svg = forest(
        "A < B", "unit", [Row("head & tail"), Row("a", Estimate(-1.0, 0.5, 3)), Row("b", Estimate(1.0, 0.5, 3), 2)]
    )
    first, second = circles(svg)
    assert float(first["cx"]) < float(second["cx"]) and float(first["cy"]) < float(second["cy"])
    with pytest.raises(ValueError):
        forest("nothing", "unit", [Row("only a heading")])


def test_ticks_are_what_their_labels_say() -> None:
    """A spacing of 0.0025 needs four decimals; rounded to three, labels would be wrong."""
    svg = forest("t", "unit", [Row("a", Estimate(-0.0026, 0.0056, 5)), Row("b", Estimate(0.001, 0.002, 5))])
    assert "\u22120.0050" in svg and "\u22120.0025" in svg and "0.0025" in svg


def test_curves() -> None:
    points = [(0.0, Estimate(1.0, 0.1, 3)), (10.0, Estimate(0.5, math.nan, 1))]
    first, second = circles(curves("loss", "steps", "nats", [Series("a", points, 1)]))
    assert float(first["cx"]) < float(second["cx"]) and float(first["cy"]) < float(second["cy"])


# The page


def recall_results(change: float = 0.1) -> dict[str, Any]:
    """Two seeds of one headline, by hand: REFINE is better by ``change`` on both."""

    def run(exact: float) -> dict[str, Any]:
        scores = {"exact": exact, "tokens": 0.5, "reward_cosine": 0.5, "reward_binary": 0.1, "ntp_loss": 1.0}
        return {
            "scores": {"0": scores, "2": scores, "4": scores},
            "costs": {"2": {"token_passes": 2.0, "processor_seconds": 1.0}},
            "training": {"2": {"nsp/reward/mean": 0.5}},
        }

    jobs = [
        {
            "kind": "headline",
            "model": "deltanet",
            "state": "under",
            "what": "",
            "seed": seed,
            "result": {
                "arms": {"sft": run(base), "paper": run(base + change), "grouped": run(base + 2 * change)},
                "equal_compute": {"paper": 4, "grouped": 4},
            },
        }
        for seed, base in ((0, 0.2), (1, 0.4))
    ]
    amount = {"seeds": 2, "steps": 2, "ablation_steps": 1, "held_out": 8, "draws": 2, "prompts": 8, "passes": 1}
    task = {"entries": 2, "value_length": 3, "rounds": 4}
    return {
        "amount": amount,
        "batch": 16,
        "learning_rates": {"under": 5e-4, "plateau": 2e-4},
        "models": {"deltanet": {"task": task}},
        "date": "2000-01-01",
        "environment": {"torch": "2", "machine": "x86_64"},
        "processor_minutes": 1.0,
        "jobs": jobs,
    }


def test_the_page_is_made_from_files(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(recall_results()))
    page = assemble({"recall": file, "text": tmp_path / "none.json"}, tmp_path / "docs")
    text = page.read_text()
    assert "| SFT | 0.300 ± " in text
    assert "**+0.1000 ± 0.0000**" in text and "**+0.2000 ± 0.0000**" in text
    assert "2.0 ×" not in text and "recall_headline.svg" in text
    assert {path.name for path in (tmp_path / "docs/figures").iterdir()} == {
        "recall_headline.svg",
        "recall_compute.svg",
    }
    for name in ("Ablations", "How noisy", "Test-time"):
        assert f"### {name}" not in text  # no data, no heading


def test_another_result_is_another_page(tmp_path: Path) -> None:
    """Negative control: a worse REFINE is shown as worse, with a real minus sign."""
    file = tmp_path / "results.json"
    file.write_text(json.dumps(recall_results(-0.1)))
    assert "**\u22120.1000 ± 0.0000**" in assemble({"recall": file}, tmp_path).read_text()


@pytest.mark.parametrize("content", ["{", "[]", '{"jobs": []}'])
def test_results_that_cannot_be_shown(tmp_path: Path, content: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(content)
    with pytest.raises(ResultsError, match="results.json"):
        assemble({"recall": file}, tmp_path / "docs")
    assert not (tmp_path / "docs").exists()


def test_no_results(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="none of"):
        assemble({"recall": tmp_path / "results.json"}, tmp_path)
