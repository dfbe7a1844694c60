"""Needs a GPU, except where a test says otherwise."""
