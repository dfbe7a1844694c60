"""Attention over slot lists, behind one interface."""

from tca_runtime.attention.registry import create_backend

__all__ = ["create_backend"]
