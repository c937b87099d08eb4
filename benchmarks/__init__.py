"""Benchmarks, one file a theme: `python -m benchmarks.<theme> [--quick] [--json FILE]`."""
