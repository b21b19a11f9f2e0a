"""Benchmarks: ``python -m benchmarks.NAME [--quick] [--seed S] [--json PATH]``. What they share is in ``harness``."""
