"""Settings every test relies on."""

from __future__ import annotations

import os

import torch

# Triton reads this when it is first imported, which transformers does too.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
