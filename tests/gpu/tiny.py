"""A small random model on disk, and the scheduler's loop over it without processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tca_runtime.config import (
    AttentionArgs,
    CacheArgs,
    ModelArgs,
    RuntimeConfig,
    SchedulerArgs,
    SparsityArgs,
)
from tca_runtime.engine.engine import Engine
from tca_runtime.sampling_params import SamplingParams
from tca_runtime.scheduler.in_memory import in_memory_scheduler

LAYERS, HIDDEN, Q_HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB = 3, 128, 4, 2, 64, 256, 260


def write_model(path: Path, head_dim: int = HEAD_DIM, seed: int = 0) -> Path:
    """A Hugging Face directory whose logits differ enough for greedy tokens to be stable."""
    generator = torch.Generator().manual_seed(seed)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": Q_HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": head_dim,
        "intermediate_size": INNER,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 16384,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "torch_dtype": "float32",
        "hidden_act": "silu",
    }
    tensors = {"model.norm.weight": torch.ones(HIDDEN)}

    def add(name: str, rows: int, columns: int) -> None:
        weight = torch.randn(rows, columns, generator=generator) * columns**-0.5
        tensors[f"{name}.weight"] = weight * 1.5

    add("model.embed_tokens", VOCAB, HIDDEN)
    add("lm_head", VOCAB, HIDDEN)
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        add(f"{layer}.self_attn.q_proj", Q_HEADS * head_dim, HIDDEN)
        add(f"{layer}.self_attn.k_proj", KV_HEADS * head_dim, HIDDEN)
        add(f"{layer}.self_attn.v_proj", KV_HEADS * head_dim, HIDDEN)
        add(f"{layer}.self_attn.o_proj", HIDDEN, Q_HEADS * head_dim)
        add(f"{layer}.mlp.gate_proj", INNER, HIDDEN)
        add(f"{layer}.mlp.up_proj", INNER, HIDDEN)
        add(f"{layer}.mlp.down_proj", HIDDEN, INNER)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = torch.ones(HIDDEN)
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
    return path


class Loop:
    """Engine and scheduler in this process."""

    def __init__(self, config: RuntimeConfig, warm: bool = True) -> None:
        self.engine = Engine(config)
        if warm:
            self.engine.warm_up()
        made = in_memory_scheduler(config, self.engine, 16384)
        self.scheduler, self.inbox, self.outbox = made

    def submit(self, rid: str, prompt: list[int], new_tokens: int, **params: Any) -> None:
        """Send a request; greedy unless ``params`` says otherwise."""
        params = {"temperature": 0.0, "ignore_eos": True, **params}
        sampling = SamplingParams(max_new_tokens=new_tokens, **params)
        self.inbox.submit(rid, prompt, sampling)

    def generate(self, prompts: list[list[int]], new_tokens: int, **params: Any) -> list[list[int]]:
        """Tokens of each prompt, all requests at once; checks the slots afterwards."""
        self.outbox.outputs.clear()
        for i, prompt in enumerate(prompts):
            self.submit(str(i), prompt, new_tokens, **params)
        self.scheduler.run_once()
        while not self.scheduler.planner.is_idle:
            self.scheduler.run_once()
        self.engine.cache.check()
        results: list[list[int]] = [[] for _ in prompts]
        for output in self.outbox.outputs:
            results[int(output.rid)] += output.token_ids
        return results


def loop(model: Path, device: str, backend: str = "auto", **changes: Any) -> Loop:
    """A float32 loop with small chunks unless ``changes`` says otherwise."""
    tca = changes.pop("tca", None)
    sparsity = SparsityArgs(
        disable_tca=tca is None,
        tca_config=tca,
        tca_window=64,
        tca_min_candidates=128,
        tca_retention=changes.pop("retention", "on-pressure"),
        host_cache_size=changes.pop("host_cache_size", 0.0),
    )
    config = RuntimeConfig(
        model=ModelArgs(
            model_path=str(model), device=device, dtype=changes.pop("dtype", "float32")
        ),
        cache=CacheArgs(max_total_tokens=changes.pop("tokens", 30000)),
        scheduler=SchedulerArgs(
            max_running_requests=16,
            chunked_prefill_size=changes.pop("chunk", 512),
            disable_overlap=changes.pop("disable_overlap", False),
        ),
        attention=AttentionArgs(attention_backend=backend),
        sparsity=sparsity,
    )
    assert not changes
    return Loop(config, warm=device == "cuda")


def random_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, n).tolist() for n in lengths]
