"""Measuring a model once to give each of its heads a budget (TCA-Attention, Algorithm 1)."""
