"""Settings every test relies on."""

from __future__ import annotations

import os

# Threads that wait must not take the processor from those that work: other tests may run beside.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import settings

# The same examples every time: a change is judged by what it did. Elsewhere tests explore.
settings.register_profile("ci", derandomize=True)

# Triton reads this when it is first imported, which transformers does too.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
