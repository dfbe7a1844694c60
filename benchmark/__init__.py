"""Benchmarks of the runtime; see benchmark/README.md for one command each."""
