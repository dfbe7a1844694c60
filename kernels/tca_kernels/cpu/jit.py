"""The numba settings all CPU kernels share."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TypeVar, cast

import numba
import torch

F = TypeVar("F", bound=Callable[..., object])

# Torch's OpenMP workers spin for a while after each operator. Numba's OpenMP layer costs little
# beside them, and shares them where both find one runtime; its workqueue pool costs several times
# more per launch.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]


def jit(*, signature: str | None = None, parallel: bool = False) -> Callable[[F], F]:
    """Compile for speed: contracted float arithmetic without NaN or infinity, cached on disk.

    With a ``signature`` compilation happens at decoration, so that no later call has to wait.
    """
    if parallel:
        _start_pool()
    decorator = numba.njit(
        signature, parallel=parallel, fastmath=True, error_model="numpy", cache=True
    )
    return cast("Callable[[F], F]", decorator)


def helper(function: F) -> F:
    """Compile a function that kernels inline: constants of the caller reach its loops."""
    compiled = numba.njit(fastmath=True, error_model="numpy", forceinline=True)(function)
    return cast("F", compiled)


def use_threads(count: int) -> int:
    """Let the calling thread's kernels run on ``count`` threads; return how many numba grants."""
    if _granted.get(threading.get_ident()) == count:
        return count
    _start_pool()
    limit: int = numba.config.NUMBA_NUM_THREADS
    granted = max(1, min(count, limit))
    numba.set_num_threads(granted)
    _granted[threading.get_ident()] = granted
    return granted


# What each thread asked for last: asking numba takes longer than a small kernel.
_granted: dict[int, int] = {}


@functools.cache
def _start_pool() -> None:
    """Start numba's threads, which sets OpenMP's thread count to all cores: torch's as well."""
    before = torch.get_num_threads()
    numba.set_num_threads(numba.get_num_threads())
    torch.set_num_threads(before)
