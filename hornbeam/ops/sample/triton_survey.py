"""A first look at rows of logits, the one that reads them whole: the largest of each group, and what tokens weigh."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.launch import Kernel, cdiv, early_launch

LOWEST = tl.constexpr(-3.4028234663852886e38)  # the lowest number of float32 that is finite
GROUP = 64  # vocabulary entries of which the largest is kept
STRETCH = 4096  # vocabulary entries that are summed together
_PROGRAMS = 4096  # enough to fill a device: with more stretches, a program has several
_MAX_STRETCHES = 4  # of a program


@triton.jit
def wait(EARLY: tl.constexpr):
    """For what ran before; what runs next may begin."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def read_limits(slot_ptr, temperatures_ptr, top_ks_ptr, top_ps_ptr, min_ps_ptr, VOCAB_SIZE: tl.constexpr):
    """log2(e) over the temperature of a slot; its top-k, top-p and min-p: 0, 1 and 0 where they exclude nothing."""
    slot = tl.load(slot_ptr)
    temperature, top_k = tl.load(temperatures_ptr + slot), tl.load(top_ks_ptr + slot)
    top_p, min_p = tl.load(top_ps_ptr + slot), tl.load(min_ps_ptr + slot)
    random = temperature > 0
    top_k = tl.where(random & (top_k < VOCAB_SIZE), top_k, 0).to(tl.float32)
    rate = 1.4426950408889634 / tl.where(random, temperature, 1.0)
    return rate, top_k, tl.where(random, top_p, 1.0), tl.where(random, min_p, 0.0)


@triton.jit
def weigh(logits, top, rate):
    """What tokens weigh, where one with the logit `top` weighs 1; `rate` is log2(e) over the temperature."""
    return tl.exp2((logits - top) * rate)


@Kernel
@triton.jit(
    do_not_specialize=["per_program"],
    do_not_specialize_on_alignment=["slots_ptr", "temperatures_ptr", "top_ks_ptr", "top_ps_ptr", "min_ps_ptr"],
)
def _survey_kernel(
    logits_ptr,
    slots_ptr,
    temperatures_ptr,
    top_ks_ptr,
    top_ps_ptr,
    min_ps_ptr,
    maxima_ptr,
    stretches_ptr,
    logits_stride,
    per_program,
    VOCAB_SIZE: tl.constexpr,
    STRETCHES: tl.constexpr,
    STRETCH: tl.constexpr,
    GROUP: tl.constexpr,
    EVERY: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The largest logits of groups, and of some stretches; what a stretch weighs, where its likeliest token weighs 1.

    Of rows that exclude tokens, or of EVERY row, whose temperature then is 1.
    """
    wait(EARLY)
    row = tl.program_id(1).to(tl.int64)
    rate, weighed, wanted = 1.4426950408889634, True, True
    if not EVERY:
        rate, top_k, top_p, min_p = read_limits(
            slots_ptr + row, temperatures_ptr, top_ks_ptr, top_ps_ptr, min_ps_ptr, VOCAB_SIZE
        )
        weighed = top_p < 1
        wanted = (top_k > 0) | weighed | (min_p > 0)
    if wanted:
        first = tl.program_id(0) * per_program
        for stretch in range(first, tl.minimum(first + per_program, STRETCHES)):
            groups = tl.arange(0, STRETCH // GROUP)
            tokens = stretch * STRETCH + groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            pointers = logits_ptr + row * logits_stride + tokens
            logits = tl.load(pointers, mask=tokens < VOCAB_SIZE, other=-float("inf")).to(tl.float32)
            maxima = tl.max(logits, 1)
            largest = tl.max(maxima, 0)
            place = row * STRETCHES + stretch
            tl.store(maxima_ptr + place * (STRETCH // GROUP) + groups, maxima)
            tl.store(stretches_ptr + place * 2, largest)
            if weighed:
                finite = tl.maximum(largest, LOWEST)  # a stretch without any token weighs nothing
                tl.store(stretches_ptr + place * 2 + 1, tl.sum(weigh(logits, finite, rate)))


def survey(logits: Tensor, asked: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Of logits [R, V] in stretches, of rows that exclude tokens (`asked` says which), or else of all:

    [R, stretches, groups], the largest of GROUP tokens; [R, stretches, 2], the largest of all, and the mass relative to
    it, at the row's temperature or at 1.
    """
    assert logits.stride(1) == 1, "a row's logits must be adjacent"
    num_rows, vocab_size = logits.shape
    num_stretches = cdiv(vocab_size, STRETCH)
    maxima = torch.empty((num_rows, num_stretches, STRETCH // GROUP), dtype=torch.float32, device=logits.device)
    stretches = maxima.new_empty((num_rows, num_stretches, 2))
    per_program = stretches_per_program(num_rows, num_stretches)
    _survey_kernel[(cdiv(num_stretches, per_program), num_rows)](
        logits,
        *(asked or [stretches] * 5),
        maxima,
        stretches,
        logits.stride(0),
        per_program,
        VOCAB_SIZE=vocab_size,
        STRETCHES=num_stretches,
        STRETCH=STRETCH,
        GROUP=GROUP,
        EVERY=asked is None,
        num_warps=4,
        **early_launch(logits.device),
    )
    return maxima, stretches


def stretches_per_program(num_rows: int, num_stretches: int) -> int:
    """How many stretches of a row a program looks at, which makes no difference to what it finds."""
    return min(max(num_rows * num_stretches // _PROGRAMS, 1), _MAX_STRETCHES)
