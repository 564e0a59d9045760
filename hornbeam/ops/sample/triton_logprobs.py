"""Log-probabilities of rows of logits: one pass over all, then a program per row for the tokens asked for.

The likeliest tokens are taken one by one, each from the group whose largest logit is largest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hornbeam.ops.launch import Kernel, early_launch, next_power_of_2
from hornbeam.ops.sample.triton_survey import GROUP, survey, wait

_BLOCK = 32  # tokens whose log-probabilities are looked up together


@Kernel
@triton.jit(do_not_specialize=["num_groups", "num_ids", "num_top"], do_not_specialize_on_alignment=["ids_ptr"])
def _logprobs_kernel(
    logits_ptr,
    maxima_ptr,
    stretches_ptr,
    ids_ptr,
    out_ptr,
    top_ids_ptr,
    top_ptr,
    logits_stride,
    num_groups,
    num_ids,
    num_top,
    VOCAB_SIZE: tl.constexpr,
    STRETCHES: tl.constexpr,
    PARTS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One row. Tokens are in order by logit, then by id: what is taken is behind all that was taken before."""
    wait(EARLY)
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    parts = tl.arange(0, PARTS)
    places = stretches_ptr + (row * STRETCHES + parts) * 2
    highest = tl.load(places, mask=parts < STRETCHES, other=-float("inf"))
    masses = tl.load(places + 1, mask=parts < STRETCHES, other=0.0)
    largest = tl.max(highest, 0)
    norm = largest + tl.log(tl.sum(masses * tl.exp(highest - largest), 0))
    for start in range(0, num_ids, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + row * num_ids + columns, mask=columns < num_ids, other=0)
        logits = tl.load(row_ptr + ids).to(tl.float32)
        tl.store(out_ptr + row * num_ids + columns, logits - norm, mask=columns < num_ids)
    groups = tl.arange(0, GROUPS)
    maxima = tl.load(maxima_ptr + row * num_groups + groups, mask=groups < num_groups, other=-float("inf"))
    last, last_token = float("inf"), -1
    for place in range(num_top):
        logit = tl.max(maxima, 0)
        group = tl.min(tl.where(maxima == logit, groups, num_groups - 1), 0)
        tokens = group * GROUP + tl.arange(0, GROUP)
        logits = tl.load(row_ptr + tokens, mask=tokens < VOCAB_SIZE, other=-float("inf")).to(tl.float32)
        left = (logits < last) | ((logits == last) & (tokens > last_token))
        token = tl.min(tl.where(left & (logits == logit), tokens, VOCAB_SIZE - 1), 0)
        rest = tl.max(tl.where(left & (tokens != token), logits, -float("inf")), 0)
        maxima = tl.where(groups == group, rest, maxima)
        last, last_token = logit, token
        tl.store(top_ids_ptr + row * num_top + place, token)
        tl.store(top_ptr + row * num_top + place, logit - norm)


def logprobs(logits: Tensor, ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `Sample.logprobs`."""
    maxima, stretches = survey(logits)
    num_rows, num_stretches, _ = stretches.shape
    of_ids = maxima.new_empty(ids.shape)
    top = maxima.new_empty((num_rows, num_top))
    top_ids = torch.empty_like(top, dtype=torch.int64)
    num_groups = maxima[0].numel()
    _logprobs_kernel[(num_rows,)](
        logits,
        maxima,
        stretches,
        ids,
        of_ids,
        top_ids,
        top,
        logits.stride(0),
        num_groups,
        ids.shape[1],
        num_top,
        VOCAB_SIZE=logits.shape[1],
        STRETCHES=num_stretches,
        PARTS=next_power_of_2(num_stretches),
        GROUPS=next_power_of_2(num_groups),
        GROUP=GROUP,
        BLOCK=_BLOCK,
        num_warps=8,
        **early_launch(logits.device),
    )
    return of_ids, top_ids, top
