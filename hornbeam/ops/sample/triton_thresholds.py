"""Thresholds of rows of logits, by search and without sorting, each row by many programs.

Four kernels, the same for every row that excludes tokens (to others they do nothing), whatever else is in the batch:

1. survey: reads all logits, and keeps the largest of each group of tokens, and the mass of each stretch of the row.
2. bracket: one program per row finds an interval in which its threshold lies. Its low end is certain where the
   largest of the groups alone, which are tokens, are as many, or weigh as much, as the row keeps: so it is for a few
   likely tokens. Where thousands are kept, both ends are estimated from a sample, a few standard errors apart.
3. collect: copies the logits in the interval, from blocks that have any, and sums those above it.
4. settle: one program per row searches what was collected. Should the interval have missed, or hold too many, it
   searches the whole row: no result depends on the estimate.

What a row weighs is summed in the same order always, so that its threshold is the same in every batch.
"""

import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.launch import Kernel, cdiv, early_launch, next_power_of_2
from hornbeam.ops.sample.contract import Limits
from hornbeam.ops.sample.triton_survey import (
    GROUP,
    LOWEST,
    STRETCH,
    read_limits,
    stretches_per_program,
    survey,
    wait,
    weigh,
)

_BLOCK = 512  # of a stretch, that are collected at once
_SAMPLED = 16  # of so many entries one is in the sample
_ROOM = 1024  # logits that are collected from a stretch, at most
_ENOUGH = 512  # groups with tokens in the interval: with fewer, no estimate is needed
_PASSES = 4  # of the search for an interval: each narrows it to a fifth
_MAX_PASSES = 200  # of an exact search, which ends long before, whatever numbers are in the row
_WIDTH = 2048  # listed logits that a search looks at together


@triton.jit
def _sums(first, second, third, fourth):
    """Of four tensors [N], in one reduction."""
    sums = tl.sum(tl.join(tl.join(first, second), tl.join(third, fourth)), 0)
    front, back = tl.split(sums)
    first, second = tl.split(front)
    third, fourth = tl.split(back)
    return first, second, third, fourth


@triton.jit
def _weights_from(values, shares, low, step):
    """What values [N] weigh that are at least `low` and one, two, three, four steps."""
    return _sums(
        tl.where(values >= low + step, shares, 0.0),
        tl.where(values >= low + 2 * step, shares, 0.0),
        tl.where(values >= low + 3 * step, shares, 0.0),
        tl.where(values >= low + 4 * step, shares, 0.0),
    )


@triton.jit
def _raised(end, low, step, first, second, third, fourth):
    """The highest of `end` and the steps that may be taken."""
    end = tl.maximum(end, tl.where(first, low + step, end))
    end = tl.maximum(end, tl.where(second, low + 2 * step, end))
    end = tl.maximum(end, tl.where(third, low + 3 * step, end))
    return tl.maximum(end, tl.where(fourth, low + 4 * step, end))


@triton.jit
def _lowered(end, low, step, first, second, third, fourth):
    """The lowest of `end` and the steps that may be taken."""
    end = tl.minimum(end, tl.where(fourth, low + 4 * step, end))
    end = tl.minimum(end, tl.where(third, low + 3 * step, end))
    end = tl.minimum(end, tl.where(second, low + 2 * step, end))
    return tl.minimum(end, tl.where(first, low + step, end))


@triton.jit
def _sample_tells(weight, pivot, below, top, rate, by_mass, SAMPLED: tl.constexpr):
    """Whether all values below a pivot surely weigh no more than `below`, and whether no less.

    The sample has one token in SAMPLED; `weight` is of those in it. What it says of the mass below a value has a
    variance of at most SAMPLED * (the share of that value) * (that mass).
    """
    share = SAMPLED * tl.where(by_mass, weigh(pivot, top, rate), 1.0)
    error = 4.5 * tl.sqrt(share * below) + 8 * share
    excess = weight * SAMPLED - below
    return excess + error <= 0, excess >= error


