import dataclasses
import random

import pytest
import torch

pytest.importorskip("triton")

from hornbeam.ops.layout.contract import PlannedTokens, SlotTables, StepTokens
from hornbeam.ops.layout.reference import ReferenceLayout

NUM_SLOTS, MAX_PAGES, PAGE_SIZE = 50, 8, 16


def make_tables(device, num_groups):
    lens = torch.randint(0, MAX_PAGES * PAGE_SIZE - 1, (NUM_SLOTS + 1,), device=device)
    lens[-1] = 0
    return SlotTables(
        lens=lens,
        last_ids=torch.randint(0, 999, (NUM_SLOTS + 1,), device=device),
        page_tables=torch.randint(0, 99, (num_groups, NUM_SLOTS + 1, MAX_PAGES), device=device, dtype=torch.int32),
        page_size=PAGE_SIZE,
    )


def make_out(device, num_groups, num_tokens, num_rows):
    """Part of larger buffers that hold what an earlier step left."""
    junk = torch.full((num_groups, num_tokens + 3), 7, device=device)
    rows = torch.full((num_rows,), 7, device=device)
    return StepTokens(
        slots=junk[0].clone(),
        ids=junk[0].clone(),
        positions=junk[0].clone(),
        cache_rows=junk.clone(),
        decode_slots=rows.clone(),
        decode_lens=rows.int(),
    ).first(num_tokens, num_rows)


def plan(device, tables, num_decode, chunk_sizes, num_granted):
    chance = random.Random(0)
    slots = chance.sample(range(NUM_SLOTS), num_decode + len(chunk_sizes))
    chunks = [
        (slot, chance.randrange(MAX_PAGES * PAGE_SIZE - n), n)
        for slot, n in zip(slots[num_decode:], chunk_sizes, strict=True)
    ]
    for slot, start, _ in chunks:
        tables.lens[slot] = start
    token_slots = slots[:num_decode] + [slot for slot, _, n in chunks for _ in range(n)]
    # As parts of an upload are, these are cut out of a larger tensor, at any offset.
    parts = (
        token_slots,
        [chance.randrange(999) for _, _, n in chunks for _ in range(n)],
        [start + i for _, start, n in chunks for i in range(n)],
        chance.sample(range(tables.page_tables.numel()), num_granted),
        [chance.randrange(99) for _ in range(num_granted)],
    )
    upload = torch.tensor([0, *(number for part in parts for number in part)], device=device)[1:]
    names = ("slots", "ids", "positions", "entries", "pages")
    split = dict(zip(names, upload.split([len(part) for part in parts]), strict=True))
    return PlannedTokens(num_decode=num_decode, **split)


@pytest.mark.parametrize(
    ("num_decode", "chunk_sizes", "num_granted", "num_tokens", "num_rows"),
    [
        (0, [], 0, 5, 3),  # padding alone
        (1, [], 0, 1, 1),
        (33, [], 9, 40, 40),  # padded
        (0, [100, 5, 1], 0, 106, 0),
        (7, [40, 30, 1], 70, 78, 7),
        (7, [40, 30, 1], 1100, 96, 50),  # padded, with room for more rows; more grants than a block holds
        (16, [100] * 11, 3, 1116, 16),  # more tokens than a block holds
    ],
)
@pytest.mark.parametrize("num_groups", [1, 2])
def test_layout_equals_the_references(device, num_groups, num_decode, chunk_sizes, num_granted, num_tokens, num_rows):
    from hornbeam.ops.layout.triton import BACKEND

    tables = make_tables(device, num_groups)
    planned = plan(device, tables, num_decode, chunk_sizes, min(num_granted, tables.page_tables.numel()))
    results = []
    for backend in (BACKEND, ReferenceLayout()):
        own = SlotTables(
            **{name: getattr(tables, name).clone() for name in ("lens", "last_ids", "page_tables")}, page_size=PAGE_SIZE
        )
        out = make_out(device, num_groups, num_tokens, num_rows)
        backend.lay_out(planned, own, out)
        results.append([getattr(value, field.name) for value in (own, out) for field in dataclasses.fields(value)])
    for actual, expected in zip(*results, strict=True):
        assert actual.tolist() == expected.tolist() if isinstance(actual, torch.Tensor) else actual == expected


def test_padding_keeps_its_length_and_others_grow(device):
    from hornbeam.ops.layout.triton import BACKEND

    for backend in (BACKEND, ReferenceLayout()):
        tables = make_tables(device, 1)
        before = tables.lens.tolist()
        slots = torch.tensor([3, NUM_SLOTS, 8, 8], device=device)
        prompt = torch.tensor([before[8], before[8] + 1], device=device)
        planned = PlannedTokens(
            num_decode=2, slots=slots, ids=prompt, positions=prompt, entries=prompt[:0], pages=prompt[:0]
        )
        out = make_out(device, 1, 4, 2)
        backend.lay_out(planned, tables, out)
        grown = {3: before[3] + 1, 8: before[8] + 2}
        assert tables.lens.tolist() == [grown.get(slot, length) for slot, length in enumerate(before)]
        assert out.decode_lens.tolist() == [before[3] + 1, 1]
        assert out.positions.tolist() == [before[3], 0, before[8], before[8] + 1]
