"""First-fit allocator of index ranges, on the host."""

from __future__ import annotations

from bisect import bisect_left, insort


class SegmentAllocator:
    """Hands out ranges ``[offset, offset + size)`` of ``[0, capacity)`` and merges freed ones."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_free = capacity
        self._free: list[tuple[int, int]] = [(0, capacity)]

    def allocate(self, size: int) -> int | None:
        """Offset of a free range of ``size``, or None when no gap is large enough."""
        for i, (offset, length) in enumerate(self._free):
            if length >= size:
                if length == size:
                    del self._free[i]
                else:
                    self._free[i] = (offset + size, length - size)
                self.num_free -= size
                return offset
        return None

    def free(self, offset: int, size: int) -> None:
        self.num_free += size
        at = bisect_left(self._free, (offset, 0))
        end = offset + size
        if at < len(self._free) and self._free[at][0] == end:
            end += self._free.pop(at)[1]
        if at and sum(self._free[at - 1]) == offset:
            offset = self._free.pop(at - 1)[0]
        insort(self._free, (offset, end - offset))
