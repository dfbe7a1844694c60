"""Standard output and error that cannot end the process."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _LossyFile(io.RawIOBase):
    """A file descriptor that loses what cannot be written: a full disk, a closed pipe."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: ReadableBuffer) -> int:
        with suppress(OSError):
            return os.write(self._descriptor, data)
        return memoryview(data).nbytes


def survive_full_disk() -> None:
    """Make ``print`` and logging lose lines, rather than raise, when their target takes no more."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        if old is None:
            continue
        stream = io.TextIOWrapper(
            io.BufferedWriter(_LossyFile(descriptor)),
            encoding=old.encoding,
            errors="backslashreplace",
            line_buffering=True,
        )
        setattr(sys, name, stream)
