"""Triton kernels, without host code. Imported only by the wrappers one level up."""