@Kernel
@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "temperatures_ptr", "top_ks_ptr", "top_ps_ptr", "min_ps_ptr"])
def _bracket_kernel(
    logits_ptr,
    slots_ptr,
    temperatures_ptr,
    top_ks_ptr,
    top_ps_ptr,
    min_ps_ptr,
    maxima_ptr,
    stretches_ptr,
    brackets_ptr,
    logits_stride,
    VOCAB_SIZE: tl.constexpr,
    STRETCHES: tl.constexpr,
    STRETCH: tl.constexpr,
    GROUP: tl.constexpr,
    SAMPLED: tl.constexpr,
    ENOUGH: tl.constexpr,
    PASSES: tl.constexpr,
    PARTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The largest logit of a row, its mass, and the interval in which its threshold is looked for first.

    Of rows with a top-k that interval is its threshold's. An interval that begins at infinity is not looked at.
    """
    wait(EARLY)
    row = tl.program_id(0).to(tl.int64)
    rate, top_k, top_p, min_p = read_limits(
        slots_ptr + row, temperatures_ptr, top_ks_ptr, top_ps_ptr, min_ps_ptr, VOCAB_SIZE
    )
    top, mass, low, high = 0.0, 0.0, float("inf"), float("inf")
    parts = tl.arange(0, PARTS)
    if (top_k > 0) | (top_p < 1) | (min_p > 0):
        places = stretches_ptr + (row * STRETCHES + parts) * 2
        largest = tl.load(places, mask=parts < STRETCHES, other=-float("inf"))
        masses = tl.load(places + 1, mask=parts < STRETCHES, other=0.0)  # of use for top-p
        top = tl.max(largest, 0)
        mass = tl.sum(masses * weigh(largest, top, rate), 0)
    if (top_k > 0) | (top_p < 1):
        by_mass = top_k == 0
        target = tl.where(by_mass, top_p * mass, top_k)
        groups = tl.arange(0, PARTS * (STRETCH // GROUP))
        inside = groups < (VOCAB_SIZE + GROUP - 1) // GROUP
        pointers = maxima_ptr + row * STRETCHES * (STRETCH // GROUP) + groups
        maxima = tl.load(pointers, mask=inside, other=-float("inf"))
        shares = tl.where(by_mass, weigh(maxima, top, rate), tl.where(inside, 1.0, 0.0))
        lowest = tl.min(tl.where(maxima > -float("inf"), maxima, float("inf")), 0)
        lowest = tl.where(by_mass, tl.maximum(lowest, top - 60 / rate), lowest)  # what is lower weighs nothing
        low, end = LOWEST, top
        for _ in range(PASSES):
            begin = tl.maximum(low, lowest)
            step = (end - begin) * 0.2
            a, b, c, d = _weights_from(maxima, shares, begin, step)
            low = _raised(low, begin, step, a >= target, b >= target, c >= target, d >= target)
            end = _lowered(end, begin, step, a < target, b < target, c < target, d < target)
        if tl.sum((maxima >= low).to(tl.int32), 0) > ENOUGH:
            tokens = tl.arange(0, STRETCH // SAMPLED)
            drawn = tokens[None, :] * SAMPLED < VOCAB_SIZE - parts[:, None] * STRETCH
            sample_ptr = logits_ptr + row * logits_stride + parts[:, None] * STRETCH + tokens[None, :]
            values = tl.load(sample_ptr, mask=drawn, other=-float("inf")).to(tl.float32)
            weights = tl.where(by_mass, weigh(values, top, rate), tl.where(drawn, 1.0, 0.0))
            values = tl.reshape(values, (PARTS * (STRETCH // SAMPLED),))
            weights = tl.reshape(weights, (PARTS * (STRETCH // SAMPLED),))
            lowest = tl.min(tl.where(values > -float("inf"), values, float("inf")), 0)
            lowest = tl.where(by_mass, tl.maximum(lowest, top - 60 / rate), lowest)
            below = tl.where(by_mass, mass, VOCAB_SIZE) - target
            for _ in range(PASSES):
                begin = tl.maximum(low, lowest)
                step = (tl.minimum(high, top) - begin) * 0.2
                # Summed from below: beside the weight of likely tokens that of unlikely ones is lost by rounding.
                d, c, b, a = _weights_from(-values, weights, -begin - 5 * step, step)
                a, not_a = _sample_tells(a, begin + step, below, top, rate, by_mass, SAMPLED)
                b, not_b = _sample_tells(b, begin + 2 * step, below, top, rate, by_mass, SAMPLED)
                c, not_c = _sample_tells(c, begin + 3 * step, below, top, rate, by_mass, SAMPLED)
                d, not_d = _sample_tells(d, begin + 4 * step, below, top, rate, by_mass, SAMPLED)
                low = _raised(low, begin, step, a, b, c, d)
                high = _lowered(high, begin, step, not_a, not_b, not_c, not_d)
    brackets_ptr += row * 5
    tl.store(brackets_ptr, top)
    tl.store(brackets_ptr + 1, mass)
    tl.store(brackets_ptr + 2, low)
    tl.store(brackets_ptr + 3, high)
    tl.store(brackets_ptr + 4, rate)


@Kernel
@triton.jit(do_not_specialize=["per_program"])
def _collect_kernel(
    logits_ptr,
    maxima_ptr,
    brackets_ptr,
    collected_ptr,
    sums_ptr,
    logits_stride,
    per_program,
    VOCAB_SIZE: tl.constexpr,
    STRETCHES: tl.constexpr,
    STRETCH: tl.constexpr,
    GROUP: tl.constexpr,
    ROOM: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Logits in the interval, as far as a stretch has room; how many; how many are above, and what mass."""
    wait(EARLY)
    row = tl.program_id(1).to(tl.int64)
    brackets_ptr += row * 5
    top, rate = tl.load(brackets_ptr), tl.load(brackets_ptr + 4)
    low, high = tl.load(brackets_ptr + 2), tl.load(brackets_ptr + 3)
    if low < float("inf"):
        first = tl.program_id(0) * per_program
        for stretch in range(first, tl.minimum(first + per_program, STRETCHES)):
            place = row * STRETCHES + stretch
            num_collected = tl.full((), 0, tl.int32)
            num_above = tl.zeros((BLOCK // RUN,), tl.float32)
            mass_above = num_above
            blocks = tl.arange(0, STRETCH // BLOCK)
            groups = blocks[:, None] * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)[None, :]
            maxima = tl.max(tl.load(maxima_ptr + place * (STRETCH // GROUP) + groups), 1)
            left = tl.where(maxima >= low, blocks, STRETCH)
            block = tl.min(left, 0)
            while block < STRETCH // BLOCK:
                # A run is what a thread loads at once: within it, places are counted without the other threads.
                runs = tl.arange(0, BLOCK // RUN)[:, None] * RUN + tl.arange(0, RUN)[None, :]
                tokens = stretch * STRETCH + block * BLOCK + runs
                pointers = logits_ptr + row * logits_stride + tokens
                logits = tl.load(pointers, mask=tokens < VOCAB_SIZE, other=-float("inf"))
                values = logits.to(tl.float32)
                within = ((values >= low) & (values < high)).to(tl.int32)
                counts = tl.sum(within, 1)
                places = tl.cumsum(within, 1) + (num_collected + tl.cumsum(counts, 0) - counts - 1)[:, None]
                tl.store(collected_ptr + place * ROOM + places, logits, mask=(within > 0) & (places < ROOM))
                num_collected += tl.sum(counts, 0)
                if high < float("inf"):
                    above = values >= high
                    num_above += tl.sum(above.to(tl.float32), 1)
                    mass_above += tl.sum(tl.where(above, weigh(values, top, rate), 0.0), 1)
                left = tl.where(blocks == block, STRETCH, left)
                block = tl.min(left, 0)
            tl.store(sums_ptr + place * 3, num_collected.to(tl.float32))
            tl.store(sums_ptr + place * 3 + 1, tl.sum(num_above, 0))
            tl.store(sums_ptr + place * 3 + 2, tl.sum(mass_above, 0))


@triton.jit
def _list_weights(
    values_ptr,
    stride,
    counts,
    longest,
    low,
    high,
    step,
    top,
    rate,
    by_mass,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """What listed values weigh that are at least `low` and one to four steps; lowest and highest in [low, high).

    The list has PARTS, `stride` apart, of `counts` values. A value weighs 1, or by mass its share.
    """
    lanes = tl.arange(0, PARTS * WIDTH)
    first = tl.zeros((PARTS * WIDTH,), tl.float32)
    second, third, fourth = first, first, first
    lowest = tl.full((PARTS * WIDTH,), float("inf"), tl.float32)
    highest = tl.full((PARTS * WIDTH,), -float("inf"), tl.float32)
    values_ptr += lanes // WIDTH * stride + lanes % WIDTH
    for start in range(0, longest, WIDTH):
        inside = start + lanes % WIDTH < counts
        values = tl.load(values_ptr + start, mask=inside, other=-float("inf")).to(tl.float32)
        shares = tl.where(by_mass, weigh(values, top, rate), 1.0)
        first += tl.where(values >= low + step, shares, 0.0)
        second += tl.where(values >= low + 2 * step, shares, 0.0)
        third += tl.where(values >= low + 3 * step, shares, 0.0)
        fourth += tl.where(values >= low + 4 * step, shares, 0.0)
        lowest = tl.minimum(lowest, tl.where(values >= low, values, float("inf")))
        highest = tl.maximum(highest, tl.where(values < high, values, -float("inf")))
    first, second, third, fourth = _sums(first, second, third, fourth)
    lowest, highest = tl.split(tl.min(tl.join(lowest, -highest), 0))
    return first, second, third, fourth, lowest, -highest


@Kernel
@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "temperatures_ptr", "top_ks_ptr", "top_ps_ptr", "min_ps_ptr"])
def _settle_kernel(
    logits_ptr,
    slots_ptr,
    temperatures_ptr,
    top_ks_ptr,
    top_ps_ptr,
    min_ps_ptr,
    brackets_ptr,
    collected_ptr,
    sums_ptr,
    out_ptr,
    logits_stride,
    VOCAB_SIZE: tl.constexpr,
    STRETCHES: tl.constexpr,
    STRETCH: tl.constexpr,
    ROOM: tl.constexpr,
    MAX_PASSES: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The threshold of a row: top-k's by count, then top-p's by mass among what that keeps, and min-p's."""
    wait(EARLY)
    row = tl.program_id(0).to(tl.int64)
    rate, top_k, top_p, min_p = read_limits(
        slots_ptr + row, temperatures_ptr, top_ks_ptr, top_ps_ptr, min_ps_ptr, VOCAB_SIZE
    )
    top, mass = tl.load(brackets_ptr + row * 5), tl.load(brackets_ptr + row * 5 + 1)
    threshold = -float("inf")
    if (top_k > 0) | (top_p < 1):
        parts = tl.arange(0, PARTS * WIDTH) // WIDTH
        once = (parts < STRETCHES) & (tl.arange(0, PARTS * WIDTH) % WIDTH == 0)
        places = sums_ptr + (row * STRETCHES + parts) * 3
        counts = tl.load(places, mask=parts < STRETCHES, other=0.0).to(tl.int32)
        num_above = tl.sum(tl.load(places + 1, mask=once, other=0.0), 0)
        mass_above = tl.sum(tl.load(places + 2, mask=once, other=0.0), 0)
        longest = tl.max(counts, 0)
        missed = longest > ROOM
        values_ptr, stride = collected_ptr + row * STRETCHES * ROOM, ROOM + 0 * longest
        threshold = LOWEST
        for stage in range(2):
            by_mass = stage == 1
            if tl.where(by_mass, top_p < 1, top_k > 0):
                target, lowest, highest, settled = 0.0, 0.0, 0.0, False
                while not settled:
                    if missed:
                        values_ptr, stride = logits_ptr + row * logits_stride, STRETCH + 0 * longest
                        counts = tl.maximum(tl.minimum(VOCAB_SIZE - parts * STRETCH, STRETCH), 0)
                        longest, num_above, mass_above = STRETCH + 0 * longest, 0.0, 0.0
                    kept, _, _, _, lowest, highest = _list_weights(
                        values_ptr,
                        stride,
                        counts,
                        longest,
                        threshold,
                        float("inf"),
                        0.0,
                        top,
                        rate,
                        by_mass,
                        PARTS,
                        WIDTH,
                    )
                    above = tl.where(by_mass, mass_above, num_above)
                    mass = tl.where(by_mass & (top_k > 0), above + kept, mass)
                    target = tl.where(by_mass, top_p * mass, top_k) - above
                    settled = missed | ((target > 0) & (target <= kept))
                    missed = missed | (not settled)  # for good: what is not a number is never settled
                threshold, high, end, num_passes = lowest, float("inf"), highest, 0
                while (lowest < highest) & (num_passes < MAX_PASSES):
                    low, step = threshold, (end - threshold) * 0.2
                    a, b, c, d, lowest, highest = _list_weights(
                        values_ptr, stride, counts, longest, low, high, step, top, rate, by_mass, PARTS, WIDTH
                    )
                    threshold = tl.maximum(threshold, lowest)
                    if lowest < highest:
                        threshold = _raised(threshold, low, step, a >= target, b >= target, c >= target, d >= target)
                        high = _lowered(high, low, step, a < target, b < target, c < target, d < target)
                        end = tl.minimum(highest, high)
                    num_passes += 1
    if min_p > 0:
        threshold = tl.maximum(threshold, top + tl.log2(min_p) / rate)
    tl.store(out_ptr + row, threshold)


def find_thresholds(logits: Tensor, slots: Tensor, temperatures: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    """What `limits` of `slots` [R] int64 exclude of logits [R, V]; temperatures: [S] float32.

    Returns: [R] float32, logits below it are excluded (-inf if none are); [R, G] float32, of rows that exclude any,
        the largest logits of GROUP tokens each.
    """
    num_rows, vocab_size = logits.shape
    asked = slots, temperatures, limits.top_ks, limits.top_ps, limits.min_ps
    maxima, stretches = survey(logits, asked)
    num_stretches, stride = stretches.shape[1], logits.stride(0)
    out, brackets = maxima.new_empty(num_rows), maxima.new_empty((num_rows, 5))
    collected = logits.new_empty((num_rows, num_stretches, _ROOM))
    sums = maxima.new_empty((num_rows, num_stretches, 3))
    parts = next_power_of_2(num_stretches)
    per_program = stretches_per_program(num_rows, num_stretches)
    common = {"VOCAB_SIZE": vocab_size, "STRETCHES": num_stretches, "STRETCH": STRETCH, **early_launch(logits.device)}
    _bracket_kernel[(num_rows,)](
        *(logits, *asked, maxima, stretches, brackets, stride),
        **common,
        GROUP=GROUP,
        SAMPLED=_SAMPLED,
        ENOUGH=_ENOUGH,
        PASSES=_PASSES,
        PARTS=parts,
        num_warps=16,
    )
    _collect_kernel[(cdiv(num_stretches, per_program), num_rows)](
        *(logits, maxima, brackets, collected, sums, stride, per_program),
        **common,
        GROUP=GROUP,
        ROOM=_ROOM,
        BLOCK=_BLOCK,
        RUN=16 // logits.element_size(),
        num_warps=1,
    )
    _settle_kernel[(num_rows,)](
        *(logits, *asked, brackets, collected, sums, out, stride),
        **common,
        ROOM=_ROOM,
        MAX_PASSES=_MAX_PASSES,
        PARTS=parts,
        WIDTH=max(_WIDTH // parts, 1),
        num_warps=8,
    )
    return out, maxima.flatten(1)
