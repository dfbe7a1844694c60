"""Kernels for one generation of GPUs, where Triton's scheduling leaves too much on the table."""
