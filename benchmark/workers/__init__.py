"""Processes that hold what a benchmark compares with; they compute only when asked."""
