"""From hidden states to sampled tokens and log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from tca_runtime.engine.logprobs import PendingLogprobs, prompt_logprobs, token_logprobs
from tca_runtime.engine.sampler import RowSampling, Sampler
from tca_runtime.engine.step import ChunkInput, LogprobWish, PositionLogprobs, StepInput, StepOutput
from tca_runtime.models.base import CausalLM
from tca_runtime.sparsity.chooser import DecodeView


def collect_output(
    model: CausalLM,
    sampler: Sampler,
    step: StepInput,
    hidden: Tensor,
    decode_views: list[DecodeView | None],
) -> StepOutput:
    """Sample for every decode request and every chunk that ends its prompt.

    Only the rows that sample, and prompt positions whose logprobs are wanted, are projected to
    the vocabulary.
    """
    rows: list[RowSampling] = [d.sampling for d in step.decode]
    wishes: list[LogprobWish | None] = [d.logprobs for d in step.decode]
    positions = list(range(len(step.decode)))
    prompts: list[list[PositionLogprobs]] = []
    begin = len(step.decode)
    for chunk in step.chunks:
        states = hidden[begin : begin + len(chunk.tokens)]
        begin += len(chunk.tokens)
        prompts.append(_prompt(model, chunk, states))
        if chunk.sampling is not None:
            rows.append(chunk.sampling)
            wishes.append(chunk.logprobs)
            positions.append(begin - 1)
    tokens, entries = _sample(model, sampler, hidden, positions, rows, wishes)
    num_decode = len(step.decode)
    sampled = iter(zip(tokens[num_decode:], entries[num_decode:], strict=True))
    ends = [next(sampled) if c.sampling is not None else (None, None) for c in step.chunks]
    return StepOutput(
        decode_tokens=tokens[:num_decode],
        chunk_tokens=[token for token, _ in ends],
        decode_logprobs=entries[:num_decode],
        chunk_logprobs=[entry for _, entry in ends],
        prompt_logprobs=prompts,
        decode_views=decode_views,
    )


def _sample(
    model: CausalLM,
    sampler: Sampler,
    hidden: Tensor,
    positions: list[int],
    rows: list[RowSampling],
    wishes: list[LogprobWish | None],
) -> tuple[list[int], list[PositionLogprobs | None]]:
    if not rows:
        return [], []
    if len(positions) < len(hidden):
        hidden = hidden[torch.tensor(positions, device=hidden.device)]
    logits = model.logits(hidden)
    tokens = sampler.sample(logits, rows)
    pending: PendingLogprobs | None = None
    wanted = [i for i, wish in enumerate(wishes) if wish is not None]
    if wanted:
        index = torch.tensor(wanted, device=logits.device)
        chosen = [wish for wish in wishes if wish is not None]
        pending = token_logprobs(logits[index], tokens[index], chosen)
    entries: list[PositionLogprobs | None] = [None] * len(rows)
    if pending is not None:
        for i, entry in zip(wanted, pending.entries(), strict=True):
            entries[i] = entry
    return tokens.tolist(), entries


def _prompt(model: CausalLM, chunk: ChunkInput, states: Tensor) -> list[PositionLogprobs]:
    if chunk.prompt_targets is None or chunk.logprobs is None:
        return []
    wanted = states[chunk.prompt_offset :][: len(chunk.prompt_targets)]
    return prompt_logprobs(model.logits, wanted, chunk.prompt_targets, chunk.logprobs)
