"""The Hopper kernels compile without a GPU, and keep the schedule that they were written for."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton.experimental.gluon")

# In a process of its own: this one interprets kernels instead of compiling them.
COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from tca_kernels.gluon import score

kernel = getattr(score, sys.argv[1])
pointers = dict(q_ptr="*bf16", kv_ptr="*bf16", arena_ptr="*i32", start_ptr="*i64",
                table_ptr="*i64", partial_ptr="*fp32", lse_ptr="*fp32", out_ptr="*fp32",
                scale_log2="fp32")
constants = dict(PROBES=32, GROUP=4, ROWS=128, D=128, BLOCK=64, STAGES=3)
names = kernel.arg_names
signature = {n: pointers.get(n, "constexpr" if n in constants else "i32") for n in names}
aligned = ("q_ptr", "kv_ptr", "q_stride_n", "q_stride_p", "q_stride_h")
attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
values = {(names.index(n),): value for n, value in constants.items()}
source = GluonASTSource(kernel, signature, values, attributes)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
print("shared", compiled.metadata.shared)
print(compiled.asm["ptx"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["paired_lse_kernel", "paired_weights_kernel"])
def test_exponentials_run_under_the_products(kernel: str) -> None:
    search = os.pathsep.join(sys.path)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": search}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, kernel], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    header, ptx = done.stdout.split("\n", 1)
    # Two programs share a multiprocessor's 228 KiB, 1 KiB of each for the system.
    assert 2 * (int(header.split()[1]) + 1024) <= 228 << 10
    events = re.findall(r"wgmma\.(commit_group|wait_group)|(ex2)\.approx", ptx)
    order = [mma or other for mma, other in events]
    starts = [i for i, event in enumerate(order) if event == "commit_group"]
    assert len(starts) == 3
    # The first product of a program has nothing to run under it; the loop's two have a tile each.
    # The block that closes the loop stands before its head.
    around = order + order
    under = [around[i:].index("wait_group") - 1 for i in starts]
    assert under[0] == 0 and min(under[1:]) >= 64
