"""From settings to a model that runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from tca_kernels.dispatch import compile_for_cpu
from tca_runtime.config import ModelArgs
from tca_runtime.fetch_model import resolve
from tca_runtime.gguf_file import GgufError, GgufFile
from tca_runtime.models.base import CausalLM
from tca_runtime.models.config import ModelConfig, named_config
from tca_runtime.models.decoder import Decoder
from tca_runtime.models.errors import ModelError
from tca_runtime.models.gguf_config import ROPE_DIVISORS, config_from_gguf
from tca_runtime.models.hf_config import config_from_directory
from tca_runtime.models.registry import find_architecture
from tca_runtime.models.weights.builder import WeightBuilder
from tca_runtime.models.weights.dummy import DummySource
from tca_runtime.models.weights.gguf import GgufSource, dequantise
from tca_runtime.models.weights.safetensors import SafetensorsSource
from tca_runtime.models.weights.source import WeightSource


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory. ``dtype`` is that of weights, activations and KV cache."""

    model: CausalLM
    config: ModelConfig
    dtype: torch.dtype
    device: torch.device


def load_model(args: ModelArgs) -> LoadedModel:
    """Load the model that ``args`` names; known names are fetched first.

    Raises
    ------
    ModelError
        If files are missing, broken or do not fit together, a setting is not supported, or the
        device does not exist.
    FetchError
        If a known model cannot be downloaded.
    """
    device = _device(args.device)
    if args.load_format == "dummy":
        config = _dummy_config(args)
        dtype = _dtype(args.dtype, config, device)
        source: WeightSource = DummySource(dtype, device)
    else:
        config, source = open_checkpoint(resolve(args.model_path))
        dtype = _dtype(args.dtype, config, device)
    config = _with_context_length(config, args)
    model = Decoder(config, WeightBuilder(source, dtype, device))
    if device.type == "cpu" and dtype == torch.float32:
        compile_for_cpu()
    return LoadedModel(model, config, dtype, device)


def read_config(path: Path) -> ModelConfig:
    """The configuration of a Hugging Face directory or a GGUF file, without its weights."""
    if path.is_dir():
        return config_from_directory(path)
    return _open_gguf(path)[1]


def open_checkpoint(path: Path) -> tuple[ModelConfig, WeightSource]:
    """A checkpoint's configuration and its weights, from a directory or a GGUF file."""
    if path.is_dir():
        return config_from_directory(path), SafetensorsSource(path)
    file, config = _open_gguf(path)
    architecture = find_architecture(config.architecture, str(path))
    return config, GgufSource(file, config, architecture)


def _open_gguf(path: Path) -> tuple[GgufFile, ModelConfig]:
    try:
        file = GgufFile(path)
    except GgufError as error:
        raise ModelError(str(error)) from error
    divisors = file.tensors.get(ROPE_DIVISORS)
    values = tuple(dequantise(file, divisors).tolist()) if divisors else ()
    return file, config_from_gguf(file, values)


def _dummy_config(args: ModelArgs) -> ModelConfig:
    if args.model_config is not None:
        config = named_config(args.model_config)
        if args.tokenizer_path is None:
            return config
        # The tokenizer's ids must all have an embedding.
        size = _vocabulary_size(resolve(args.tokenizer_path))
        return replace(config, vocab_size=max(config.vocab_size, size))
    path = Path(args.model_path).expanduser()
    if not path.exists():
        raise ModelError(
            "--load-format dummy needs --model-config NAME, or --model-path of a Hugging Face "
            "directory or GGUF file whose configuration to use"
        )
    return read_config(path)


def _vocabulary_size(path: Path) -> int:
    if path.is_file():
        return len(GgufFile(path).metadata.get("tokenizer.ggml.tokens", ()))
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"{path}: expected a tokenizer.json there, found none")
    return max(Tokenizer.from_file(str(file)).get_vocab().values()) + 1


def _device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ModelError("--device cuda: no CUDA device is available")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def _dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    if name != "auto":
        return {
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
        }[name]
    if device.type == "cpu":
        return torch.float32
    return config.dtype if config.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16


def _with_context_length(config: ModelConfig, args: ModelArgs) -> ModelConfig:
    length = args.context_length or config.max_position
    if length > config.max_position and args.load_format != "dummy":
        raise ModelError(
            f"--context-length {length} is more than the model's {config.max_position}"
        )
    if config.sliding_window is not None and config.sliding_window < length:
        raise ModelError(
            f"the model attends to a sliding window of {config.sliding_window} tokens, which is "
            f"not supported; --context-length {config.sliding_window} stays within it"
        )
    return replace(config, max_position=length)
