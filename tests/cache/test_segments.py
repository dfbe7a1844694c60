"""The segment allocator against a bitmap."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tca_runtime.cache.segments import SegmentAllocator


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 12)), max_size=60))
def test_ranges_never_overlap_and_merge_back(steps: list[tuple[bool, int]]) -> None:
    allocator = SegmentAllocator(40)
    held: list[tuple[int, int]] = []
    for release, size in steps:
        if release and held:
            allocator.free(*held.pop(size % len(held)))
            continue
        used = {i for offset, length in held for i in range(offset, offset + length)}
        gap = any(not used & set(range(at, at + size)) for at in range(40 - size + 1))
        offset = allocator.allocate(size)
        assert (offset is not None) == gap
        if offset is not None:
            assert not used & set(range(offset, offset + size))
            held.append((offset, size))
        assert allocator.num_free == 40 - sum(length for _, length in held)
    for segment in held:
        allocator.free(*segment)
    assert allocator.allocate(40) == 0
