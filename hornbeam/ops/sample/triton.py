"""Gumbel-max sampling in two kernels: the best token of each stretch of the vocabulary, then the best of those."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.device import needs_cuda
from hornbeam.ops.query import OpQuery

_BLOCK = 4096  # vocabulary entries per program: one row alone already fills many multiprocessors


@triton.jit
def _mix(h):
    """The contract's finalizer of 32-bit words."""
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _gumbel_noise(seed, position, tokens):
    """The contract's noise of `tokens`, float32."""
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    key = _mix(_mix(low) + high)
    key = _mix(key + position.to(tl.uint32) * 0x9E3779B9)
    bits = _mix(key ^ _mix(tokens.to(tl.uint32) + 1))
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    return -tl.log(-tl.log(uniform))


@triton.jit
def _first_best(scores, ids, vocab_size):
    """The largest score and the lowest id that has it; a valid id even if all scores are nan."""
    best = tl.max(scores, 0)
    return best, tl.minimum(tl.min(tl.where(scores == best, ids, vocab_size), 0), vocab_size - 1)


@triton.jit(do_not_specialize=["num_blocks"])
def _block_kernel(
    logits_ptr,
    temperatures_ptr,
    seeds_ptr,
    positions_ptr,
    best_scores_ptr,
    best_ids_ptr,
    logits_stride,
    num_blocks,
    VOCAB_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best of BLOCK tokens of one row."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < VOCAB_SIZE
    scores = tl.load(logits_ptr + row * logits_stride + tokens, mask=inside, other=-float("inf")).to(tl.float32)
    temperature = tl.load(temperatures_ptr + row)
    if temperature > 0:
        noise = _gumbel_noise(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), tokens)
        scores = scores / temperature + noise
    best, token = _first_best(scores, tokens, VOCAB_SIZE)
    tl.store(best_scores_ptr + row * num_blocks + block, best)
    tl.store(best_ids_ptr + row * num_blocks + block, token)


@triton.jit(do_not_specialize=["num_blocks"])
def _row_kernel(best_scores_ptr, best_ids_ptr, out_ptr, num_blocks, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The best of a row's stretches."""
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, BLOCK)
    inside = blocks < num_blocks
    scores = tl.load(best_scores_ptr + row * num_blocks + blocks, mask=inside, other=-float("inf"))
    ids = tl.load(best_ids_ptr + row * num_blocks + blocks, mask=inside, other=VOCAB_SIZE)
    _, token = _first_best(scores, ids, VOCAB_SIZE)
    tl.store(out_ptr + row, token.to(tl.int64))


class TritonSample:
    """See `Sample`."""

    def supports(self, query: OpQuery) -> str | None:
        """CUDA devices."""
        return needs_cuda(query)

    def sample(self, logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        """See `Sample`."""
        assert logits.stride(1) == 1, "a row's logits must be adjacent"
        num_rows, vocab_size = logits.shape
        num_blocks = triton.cdiv(vocab_size, _BLOCK)
        best_scores = torch.empty((num_rows, num_blocks), dtype=torch.float32, device=logits.device)
        best_ids = torch.empty((num_rows, num_blocks), dtype=torch.int32, device=logits.device)
        out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
        _block_kernel[(num_rows, num_blocks)](
            logits,
            temperatures,
            seeds,
            positions,
            best_scores,
            best_ids,
            logits.stride(0),
            num_blocks,
            VOCAB_SIZE=vocab_size,
            BLOCK=_BLOCK,
            num_warps=8,
        )
        _row_kernel[(num_rows,)](
            best_scores,
            best_ids,
            out,
            num_blocks,
            VOCAB_SIZE=vocab_size,
            BLOCK=triton.next_power_of_2(num_blocks),
            num_warps=1,
        )
        return out


BACKEND = TritonSample()
