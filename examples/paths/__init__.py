"""REFINE against the next-token loss on the way through a star-shaped graph; see README.md."""
