"""The throughput suite: `pytest bench --benchmark-json=FILE`, then `python bench/report.py FILE`."""
