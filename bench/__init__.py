"""The benchmarks: `pytest bench --records=FILE`, then `python -m bench.report FILE`."""
