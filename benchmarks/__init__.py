"""Measurements; each module is run on its own, as ``python -m benchmarks.NAME``."""
