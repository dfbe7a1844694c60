"""Parts that the host-time benchmark measures are there to be measured."""

from __future__ import annotations

import pytest

from benchmark.bench_host_time import PARTS


@pytest.mark.parametrize(
    ("owner", "function"),
    [(owner, function) for _, owner, functions in PARTS for function in functions],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_part_exists(owner: object, function: str) -> None:
    assert function in vars(owner)
