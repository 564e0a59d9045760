"""FlashInfer's kernels against the reference, as far as their modules are compiled ahead of time."""

import dataclasses

import pytest
import torch
from ops.paged import PAGE_SIZE, PagedCase, as_recorded, expected_output, make_case, make_shape, tolerance

from hornbeam.ops.attention.contract import AttentionBackend, AttentionShape
from hornbeam.ops.query import OpQuery

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("default"),  # what other packages warn of on import is their business
]

# Query heads, key-value heads, head size; window; soft cap
SHAPES = [
    (32, 8, 128, None, None),
    (9, 3, 64, None, None),
    (4, 4, 128, None, None),
    (16, 1, 64, None, None),
    (8, 4, 256, None, None),
    (4, 1, 256, 100, None),
    (32, 8, 128, 33, None),
    (8, 4, 128, 17, 5.0),
    (8, 4, 256, None, 5.0),
]


@pytest.fixture(params=SHAPES, ids=str)
def shape(request) -> AttentionShape:
    torch.manual_seed(0)
    *heads, window, soft_cap = request.param
    return make_shape(torch.device("cuda"), torch.bfloat16, *heads, window=window, soft_cap=soft_cap)


@pytest.fixture
def backend(shape) -> AttentionBackend:
    flashinfer = pytest.importorskip("hornbeam.ops.attention.flashinfer")
    query = OpQuery(
        device="cuda",
        dtype="bfloat16",
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        page_size=PAGE_SIZE,
        window=shape.window,
        soft_cap=shape.soft_cap,
    )
    if reason := flashinfer.BACKEND.supports(query):
        pytest.skip(reason)
    return flashinfer.BACKEND


def check(case: PagedCase, out: torch.Tensor) -> None:
    torch.testing.assert_close(out.double(), expected_output(case), **tolerance(case.q.dtype))


def run(case: PagedCase, attend) -> torch.Tensor:
    return attend(case.q, case.k_pages, case.v_pages)


def test_decode(backend, shape):
    attention = backend.create(shape, 8)
    for lens in ([1, 300, 17, 64], [500], [16, 16, 15, 1, 2, 3]):
        case = make_case(shape, lens, [1] * len(lens), num_padding=1)
        check(case, run(case, attention.plan_decode(case.rows)))


def test_prefill_after_a_cached_prefix(backend, shape):
    """Of long and of short chunks."""
    attention = backend.create(shape, 8)
    for lens, query_lens in (
        ([500, 1, 512], [110, 1, 250]),
        ([70, 150, 33], [70, 65, 2]),
        ([512], [512]),
        ([512], [3]),
    ):
        case = make_case(shape, lens, query_lens)
        check(case, run(case, attention.plan_prefill(case.rows)))


def test_a_captured_decode_follows_new_plans(backend, shape):
    """One graph, captured on padding alone; then real rows, longer ones, and padding again."""
    attention = backend.create(shape, 8)
    case = make_case(shape, [320, 33, 480, 64], [1] * 4, captured=True)
    tables, slots, lens = case.rows.page_tables.clone(), case.rows.slots.clone(), case.rows.lens.clone()
    case.rows.slots.fill_(len(tables) - 1)
    case.rows.lens.fill_(1)
    planned = attention.plan_decode(dataclasses.replace(case.rows, len_bounds=[1] * 4))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(case, planned)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        out = run(case, planned)
        graph.capture_end()

        for shorter in (0, 310):
            now = (lens - shorter).clamp(min=1)
            case.rows.slots.copy_(slots)
            case.rows.lens.copy_(now)
            bounds = now.tolist()
            assert attention.plan_decode(dataclasses.replace(case.rows, len_bounds=bounds)) is planned
            graph.replay()
            stream.synchronize()
            check(dataclasses.replace(case, rows=dataclasses.replace(case.rows, len_bounds=bounds)), out)
            eager = dataclasses.replace(case.rows, len_bounds=bounds, captured=False)
            assert torch.equal(out, run(case, attention.plan_decode(eager)))


