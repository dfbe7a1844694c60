# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Nucleus and noisy argmax over rows of a vocabulary's size."""

import triton
import triton.language as tl

_MIX32_A = tl.constexpr(0x7FEB352D)
_MIX32_B = tl.constexpr(0x846CA68B)
_UNIT = tl.constexpr(2.0**-31 * (1 - 2.0**-24))
# Bits of 1.0, the largest probability; those of non-negative floats are ordered as the floats are.
_ONE = tl.constexpr(0x3F800000)


@triton.jit
def nucleus_kernel(score_ptr, prob_ptr, p_ptr, width, TILE: tl.constexpr):
    """Scores whose probability is below a row's cut-off become -inf; one program per row.

    The cut-off is the least probability above which there is less than ``p``. Its bits lie in
    ``(low, high]``, which three thresholds quarter in every pass over the row.
    """
    row = tl.program_id(0).to(tl.int64)
    score_ptr += row * width
    prob_ptr += row * width
    p = tl.load(p_ptr + row)
    lane = tl.arange(0, TILE)
    low = tl.full((), -1, tl.int32)
    high = tl.full((), _ONE, tl.int32)
    while high - low > 1:
        step = tl.maximum((high - low) // 4, 1)
        first, second, third = low + step, low + 2 * step, low + 3 * step
        above_first = tl.zeros([TILE], tl.float32)
        above_second = tl.zeros([TILE], tl.float32)
        above_third = tl.zeros([TILE], tl.float32)
        for begin in range(0, width, TILE):
            token = begin + lane
            prob = tl.load(prob_ptr + token, mask=token < width, other=0.0)
            bits = prob.to(tl.int32, bitcast=True)
            above_first += tl.where(bits > first, prob, 0.0)
            above_second += tl.where(bits > second, prob, 0.0)
            above_third += tl.where(bits > third, prob, 0.0)
        # Sums of fewer terms in the same order are never larger, so the three agree.
        if tl.sum(above_first) < p:
            high = tl.minimum(first, high)
        elif tl.sum(above_second) < p:
            low, high = first, tl.minimum(second, high)
        elif tl.sum(above_third) < p:
            low, high = tl.minimum(second, high - 1), tl.minimum(third, high)
        else:
            low = tl.minimum(third, high - 1)
    for begin in range(0, width, TILE):
        token = begin + lane
        bits = tl.load(prob_ptr + token, mask=token < width, other=1.0).to(tl.int32, bitcast=True)
        tl.store(score_ptr + token, float("-inf"), mask=(token < width) & (bits < high))


@triton.jit
def _gumbel(token, first_key, second_key):
    """See ``reference.gumbel_noise``."""
    x = token.to(tl.uint32) + first_key.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * _MIX32_A
    x = ((x ^ (x >> 15)) + second_key.to(tl.uint32, bitcast=True)) * _MIX32_B
    x = (x ^ (x >> 16)) & 0x7FFFFFFF
    uniform = (x.to(tl.int32).to(tl.float32) + 0.5) * _UNIT
    # log(1 - u) has lost the resolution of small uniforms; their series ends below float32's.
    series = 1.0 / 4 + uniform * (1.0 / 5 + uniform * (1.0 / 6))
    series = 1.0 + uniform * (1.0 / 2 + uniform * (1.0 / 3 + uniform * series))
    exponential = tl.where(uniform < 0.03, uniform * series, -tl.log(1.0 - uniform))
    return -tl.log(exponential)


@triton.jit
def noisy_best_kernel(score_ptr, key_ptr, best_ptr, place_ptr, width, TILE: tl.constexpr):
    """The best of a tile of a row after noise was added, and the token it belongs to."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = token < width
    score = tl.load(score_ptr + row * width + token, mask=inside, other=0.0)
    noise = _gumbel(token, tl.load(key_ptr + 2 * row), tl.load(key_ptr + 2 * row + 1))
    # NaN never wins, lest a place past the row does.
    noisy = tl.where(inside & (score == score), score + noise, float("-inf"))
    best, place = tl.max(noisy, 0, return_indices=True)
    target = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(best_ptr + target, best)
    tl.store(place_ptr + target, (tl.program_id(1) * TILE + place).to(tl.int64))


@triton.jit
def best_kernel(best_ptr, place_ptr, token_ptr, parts, TILE: tl.constexpr):
    """The token of a row's best part."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, TILE)
    best = tl.load(best_ptr + row * parts + part, mask=part < parts, other=float("-inf"))
    tl.store(token_ptr + row, tl.load(place_ptr + row * parts + tl.argmax(best, 0)))
