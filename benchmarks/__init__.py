"""Ratios against peers and physical limits, measured in the same run: `make bench`, or `python -m benchmarks --list`."""
