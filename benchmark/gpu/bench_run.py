"""What every section of the kernel benchmark shares."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from kernel_inputs import Shape
from torch import Tensor


@dataclass
class BenchRun:
    """Where to run, until when, at what size, and what was found.

    ``tiny`` shrinks every case to a dry run. ``copy`` (bytes/s) and ``matmul`` (FLOP/s) are the
    ceilings measured in this run.
    """

    device: torch.device
    dtype: torch.dtype
    seconds: float
    tiny: bool
    copy: float = 0.0
    matmul: float = 0.0
    begin: float = field(default_factory=time.monotonic)
    results: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def record(self, table: str, **row: Any) -> None:
        self.results.setdefault(table, []).append(row)
        cells = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
        print(f"{table:9s}", *cells, flush=True)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begin

    @property
    def late(self) -> bool:
        return self.elapsed > self.seconds

    def pool(self, shape: Shape, num_slots: int) -> Tensor:
        kv = torch.empty(num_slots, 2, shape.head_dim, dtype=self.dtype, device=self.device)
        return kv.normal_()