@pytest.mark.parametrize("size", [224, 256])
def test_a_captured_prefill_follows_new_plans(backend, shape, size):
    """One graph of either kernel, captured on nothing at all; then rows with long and short prefixes, few queries and
    many."""
    attention = backend.create(shape, 8)
    empty = as_recorded(make_case(shape, [64, 480], [20, 65]), num_rows=6, before=40, after=size - 125)
    rows = dataclasses.replace(empty.rows, len_bounds=[0] * 6, query_lens=[0] * 5 + [size])
    q, (k_pages, v_pages) = empty.q.clone(), (torch.randn_like(empty.k_pages) for _ in "kv")
    tables = torch.zeros((16, rows.page_tables.shape[1]), dtype=torch.int32, device="cuda")
    rows = dataclasses.replace(rows, page_tables=tables)
    planned = attention.plan_prefill(rows)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        planned(q, k_pages, v_pages)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        out = planned(q, k_pages, v_pages)
        graph.capture_end()
        for lens, query_lens, before in (([480, 64], [65, 20], 40), ([500], [2], 0), ([31, 64, 5], [31, 60, 5], 99)):
            case = make_case(shape, lens, query_lens)
            now = as_recorded(case, num_rows=6, before=before, after=size - before - sum(query_lens))
            q.copy_(now.q)
            k_pages[: len(case.k_pages)], v_pages[: len(case.v_pages)] = case.k_pages, case.v_pages
            tables[: len(now.rows.page_tables)] = now.rows.page_tables
            rows.slots.copy_(now.rows.slots)
            rows.lens.copy_(now.rows.lens)
            bounds = {"len_bounds": now.rows.len_bounds, "query_lens": now.rows.query_lens}
            assert attention.plan_prefill(dataclasses.replace(rows, **bounds)) is planned
            graph.replay()
            stream.synchronize()
            check(case, out[before : before + len(case.q)])
            assert not out[:before].any()
            assert not out[before + len(case.q) :].any()


def test_empty_rows_of_a_graph_leave_what_is_there(backend, shape):
    case = make_case(shape, [320, 33], [1] * 2, num_padding=2, captured=True)
    case.rows.lens[2:] = 0
    out = torch.full(case.q.shape, 7.0, dtype=case.q.dtype, device="cuda")
    backend.create(shape, 8).plan_decode(case.rows)(case.q, case.k_pages, case.v_pages, out=out)
    torch.testing.assert_close(out[:2].double(), expected_output(case)[:2], **tolerance(case.q.dtype))
    assert (out[2:] == 7.0).all()


def test_two_lanes_do_not_disturb_each_other(backend, shape):
    lanes = [backend.create(shape, 8) for _ in range(2)]
    cases = [make_case(shape, lens, [1, 1]) for lens in ([100, 30], [31, 400])]
    attends = [lane.plan_decode(case.rows) for lane, case in zip(lanes, cases, strict=True)]
    for case, attend in zip(cases, attends, strict=True):
        check(case, run(case, attend))


def test_what_is_not_compiled_is_refused(backend, shape):
    query = OpQuery(device="cuda", dtype="float32", num_heads=4, num_kv_heads=4, head_dim=128, page_size=PAGE_SIZE)
    assert "float32" in backend.supports(query)
    assert "head size" in backend.supports(dataclasses.replace(query, dtype="bfloat16", head_dim=512))
    assert "sinks" in backend.supports(dataclasses.replace(query, dtype="bfloat16", sinks=True))
    assert "CUDA" in backend.supports(dataclasses.replace(query, device="cpu"))


def test_prompts_with_nothing_before_them(backend, shape):
    lens = [1, 230, 500]
    case = make_case(shape, lens, lens)
    rows = dataclasses.replace(case.rows, fresh=True)
    fresh = []
    for pages in (case.k_pages, case.v_pages):
        cells = [
            rows.page_tables[slot, position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
            for slot, length in zip(rows.slots.tolist(), lens, strict=True)
            for position in range(length)
        ]
        fresh.append(pages.flatten(0, 1)[torch.stack(cells).long()])
    out = backend.create(shape, 8).plan_prefill(rows)(case.q, case.k_pages, case.v_pages, None, tuple(fresh))
    check(case, out)
