"""Timing of device work, and the ceiling it is held against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_SLEEP_CYCLES = 20_000_000


def graph_ms(run: Callable[[], object], device: torch.device, repeats: int = 15) -> float:
    """Median time of one call, replayed from a CUDA graph so that launches cost nothing.

    On the CPU (dry runs): the time of one plain call.
    """
    if device.type != "cuda":
        return host_ms(run, 1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(3):
        graph.replay()
    return _median_event_ms(graph.replay, repeats)


def stream_ms(run: Callable[[], object], device: torch.device, repeats: int = 15) -> float:
    """Median device time of one call that cannot be captured.

    The stream is kept busy first, so that the host has queued the whole call before it starts.
    """
    if device.type != "cuda":
        return host_ms(run, 1)
    for _ in range(3):
        run()
    return _median_event_ms(run, repeats, busy=True)


def host_ms(run: Callable[[], object], repeats: int = 10) -> float:
    """Mean time the host needs to issue one call."""
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats * 1e3


def _median_event_ms(run: Callable[[], object], repeats: int, busy: bool = False) -> float:
    times: list[float] = []
    torch.cuda.synchronize()
    for _ in range(repeats):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        if busy:
            torch.cuda._sleep(_SLEEP_CYCLES)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a device-to-device copy, counting read and written bytes."""
    size = 4 << 30 if device.type == "cuda" else 1 << 20
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / (stream_ms(lambda: target.copy_(source), device) * 1e-3)


def matmul_flops(device: torch.device) -> float:
    """FLOP per second of a large bfloat16 product on random data."""
    n = 8192 if device.type == "cuda" else 64
    a = torch.randn(n, n, device=device).to(torch.bfloat16)
    b = torch.randn(n, n, device=device).to(torch.bfloat16)
    return 2 * n**3 / (stream_ms(lambda: a @ b, device) * 1e-3)


def sustained_matmul_flops(device: torch.device, seconds: float = 2.0) -> float:
    """The same, once the card has been at it for so long that power limits its clock."""
    if device.type != "cuda":
        return matmul_flops(device)
    n = 8192
    a = torch.randn(n, n, device=device).to(torch.bfloat16)
    b = torch.randn(n, n, device=device).to(torch.bfloat16)
    count = int(seconds / 2 / (2 * n**3 / matmul_flops(device)))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for event in (begin, end):
        for _ in range(count):
            a @ b
        event.record()
    torch.cuda.synchronize()
    return 2 * n**3 * count / (begin.elapsed_time(end) * 1e-3)


def pinned_bandwidth(device: torch.device) -> float:
    """GB per second from pinned host memory to the device."""
    size = 1 << 30 if device.type == "cuda" else 1 << 20
    source = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(size, dtype=torch.uint8, device=device)
    ms = stream_ms(lambda: target.copy_(source, non_blocking=True), device, 5)
    return size / (ms * 1e-3) / 1e9
