"""GGUF files load to the weights and settings they were made from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader

from tca_runtime.config import ModelArgs
from tca_runtime.gguf_file import GgufError, GgufFile
from tca_runtime.models.errors import ModelError
from tca_runtime.models.loader import load_model
from tests.models.checkpoints import logits_of, random_ids, random_model
from tests.models.gguf_files import quantise_in_place, write_gguf

F32, Q8_0, Q4_0 = (
    GGMLQuantizationType.F32,
    GGMLQuantizationType.Q8_0,
    GGMLQuantizationType.Q4_0,
)


@pytest.mark.parametrize("kind", [F32, GGMLQuantizationType.F16, Q8_0, Q4_0])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
    ],
)
def test_logits_equal_the_quantised_original(
    family: str, settings: dict[str, Any], kind: GGMLQuantizationType, tmp_path: Path
) -> None:
    reference = random_model(family, **settings)
    path = tmp_path / "model.gguf"
    write_gguf(reference, path, kind)
    quantise_in_place(reference, kind)
    loaded = load_model(ModelArgs(model_path=str(path), device="cpu"))
    ids = random_ids(40)
    with torch.inference_mode():
        expected = reference(ids[None]).logits[0]
    assert (logits_of(loaded.model, ids, [39, 1]) - expected).abs().max() < 1e-4
    assert loaded.config.eos_token_ids == (2,)
    assert loaded.config.tie_embeddings == bool(settings.get("tie_word_embeddings"))


def test_frequency_divisors_are_llama3_rope(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    reference = random_model("llama", rope_parameters=rope)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, 16, 2) / 16)
    divisors = (plain / reference.model.rotary_emb.inv_freq).numpy()
    path = tmp_path / "model.gguf"
    write_gguf(reference, path, F32, **{"rope_freqs.weight": divisors})
    loaded = load_model(ModelArgs(model_path=str(path), device="cpu"))
    ids = random_ids(100)
    with torch.inference_mode():
        expected = reference(ids[None]).logits[0]
    assert (logits_of(loaded.model, ids, [100]) - expected).abs().max() < 1e-4


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(random_model("llama"), path, Q8_0)
    return path


def test_header_equals_the_reference_reader(path: Path) -> None:
    file, reference = GgufFile(path), GGUFReader(path)
    fields = {k: f.contents() for k, f in reference.fields.items() if not k.startswith("GGUF.")}
    assert file.metadata == fields
    assert list(file.tensors) == [t.name for t in reference.tensors]
    for tensor in reference.tensors:
        raw = file.raw(file.tensors[tensor.name])
        assert file.tensors[tensor.name].shape == tuple(int(n) for n in tensor.shape[::-1])
        assert raw.tobytes() == tensor.data.tobytes()


def test_any_truncation_is_an_error_that_names_the_file(path: Path, tmp_path: Path) -> None:
    content = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (*range(0, 2000, 37), len(content) // 2, len(content) - 32):
        cut.write_bytes(content[:size])
        with pytest.raises(GgufError, match=r"cut\.gguf"):
            GgufFile(cut)
    with pytest.raises(ModelError, match=r"cut\.gguf.*truncated"):
        load_model(ModelArgs(model_path=str(cut), device="cpu"))


def test_not_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(os.urandom(4) + b"\0" * 100)
    with pytest.raises(ModelError, match="not a GGUF file"):
        load_model(ModelArgs(model_path=str(path), device="cpu"))


def test_missing_and_misshapen_tensors_are_named(path: Path, tmp_path: Path) -> None:
    content = path.read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(ModelError, match=r"broken\.gguf: tensor 'blk\.1\.ffn_up\.weight' is miss"):
        load_model(ModelArgs(model_path=str(broken), device="cpu"))
    file = GgufFile(path)
    assert file.metadata["llama.feed_forward_length"] == 96
    key = b"llama.feed_forward_length"
    at = content.index(key) + len(key) + 4
    broken.write_bytes(content[:at] + (64).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(ModelError, match=r"ffn_gate\.weight' has shape \(96, 64\), expected \(64,"):
        load_model(ModelArgs(model_path=str(broken), device="cpu"))


def test_unsupported_architecture_is_named(path: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(path.read_bytes().replace(b"llama", b"gemma"))
    with pytest.raises(ModelError, match="'gemma' is not supported; supported are: llama, qwen2"):
        load_model(ModelArgs(model_path=str(broken), device="cpu"))
