"""How many tokens the KV pool holds."""

from __future__ import annotations

import logging

import psutil
import torch

from tca_runtime.attention.base import AttentionShape
from tca_runtime.cache.slot_pool import SlotPool
from tca_runtime.config import CacheArgs, SparsityArgs

logger = logging.getLogger(__name__)

# On the CPU the pool competes with everything else on the machine.
CPU_SHARE = 0.5
CPU_LIMIT_BYTES = 8 << 30

# Share of free host memory that the host tier takes when its size is not given.
HOST_SHARE = 0.2


# Arena entries per slot: views of requests that share a prefix list the same slots.
ARENA_FACTOR = 4
# What a slot costs on the device beside K and V: its entries in the arena of views, in the tree
# (slot, and position where a list is not complete), on the free list, and its importance.
LIST_BYTES = 4 * ARENA_FACTOR + 8 + 4 + 2
# The same of a slot in the host tier, which no view names.
HOST_LIST_BYTES = 8 + 4 + 2


def slot_bytes(shape: AttentionShape) -> int:
    """K and V of one slot."""
    return 2 * shape.head_dim * shape.dtype.itemsize


def pool_tokens(args: CacheArgs, shape: AttentionShape, host_slots: int = 0) -> int:
    """Capacity in tokens of a full cache, after the weights are loaded.

    ``host_slots``: of the host tier, whose lists are on the device too.

    Raises
    ------
    ValueError
        When not even one token fits.
    """
    if args.max_total_tokens is not None:
        if args.max_total_tokens < 1:
            raise ValueError(f"--max-total-tokens must be positive, not {args.max_total_tokens}")
        return args.max_total_tokens
    if shape.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(shape.device)
        budget = free - int(total * (1 - args.mem_fraction)) - host_slots * HOST_LIST_BYTES
    else:
        available = int(psutil.virtual_memory().available * args.mem_fraction * CPU_SHARE)
        budget = min(available, CPU_LIMIT_BYTES)
    per_token = shape.rows * (slot_bytes(shape) + LIST_BYTES)
    tokens = budget // per_token
    if tokens < 1:
        raise ValueError(
            f"no memory for the KV cache: {budget} bytes left, {per_token} needed per token; "
            "free memory, raise --mem-fraction or set --max-total-tokens"
        )
    return tokens


def host_slots(args: SparsityArgs, shape: AttentionShape) -> int:
    """How many slots the host tier is to have; 0 when it is off."""
    size = args.host_cache_size
    budget = (
        int(size * (1 << 30))
        if size is not None
        else int(psutil.virtual_memory().available * HOST_SHARE)
    )
    num_slots = budget // slot_bytes(shape)
    return num_slots if num_slots > shape.rows else 0


def host_pool(num_slots: int, shape: AttentionShape) -> SlotPool | None:
    """The host tier; None for no slots, or when the memory cannot be had."""
    if not num_slots:
        return None
    try:
        in_host_memory = shape.device.type == "cuda"
        return SlotPool(num_slots, shape.head_dim, shape.dtype, shape.device, in_host_memory)
    except RuntimeError as error:
        logger.warning("no host tier (cold prefixes are pruned instead): %s", error)
        return None
