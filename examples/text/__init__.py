"""A small model on real text: mid-training with REFINE against the next-token loss, from the same base models."""
