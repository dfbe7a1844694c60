"""The error of everything that can be wrong with a model's files or settings."""

from __future__ import annotations


class ModelError(ValueError):
    """A model cannot be loaded; the message names the file, field or tensor."""
