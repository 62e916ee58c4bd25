"""Put what `refine_verl.plan` says of memory into docs/performance.md: models, lengths, kinds of steps.

    python -m benchmarks.memory_table

Planned, not measured: fake tensors are counted, so it needs no GPU, and some twenty minutes. Replaces what stands
between the two marks there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, PretrainedConfig

import refine_verl
from benchmarks.gpu_section import PAGE, put_between
from refine_verl.plan.memory import Shape, estimate_memory, pass_peaks

BEGIN, END = "<!-- memory -->\n", "<!-- end of memory -->\n"
MODELS = {"deltanet_1b3": "DeltaNet-1.3B", "gated_deltanet": "Gated DeltaNet", "lact_760m": "LaCT-760M"}
"""Presets, and what they are called."""
LENGTHS = (16384, 65536, 131072)
WAYS = {
    "none": ("none", "whole"),
    "layer": ("layer", "whole"),
    "layer, reading=segments": ("layer", "segments"),
    "segment": ("segment", "whole"),
}
"""`model.activation_checkpointing` and `model.reading`."""
GPUS = (1, 8)
FITS = {"": 78, "*": 139}
"""GiB that PyTorch can have of 80 and of 141 GB, by the mark of what fits no less."""
Row = tuple[str, int, str]


def config_of(preset: str) -> PretrainedConfig:
    """The configuration of a model preset."""
    file = Path(refine_verl.__file__).parent / "presets" / f"{preset}.yaml"
    settings: dict[str, Any] = dict(yaml.safe_load(file.read_text())["config"])
    config: PretrainedConfig = AutoConfig.for_model(settings.pop("model_type"), **settings)
    return config


def cells(row: Row) -> Iterator[str]:
    """GiB of one worker, two-phase and fused, by number of GPUs: one document per pass, c=8, k=5, n=1."""
    preset, length, way = row
    config, (checkpointing, reading) = config_of(preset), WAYS[way]
    for on_policy in (False, True):
        shape = Shape(
            length=length, activation_checkpointing=checkpointing, reading=reading, on_policy=on_policy, cuda=True
        )
        passes = pass_peaks(config, shape)
        for gpus in GPUS:
            gib = estimate_memory(config, replace(shape, workers=gpus), passes).peak / 2**30
            mark = next((mark for mark, most in FITS.items() if gib <= most), None)
            yield f"({gib:.0f})" if mark is None else f"{gib:.0f}{mark}"


def line(row: Row) -> str:
    """One row of the table."""
    preset, length, way = row
    return f"| {' | '.join([MODELS[preset], f'{length:,}', f'`{way}`', *cells(row)])} |"


def table(rows: Sequence[Row]) -> str:
    """The whole table as Markdown."""
    kinds = [f"{kind}, {gpus} GPU{'s' * (gpus > 1)}" for kind in ("two-phase", "fused") for gpus in GPUS]
    head = f"| {' | '.join(['model', 'tokens', 'checkpointing', *kinds])} |"
    return "\n".join([head, f"| {' | '.join(['---'] * (3 + len(kinds)))} |", *map(line, rows)]) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE)
    page: Path = parser.parse_args(argv).page
    text = table([(model, length, way) for model in MODELS for length in LENGTHS for way in WAYS])
    page.write_text(put_between(page.read_text(), text, BEGIN, END))


if __name__ == "__main__":
    main()
