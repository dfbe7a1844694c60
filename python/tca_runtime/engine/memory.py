"""How many tokens the KV pool holds."""

from __future__ import annotations

import psutil
import torch

from tca_runtime.attention.base import AttentionShape
from tca_runtime.config import CacheArgs

# On the CPU the pool competes with everything else on the machine.
CPU_SHARE = 0.5
CPU_LIMIT_BYTES = 8 << 30


def slot_bytes(shape: AttentionShape) -> int:
    """K and V of one slot."""
    return 2 * shape.head_dim * shape.dtype.itemsize


def pool_tokens(args: CacheArgs, shape: AttentionShape) -> int:
    """Capacity in tokens of a full cache, after the weights are loaded.

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
        budget = free - int(total * (1 - args.mem_fraction))
    else:
        available = int(psutil.virtual_memory().available * args.mem_fraction * CPU_SHARE)
        budget = min(available, CPU_LIMIT_BYTES)
    # Beside K and V, a slot costs four bytes in each list that names it.
    per_token = shape.rows * (slot_bytes(shape) + 4 * 6)
    tokens = budget // per_token
    if tokens < 1:
        raise ValueError(
            f"no memory for the KV cache: {budget} bytes left, {per_token} needed per token; "
            "lower --mem-fraction's competitors or set --max-total-tokens"
        )
    return tokens
