"""What the examples in miniature share: a training loop without Ray and verl, statistics, figures, the results page."""
