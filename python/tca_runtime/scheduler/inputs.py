"""From a plan of requests to what the engine computes."""

from __future__ import annotations

from tca_runtime.engine.step import ChunkInput, DecodeInput, StepInput
from tca_runtime.scheduler.planner import PlannedChunk, StepPlan


def step_input(plan: StepPlan) -> StepInput:
    """A plan as the engine takes it, without what is computed layer by layer."""
    decode = []
    for request in plan.decode:
        assert request.sequence is not None
        wish, refresh = request.wish, request.refresh
        decode.append(DecodeInput(request.sequence, request.sampling, wish, refresh))
    return StepInput(decode, [_chunk_input(chunk) for chunk in plan.chunks])


def _chunk_input(chunk: PlannedChunk) -> ChunkInput:
    request = chunk.request
    assert request.sequence is not None
    last = chunk.end == request.num_tokens and request.max_new_tokens > 0
    first_wanted = max(chunk.begin + 1, request.logprob_start, 1)
    stop = min(chunk.end + 1, request.num_prompt)
    targets = None
    if not request.num_output and first_wanted < stop:
        targets = request.tokens[first_wanted:stop]
    return ChunkInput(
        sequence=request.sequence,
        tokens=request.tokens[chunk.begin : chunk.end],
        slots=chunk.slots,
        sampling=request.sampling if last else None,
        logprobs=request.wish,
        prompt_offset=first_wanted - 1 - chunk.begin,
        prompt_targets=targets,
        sparsity=request.sparsity,
        ends_prompt=chunk.end == request.num_tokens,
        sees_past=chunk.sees_past,
    )
