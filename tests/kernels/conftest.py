"""Run every kernel twice: under Triton's interpreter on the CPU, and compiled where a GPU is."""

from __future__ import annotations

import os

import pytest
import torch

# Read when triton is first imported, which nothing on a CPU does before this point.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tca_kernels import dispatch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device on which the public functions run the Triton kernels."""
    interpret = os.environ.get("TRITON_INTERPRET") == "1"
    if request.param == "cuda" and (interpret or not torch.cuda.is_available()):
        pytest.skip("needs a CUDA device and no TRITON_INTERPRET")
    if request.param == "interpreter":
        if not interpret:
            pytest.skip("kernels are compiled on this machine")
        language = pytest.importorskip("triton.language")
        if "Interpreted" not in type(language.sum).__name__:
            pytest.fail(
                "triton was imported before TRITON_INTERPRET=1 was set; set it in the environment"
            )
    monkeypatch.setattr(dispatch, "use_triton", lambda tensor: True)
    return torch.device("cuda" if request.param == "cuda" else "cpu")


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    if request.param is torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter's dot is wrong on bfloat16")
    assert isinstance(request.param, torch.dtype)
    return request.param
