"""Workers that train adapters, in plain processes; see `reference.ranks`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from reference import prompt_ranks, ranks

LORA = (
    "actor_rollout_ref.model.lora_rank=3",
    "actor_rollout_ref.model.lora_alpha=6",
    "actor_rollout_ref.model.exclude_modules=[gate_proj]",
)
ROW = torch.arange(97, 117)


def snapshot_bytes(session: Any) -> dict[str, int]:
    """What a snapshot keeps, and how many numbers of this rank it is of."""
    session.worker.snapshot()
    module = session.worker.engine.module
    local = [(p.to_local() if hasattr(p, "to_local") else p, p.requires_grad) for p in module.parameters()]
    return {
        "kept": session.worker.saved.num_bytes,
        "trained": sum(p.numel() for p, trained in local if trained),
        "all": sum(p.numel() for p, _ in local),
        "buffers": sum(buffer.nbytes for buffer in module.buffers()),
    }


def logits(session: Any) -> torch.Tensor:
    with session.worker.engine.eval_mode(), torch.no_grad():
        found: torch.Tensor = session.worker.engine.module(input_ids=ROW[None]).logits
    return found.clone()


def documents(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    """Two steps; then there and back, by a snapshot and by a checkpoint; and the adapters in files."""
    session = ranks.Session(spec)
    batches = [ranks.columns(ranks.LENGTHS, 1), ranks.columns(ranks.LENGTHS[::-1], 2, first_id=100)]
    results: dict[str, Any] = {"initial": session.initial}
    results["trained"] = [name for name, p in session.worker.engine.module.named_parameters() if p.requires_grad]
    results["steps"] = [session.step(batch) for batch in batches]
    results["snapshot"] = snapshot_bytes(session)
    before = session.parameters()
    results["ways"] = {}
    for kind in ("none", "layer", "segment"):
        session.worker.engine.module.activation_checkpointing = kind
        for on_policy in (False, True):
            ranks.set_field(session.trainer.settings, "on_policy", on_policy)
            results["ways"][kind, on_policy] = session.step(batches[0])["gradients"][0]
            session.worker.restore()
            session.trainer.global_steps -= 1
            after = session.parameters()
            assert all(torch.equal(before[name], after[name]) for name in before)
    ranks.set_field(session.trainer.settings, "on_policy", False)
    session.worker.engine.module.activation_checkpointing = "none"
    session.worker.save_adapter(str(out.parent / "adapter"), {"rows": ["a"]})
    results["logits"] = logits(session)
    sent, _ = session.worker.engine.get_per_tensor_param()
    results["sent"] = {name: value.clone() for name, value in sent}
    session.worker.save_checkpoint(str(out.parent / "checkpoint"))
    results["third"] = session.step(batches[0])["parameters"]
    session.trainer.global_steps -= 1
    session.step(batches[1])
    session.trainer.global_steps -= 1
    session.worker.engine.load_checkpoint(str(out.parent / "checkpoint"), del_local_after_load=False)
    results["resumed"] = session.step(batches[0])["parameters"]
    return results


def posttrain(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    """Nested REFINE with answers that are given, and with answers that are sampled."""
    session = prompt_ranks.Session(spec)
    rows = prompt_ranks.tokenised(8, 1)
    session.trainer.scores = prompt_ranks.odd_score
    results: dict[str, Any] = {}
    for outer in ("sft", "grpo"):
        session.configure(inner="refine", outer=outer)
        results[outer] = session.step(rows)
    return results


def ttt(spec: dict[str, Any], out: Path) -> dict[str, Any]:
    """Each prompt alone, kept; and back to the beginning."""
    session = prompt_ranks.Session(spec)
    session.configure(inner="refine", reset="sample", steps=2)
    object.__setattr__(session.trainer.settings.ttt, "keep", str(out.parent / "keep"))
    before = session.state()
    answered = session.test_time(prompt_ranks.tokenised(3, 2))
    return {"answers": answered, "restored": prompt_ranks.same(before, session.state()), "at": str(out.parent / "keep")}


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    results = {"documents": documents, "posttrain": posttrain, "ttt": ttt}[spec["what"]](spec, Path(sys.argv[2]))
    if int(os.environ["RANK"]) == 0:
        torch.save(results, sys.argv[2])
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
