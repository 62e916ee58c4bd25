"""REFINE against the next-token loss on recall of multi-token values, with ablations; see README.md."""
