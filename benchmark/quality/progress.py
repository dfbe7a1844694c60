"""Progress bars where tqdm is installed."""

from __future__ import annotations

from typing import Any, Protocol


class Bar(Protocol):
    """What is used of a progress bar."""

    def update(self, count: int = 1) -> Any: ...

    def set_description(self, text: str) -> Any: ...

    def close(self) -> Any: ...


class _Silent:
    def update(self, count: int = 1) -> None:
        pass

    def set_description(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def bar(total: int, description: str) -> Bar:
    """A bar on stderr, or nothing without tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        return _Silent()
    made: Bar = tqdm(total=total, desc=description, dynamic_ncols=True, mininterval=1.0)
    return made
