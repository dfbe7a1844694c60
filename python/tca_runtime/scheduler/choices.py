"""What a server chose at its start, and why: one log line per choice."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from tca_runtime.cache.slot_pool import SlotPool
from tca_runtime.config import RuntimeConfig
from tca_runtime.scheduler.repetition import repeats

if TYPE_CHECKING:
    from tca_runtime.engine.engine import Engine

logger = logging.getLogger(__name__)

_GIB = 1 << 30


def kv_cache_gib(engine: Engine) -> float:
    """Size of the KV pool on the device."""
    return _pool_gib(engine.cache.pool)


def log_choices(config: RuntimeConfig, engine: Engine) -> None:
    """Log every choice under its name."""
    for name, (value, reason) in choices(config, engine).items():
        logger.info("%s: %s (%s)", name, value, reason)


def choices(config: RuntimeConfig, engine: Engine) -> dict[str, tuple[str, str]]:
    """Per subject, what was chosen and why."""
    pool, rows = engine.cache.pool, engine.shape.rows
    tokens = pool.capacity // rows
    asked = config.cache.max_total_tokens is not None
    device = str(engine.device)
    if engine.device.type == "cuda":
        device += f", {torch.cuda.get_device_name(engine.device)}"
    return {
        "device": (device, _by_flag("--device", config.model.device, "a GPU if there is one")),
        "dtype": (
            str(engine.shape.dtype).removeprefix("torch."),
            _by_flag("--dtype", config.model.dtype, "float32 on the CPU, else the checkpoint's"),
        ),
        "attention backend": (
            type(engine.backend).__name__,
            _by_flag(
                "--attention-backend",
                config.attention.attention_backend,
                "the fastest that accepts the model's shape on this device",
            ),
        ),
        "KV pool": (
            f"{tokens} tokens, {pool.capacity} slots, {_pool_gib(pool):.2f} GiB",
            "--max-total-tokens" if asked else f"--mem-fraction {config.cache.mem_fraction:g}",
        ),
        "host tier": _host_tier(config, engine),
        "threads": (str(torch.get_num_threads()), "OMP_NUM_THREADS, or the cores of the machine"),
        "batches": (
            f"at most {config.scheduler.max_running_requests} requests and "
            f"{config.scheduler.chunk_on(engine.device.type)} prompt tokens per step",
            "--max-running-requests, --chunked-prefill-size, less while requests decode: "
            f"--max-decode-slowdown {config.scheduler.max_decode_slowdown:g}",
        ),
        "selection": _selection(config, engine),
        "retention": (
            config.sparsity.tca_retention if engine.sparsity else "everything stays",
            "--tca-retention" if engine.sparsity else "nothing is selected",
        ),
        "repetition": (
            "cold prefixes, when idle" if repeats(config.sparsity, engine) else "off",
            _by_flag(
                "--tca-repetition",
                config.sparsity.tca_repetition,
                "on a GPU without a host tier, where prefixes are pruned",
            ),
        ),
    }


def _selection(config: RuntimeConfig, engine: Engine) -> tuple[str, str]:
    settings, args = engine.sparsity, config.sparsity
    if settings is None:
        off = "--disable-tca" if args.disable_tca else "there is no configuration for this model"
        return "off, full attention", off
    tables = (settings.prefill, settings.decode)
    kept = [f"{table.average():.0%}" for table in tables]
    if settings.one_shot:
        kept[0] = "everything"
    value = (
        f"{settings.policy} keeps {kept[0]} in prefill and {kept[1]} in decode, "
        f"window {settings.window}, {settings.probes} probes"
    )
    return value, args.tca_config or f"shipped configuration, threshold {args.tca_threshold:g}"


def _host_tier(config: RuntimeConfig, engine: Engine) -> tuple[str, str]:
    host, size = engine.cache.reclaimer.host, config.sparsity.host_cache_size
    reason = "a share of free memory" if size is None else f"--host-cache-size {size:g}"
    if host is None:
        return "off", reason
    return f"{host.capacity} slots, {_pool_gib(host):.2f} GiB", reason


def _pool_gib(pool: SlotPool) -> float:
    return pool.kv.numel() * pool.kv.element_size() / _GIB


def _by_flag(flag: str, value: str, default: str) -> str:
    return default if value == "auto" else flag
