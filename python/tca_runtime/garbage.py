"""Pauses of Python's garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


def settle_garbage() -> None:
    """Leave what start-up made out of all later collections: it lives as long as the process.

    A full collection walks everything that it may free. Vocabularies, templates and imported
    modules are nearly all there is, and walking them takes tens of milliseconds, during which a
    server answers nobody.
    """
    gc.collect()
    gc.freeze()


@contextmanager
def no_collections() -> Iterator[None]:
    """Collect now, and not before the end.

    A CUDA graph that is freed while another one is captured spoils the capture.
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
