"""A small model on real text: mid-training with REFINE against the next-token loss, from the same base models."""

from refine_verl.command.quiet import quieten_third_parties

quieten_third_parties()
