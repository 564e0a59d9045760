"""Sampling without sorting: penalties in one pass, thresholds, then the best of logits and noise.

The best is found in two kernels: the first bounds the scores of each stretch of the vocabulary from above, with noise
that takes a few instructions; the second computes exact scores where the bounds are highest, mostly in one stretch of
each row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.device import needs_cuda
from hornbeam.ops.launch import Kernel, cdiv, next_power_of_2
from hornbeam.ops.query import OpQuery
from hornbeam.ops.sample.contract import GENERATED, Limits
from hornbeam.ops.sample.triton_logprobs import logprobs
from hornbeam.ops.sample.triton_survey import GROUP
from hornbeam.ops.sample.triton_thresholds import find_thresholds

_BLOCK = 1024  # vocabulary entries that are bounded, or weighed exactly, together
_MAX_ROWS = 8  # that a program bounds, which share what the noise owes to the token alone
_PROGRAMS = 4096  # enough to fill a device: with fewer stretches, a program bounds fewer rows


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
    maxima_ptr,
    bounds_ptr,
    logits_stride,
    maxima_stride,
    num_rows,
    rows_per_program,
    num_blocks,
    VOCAB_SIZE: tl.constexpr,
    FILTERED: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
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
        if FILTERED:  # most blocks have no token that is left
            groups = block * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
            largest = tl.max(tl.load(maxima_ptr + row * maxima_stride + groups), 0)
            excluded = largest < tl.load(thresholds_ptr + row)
        else:
            excluded = False
        bound = -float("inf")
        if not excluded:
            logits = _logits(logits_ptr + row * logits_stride, tokens, thresholds_ptr + row, VOCAB_SIZE, FILTERED)
            slot = tl.load(slots_ptr + row)
            temperature = tl.load(temperatures_ptr + slot)
            if temperature > 0:
                key = _half_mixed_key(tl.load(seeds_ptr + slot), tl.load(positions_ptr + row))
                bits = _noise_bits(key, half_mixed_tokens)
                # y is (~bits >> 9) + 0.5 units of 2^-23: below the exponent of 1, the bits are the float 1 + y - 2^-24.
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
        limits: Limits | None = None,
    ) -> Tensor:
        """See `Sample`."""
        assert logits.stride(1) == 1, "a row's logits must be adjacent"
        num_rows, vocab_size = logits.shape
        num_blocks = cdiv(vocab_size, _BLOCK)
        bounds = torch.empty((num_rows, num_blocks), dtype=torch.float32, device=logits.device)
        out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
        thresholds = maxima = temperatures  # which are not read, then
        if limits is not None:
            thresholds, maxima = find_thresholds(logits, slots, temperatures, limits)
        rows = logits, slots, positions, temperatures, seeds, thresholds
        sizes = {"VOCAB_SIZE": vocab_size, "FILTERED": limits is not None, "BLOCK": _BLOCK}
        rows_per_program = min(max(num_rows * num_blocks // _PROGRAMS, 1), _MAX_ROWS)
        _bound_kernel[(num_blocks, cdiv(num_rows, rows_per_program))](
            *rows,
            maxima,
            bounds,
            logits.stride(0),
            maxima.stride(0),
            num_rows,
            rows_per_program,
            num_blocks,
            **sizes,
            GROUP=GROUP,
            num_warps=2,
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

    def logprobs(self, logits: Tensor, ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `Sample`."""
        return logprobs(logits, ids, num_top)


BACKEND = TritonSample()
