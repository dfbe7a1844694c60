"""CPU kernels, compiled with numba."""
