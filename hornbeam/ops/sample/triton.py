"""Sampling without sorting: penalties in one pass, thresholds by search, then the best of logits and noise.

The best is found in two kernels: the first bounds the scores of each stretch of the vocabulary from above, with noise
that takes a few instructions; the second computes exact scores where the bounds are highest, mostly in one stretch of
each row. A threshold is found by one program per row, which looks at the row again and again, each time with a few
pivots inside the interval that is left.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.device import needs_cuda
from hornbeam.ops.launch import Kernel, cdiv, next_power_of_2
from hornbeam.ops.query import OpQuery
from hornbeam.ops.sample.contract import GENERATED

_BLOCK = 1024  # vocabulary entries that are bounded, or weighed exactly, together
_MAX_ROWS = 8  # that a program bounds, which share what the noise owes to the token alone
_PROGRAMS = 4096  # enough to fill a device: with fewer stretches, a program bounds fewer rows
_SEARCH_BLOCK = 4096  # vocabulary entries that a search looks at together


@triton.jit
def _finish_mix(h):
    """The contract's finalizer of 32-bit words, after its first step."""
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _mix(h):
    """The contract's finalizer of 32-bit words."""
    return _finish_mix(h ^ (h >> 16))


@triton.jit
def _half_mixed_tokens(tokens):
    """What `_noise_bits` wants of tokens."""
    h = _mix(tokens.to(tl.uint32) + 1)
    return h ^ (h >> 16)


@triton.jit
def _half_mixed_key(seed, position):
    """What `_noise_bits` wants of a row."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    key = _mix(_mix(low) + high)
    key = _mix(key + position.to(tl.uint32) * 0x9E3779B9)
    return key ^ (key >> 16)


@triton.jit
def _noise_bits(half_mixed_key, half_mixed_tokens):
    """The contract's random bits. The first step of a mix is linear, so that it is done for keys and tokens apart."""
    return _finish_mix(half_mixed_key ^ half_mixed_tokens)


@triton.jit
def _first_best(scores, ids, vocab_size):
    """The largest score and the lowest id that has it; a valid id even if all scores are nan."""
    best = tl.max(scores, 0)
    return best, tl.minimum(tl.min(tl.where(scores == best, ids, vocab_size), 0), vocab_size - 1)


@triton.jit
def _logits(row_ptr, tokens, threshold_ptr, VOCAB_SIZE: tl.constexpr, FILTERED: tl.constexpr):
    """Of some of a row's tokens, float32, -inf for those that are excluded."""
    logits = tl.load(row_ptr + tokens, mask=tokens < VOCAB_SIZE, other=-float("inf")).to(tl.float32)
    if FILTERED:
        logits = tl.where(logits < tl.load(threshold_ptr), -float("inf"), logits)
    return logits


