"""Studies: networks trained on tasks of the literature, and what the gradient monitor said. See docs/experiments.md."""
