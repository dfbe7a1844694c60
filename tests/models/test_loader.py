"""Settings of ``load_model``: dummy weights, context length, dtype, device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tca_runtime.config import ModelArgs
from tca_runtime.fetch_model import FetchError
from tca_runtime.models.errors import ModelError
from tca_runtime.models.loader import load_model
from tca_runtime.tokenizer.loading import load_tokenizer
from tests.models.checkpoints import logits_of, random_ids, random_model, save

TINY = ModelArgs(load_format="dummy", model_config="tiny", device="cpu")


def test_dummy_weights_are_the_same_every_time() -> None:
    first, second = load_model(TINY), load_model(TINY)
    ids = random_ids(30)
    logits = logits_of(first.model, ids, [30])
    assert torch.equal(logits, logits_of(second.model, ids, [30]))
    assert logits.isfinite().all()
    assert len(set(logits.argmax(-1).tolist())) > 1


def test_tiny_fits_the_byte_tokenizer() -> None:
    config, tokenizer = load_model(TINY).config, load_tokenizer(TINY)
    assert config.vocab_size == len(tokenizer)
    assert config.bos_token_id == tokenizer.bos_token_id
    assert tokenizer.eos_token_id in config.eos_token_ids


def test_dummy_grows_to_a_given_tokenizer(tmp_path: Path) -> None:
    load_tokenizer(TINY).save_pretrained(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 399, "content": "<far>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    args = ModelArgs(
        load_format="dummy", model_config="tiny", tokenizer_path=str(tmp_path), device="cpu"
    )
    assert (
        load_model(args).config.vocab_size
        == load_tokenizer(args).convert_tokens_to_ids("<far>") + 1
    )


def test_dummy_takes_the_shape_of_a_checkpoint_without_its_weights(tmp_path: Path) -> None:
    save(random_model("qwen3", head_dim=32), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    args = ModelArgs(model_path=str(tmp_path), load_format="dummy", device="cpu")
    loaded = load_model(args)
    assert loaded.config.architecture == "Qwen3ForCausalLM"
    assert logits_of(loaded.model, random_ids(9), [9]).shape == (9, 96)


def test_dummy_without_a_shape_says_what_is_needed() -> None:
    with pytest.raises(ModelError, match="--model-config"):
        load_model(ModelArgs(load_format="dummy", device="cpu"))
    with pytest.raises(ModelError, match=r"'nope' is not known.*llama-3\.1-8b, qwen2\.5-7b, tiny"):
        load_model(ModelArgs(load_format="dummy", model_config="nope", device="cpu"))


def test_unknown_model_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="nowhere.*smollm2-135m"):
        load_model(ModelArgs(model_path=str(tmp_path / "nowhere"), device="cpu"))


def test_dtype_is_the_one_asked_for_and_logits_stay_float32(tmp_path: Path) -> None:
    reference = random_model("llama", tie_word_embeddings=True)
    save(reference, tmp_path)
    loaded = load_model(ModelArgs(model_path=str(tmp_path), dtype="bfloat16", device="cpu"))
    assert loaded.dtype == torch.bfloat16
    ids = random_ids(30)
    logits = logits_of(loaded.model, ids, [29, 1])
    assert logits.dtype == torch.float32
    with torch.inference_mode():
        expected = reference.to(torch.bfloat16)(ids[None]).logits[0].float()
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
    auto = load_model(ModelArgs(model_path=str(tmp_path), device="cpu"))
    assert auto.dtype == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu_is_named() -> None:
    with pytest.raises(ModelError, match="--device cuda"):
        load_model(ModelArgs(load_format="dummy", model_config="tiny", device="cuda"))


def test_context_length(tmp_path: Path) -> None:
    save(random_model("llama"), tmp_path)
    args = ModelArgs(model_path=str(tmp_path), context_length=100, device="cpu")
    assert load_model(args).config.max_position == 100
    with pytest.raises(ModelError, match="--context-length 513 is more than the model's 512"):
        load_model(ModelArgs(model_path=str(tmp_path), context_length=513, device="cpu"))


def test_sliding_window_smaller_than_the_context_is_refused(tmp_path: Path) -> None:
    save(random_model("mistral", sliding_window=128), tmp_path)
    with pytest.raises(ModelError, match="sliding window of 128.*--context-length 128"):
        load_model(ModelArgs(model_path=str(tmp_path), device="cpu"))
    load_model(ModelArgs(model_path=str(tmp_path), context_length=128, device="cpu"))