# Slots come out of an upload at any offset, and what requests ask for is rows of one table: specialised on alignment,
# kernels would be compiled several times.
@Kernel
@triton.jit(
    do_not_specialize=["num_rows", "rows_per_program", "num_blocks"],
    do_not_specialize_on_alignment=["slots_ptr", "positions_ptr"],
)
def _bound_kernel(
    logits_ptr,
    slots_ptr,
    positions_ptr,
    temperatures_ptr,
    seeds_ptr,
    thresholds_ptr,
    bounds_ptr,
    logits_stride,
    num_rows,
    rows_per_program,
    num_blocks,
    VOCAB_SIZE: tl.constexpr,
    FILTERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A number that no score of BLOCK tokens exceeds, for some rows: for greedy ones their best score itself.

    With y = 1 - uniform, noise is at most -log(y), as -log(1 - y) >= y. And log2(y) is at least what y's bits say when
    they are read as a fixed-point number, since log2(1 + m) >= m for a mantissa m.
    """
    block = tl.program_id(0)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    half_mixed_tokens = _half_mixed_tokens(tokens)
    first = tl.program_id(1).to(tl.int64) * rows_per_program
    for row in range(first, tl.minimum(first + rows_per_program, num_rows)):
        row_ptr = logits_ptr + row * logits_stride
        logits = _logits(row_ptr, tokens, thresholds_ptr + row, VOCAB_SIZE, FILTERED)
        slot = tl.load(slots_ptr + row)
        temperature = tl.load(temperatures_ptr + slot)
        if temperature > 0:
            key = _half_mixed_key(tl.load(seeds_ptr + slot), tl.load(positions_ptr + row))
            bits = _noise_bits(key, half_mixed_tokens)
            # y is (~bits >> 9) + 0.5 units of 2^-23: below the exponent of 1, these bits are the float 1 + y - 2^-24.
            y = ((~bits >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 0.999999940395355224609375
            fixed_log = y.to(tl.int32, bitcast=True).to(tl.float32)  # (log2(y) + 127) * 2^23, or less
            bound = tl.max(logits * (1.0 / temperature) - fixed_log * 8.262958294867817e-08, 0) + 88.02969193111305
            bound = tl.maximum(bound * 1.000001, bound * 0.999999) + 1e-3  # more than what is lost by rounding
        else:
            bound = tl.max(logits, 0)
        tl.store(bounds_ptr + row * num_blocks + block, bound)


@Kernel
@triton.jit(do_not_specialize=["num_blocks"], do_not_specialize_on_alignment=["slots_ptr", "positions_ptr"])
def _choose_kernel(
    logits_ptr,
    slots_ptr,
    positions_ptr,
    temperatures_ptr,
    seeds_ptr,
    thresholds_ptr,
    bounds_ptr,
    out_ptr,
    last_ids_ptr,
    logits_stride,
    num_blocks,
    VOCAB_SIZE: tl.constexpr,
    FILTERED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The best token of a row, by exact scores where the bound is highest, and wherever one may be better."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    temperature = tl.load(temperatures_ptr + slot)
    key = _half_mixed_key(tl.load(seeds_ptr + slot), tl.load(positions_ptr + row))
    blocks = tl.arange(0, BLOCKS)
    bounds = tl.load(bounds_ptr + row * num_blocks + blocks, mask=blocks < num_blocks, other=-float("inf"))
    best, chosen = -float("inf"), VOCAB_SIZE - 1
    searching = True
    while searching:
        _, block = _first_best(bounds, blocks, num_blocks)
        tokens = block * BLOCK + tl.arange(0, BLOCK)
        row_ptr = logits_ptr + row * logits_stride
        scores = _logits(row_ptr, tokens, thresholds_ptr + row, VOCAB_SIZE, FILTERED)
        if temperature > 0:
            bits = _noise_bits(key, _half_mixed_tokens(tokens))
            uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
            scores = scores / temperature - tl.log(-tl.log(uniform))
        score, token = _first_best(scores, tokens, VOCAB_SIZE)
        if (score > best) | ((score == best) & (token < chosen)):
            best, chosen = score, token
        bounds = tl.where(blocks == block, -float("inf"), bounds)
        searching = tl.max(bounds, 0) > best
    tl.store(out_ptr + row, chosen)
    tl.store(last_ids_ptr + slot, chosen)


@triton.jit
def _tile(row_ptr, start, temperature, top, BY_MASS: tl.constexpr, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK logits of a row, and what each weighs: its share of the mass (1 for the likeliest token), or 1."""
    tokens = start + tl.arange(0, BLOCK)
    logits = tl.load(row_ptr + tokens, mask=tokens < VOCAB_SIZE, other=-float("inf")).to(tl.float32)
    if BY_MASS:
        return logits, tl.exp((logits - top) / temperature)
    return logits, tl.where(tokens < VOCAB_SIZE, 1.0, 0.0)


@triton.jit
def _search(
    row_ptr,
    target,
    low,
    top,
    temperature,
    BY_MASS: tl.constexpr,
    VOCAB_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest logit of a row, at least `low`, at or above which tokens weigh `target` together.

    Tokens from `low` on weigh enough, those above `top`, the row's largest, nothing. Each pass splits the interval
    [low, high) into four, and ends the search if only one value is left in it.
    """
    high = top + tl.maximum(tl.abs(top), 1e-30) * 1e-6  # above `top`, and so above every value
    found = False
    while not found:
        step = (high - low) * 0.25
        first, second, third = low + step, low + 2 * step, low + 3 * step
        weights_first = tl.zeros((BLOCK,), tl.float32)
        weights_second = tl.zeros((BLOCK,), tl.float32)
        weights_third = tl.zeros((BLOCK,), tl.float32)
        smallest = tl.full((BLOCK,), float("inf"), tl.float32)
        largest = tl.full((BLOCK,), -float("inf"), tl.float32)
        for start in range(0, VOCAB_SIZE, BLOCK):
            logits, weights = _tile(row_ptr, start, temperature, top, BY_MASS, VOCAB_SIZE, BLOCK)
            weights_first += tl.where(logits >= first, weights, 0.0)
            weights_second += tl.where(logits >= second, weights, 0.0)
            weights_third += tl.where(logits >= third, weights, 0.0)
            smallest = tl.minimum(smallest, tl.where(logits >= low, logits, float("inf")))
            largest = tl.maximum(largest, tl.where(logits < high, logits, -float("inf")))
        lowest, highest = tl.min(smallest, 0), tl.max(largest, 0)
        found = lowest >= highest
        if found:
            low = lowest
        elif tl.sum(weights_third, 0) >= target:
            low = third
        elif tl.sum(weights_second, 0) >= target:
            low, high = second, third
        elif tl.sum(weights_first, 0) >= target:
            low, high = first, second
        else:
            high = first
    return low


@triton.jit
def _mass(row_ptr, low, top, temperature, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """What tokens from `low` on weigh together."""
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, VOCAB_SIZE, BLOCK):
        logits, weights = _tile(row_ptr, start, temperature, top, True, VOCAB_SIZE, BLOCK)
        sums += tl.where(logits >= low, weights, 0.0)
    return tl.sum(sums, 0)


@Kernel
@triton.jit(do_not_specialize_on_alignment=["temperatures_ptr", "top_ks_ptr", "top_ps_ptr", "min_ps_ptr"])
def _threshold_kernel(
    logits_ptr,
    temperatures_ptr,
    top_ks_ptr,
    top_ps_ptr,
    min_ps_ptr,
    out_ptr,
    logits_stride,
    VOCAB_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The threshold of one row."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    temperature, top_k = tl.load(temperatures_ptr + row), tl.load(top_ks_ptr + row)
    top_p, min_p = tl.load(top_ps_ptr + row), tl.load(min_ps_ptr + row)
    threshold = -float("inf")
    if (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0)):
        largest = tl.full((BLOCK,), -float("inf"), tl.float32)
        smallest = tl.full((BLOCK,), float("inf"), tl.float32)
        for start in range(0, VOCAB_SIZE, BLOCK):
            logits, _ = _tile(row_ptr, start, temperature, 0.0, False, VOCAB_SIZE, BLOCK)
            largest = tl.maximum(largest, logits)
            smallest = tl.minimum(smallest, tl.where(logits > -float("inf"), logits, float("inf")))
        top, low = tl.max(largest, 0), tl.min(smallest, 0)
        if (top_k > 0) & (top_k < VOCAB_SIZE):
            low = _search(row_ptr, top_k.to(tl.float32), low, top, temperature, False, VOCAB_SIZE, BLOCK)
            threshold = low
        if top_p < 1:
            target = top_p * _mass(row_ptr, low, top, temperature, VOCAB_SIZE, BLOCK)
            threshold = _search(row_ptr, target, low, top, temperature, True, VOCAB_SIZE, BLOCK)
        if min_p > 0:
            threshold = tl.maximum(threshold, top + temperature * tl.log(min_p))
    tl.store(out_ptr + row, threshold)


@Kernel
@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "repetition_ptr", "frequency_ptr", "presence_ptr"])
def _penalty_kernel(
    logits_ptr,
    slots_ptr,
    counts_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    out_ptr,
    logits_stride,
    VOCAB_SIZE: tl.constexpr,
    GENERATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK tokens of one row."""
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < VOCAB_SIZE
    logits = tl.load(logits_ptr + row * logits_stride + tokens, mask=inside).to(tl.float32)
    seen = tl.load(counts_ptr + tl.load(slots_ptr + row) * VOCAB_SIZE + tokens, mask=inside, other=0)
    repetition = tl.load(repetition_ptr + row)
    generated = seen // GENERATED
    scaled = tl.where(logits > 0, logits / repetition, logits * repetition)
    logits = tl.where(seen > 0, scaled, logits) - tl.load(frequency_ptr + row) * generated.to(tl.float32)
    logits -= tl.where(generated > 0, tl.load(presence_ptr + row), 0.0)
    tl.store(out_ptr + row * VOCAB_SIZE + tokens, logits, mask=inside)


class TritonSample:
    """See `Sample`."""

    def supports(self, query: OpQuery) -> str | None:
        """CUDA devices."""
        return needs_cuda(query)

    def sample(
        self,
        logits: Tensor,
        slots: Tensor,
        positions: Tensor,
        temperatures: Tensor,
        seeds: Tensor,
        last_ids: Tensor,
        thresholds: Tensor | None = None,
    ) -> Tensor:
        """See `Sample`."""
        assert logits.stride(1) == 1, "a row's logits must be adjacent"
        num_rows, vocab_size = logits.shape
        num_blocks = cdiv(vocab_size, _BLOCK)
        bounds = torch.empty((num_rows, num_blocks), dtype=torch.float32, device=logits.device)
        out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
        rows = logits, slots, positions, temperatures, seeds, temperatures if thresholds is None else thresholds
        sizes = {"VOCAB_SIZE": vocab_size, "FILTERED": thresholds is not None, "BLOCK": _BLOCK}
        rows_per_program = min(max(num_rows * num_blocks // _PROGRAMS, 1), _MAX_ROWS)
        _bound_kernel[(num_blocks, cdiv(num_rows, rows_per_program))](
            *rows, bounds, logits.stride(0), num_rows, rows_per_program, num_blocks, **sizes, num_warps=2
        )
        _choose_kernel[(num_rows,)](
            *rows,
            bounds,
            out,
            last_ids,
            logits.stride(0),
            num_blocks,
            **sizes,
            BLOCKS=next_power_of_2(num_blocks),
            num_warps=8,
        )
        return out

    def thresholds(
        self, logits: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor
    ) -> Tensor:
        """See `Sample`."""
        assert logits.stride(1) == 1, "a row's logits must be adjacent"
        num_rows, vocab_size = logits.shape
        out = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
        _threshold_kernel[(num_rows,)](
            logits,
            temperatures,
            top_ks,
            top_ps,
            min_ps,
            out,
            logits.stride(0),
            VOCAB_SIZE=vocab_size,
            BLOCK=min(_SEARCH_BLOCK, next_power_of_2(vocab_size)),
            num_warps=16,
        )
        return out

    def penalize(
        self, logits: Tensor, slots: Tensor, counts: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor
    ) -> Tensor:
        """See `Sample`."""
        assert logits.stride(1) == 1, "a row's logits must be adjacent"
        num_rows, vocab_size = logits.shape
        out = torch.empty((num_rows, vocab_size), dtype=torch.float32, device=logits.device)
        _penalty_kernel[(num_rows, cdiv(vocab_size, _BLOCK))](
            logits,
            slots,
            counts,
            repetition,
            frequency,
            presence,
            out,
            logits.stride(0),
            VOCAB_SIZE=vocab_size,
            GENERATED=GENERATED,
            BLOCK=_BLOCK,
            num_warps=8,
        )
        return out


BACKEND = TritonSample()
