"""Benchmarks, their results and the report. A package, so that ``python -m bench.report`` works."""
