"""Latent attention, absorbed and expanded, is attention over keys and values made of the rows."""

import dataclasses

import pytest
import torch
from ops.latent import LITE, TINY, absorbed, check, check_captured, close, expected_values, latent_case, latent_shape

import hornbeam.ops.mla.prefill as prefill
from hornbeam.core.family import LatentSizes
from hornbeam.core.registry import Registry
from hornbeam.ops.attention.contract import Attention, AttentionBackend, AttentionShape
from hornbeam.ops.linear.contract import InputNorm
from hornbeam.ops.mla.contract import LATENT_ATTENTION, LATENT_ROWS, LatentRows
from hornbeam.ops.qkv.contract import Rotation
from hornbeam.ops.query import OpQuery
from hornbeam.ops.rope.frequencies import rope_table

WIDE = LatentSizes(rank=320, rope_dim=16, nope_dim=24, value_dim=16)  # several programs for a head's features
SHAPES = [(4, TINY), (16, LITE), (128, LITE)]
LENS = [5, 64, 65, 100, 1]


def load(registry: Registry, name: str) -> AttentionBackend | LatentRows:
    if name != "reference":
        pytest.importorskip(name)
    return registry.load(name)


@pytest.fixture(params=["reference", "triton", "flashinfer"])
def name(request: pytest.FixtureRequest, device: torch.device) -> str:
    if request.param == "flashinfer" and device.type == "cpu":
        pytest.skip("needs a GPU")
    return request.param


def make(name: str, shape: AttentionShape, max_rows: int) -> Attention:
    """An instance of a backend; skips the test where it does not serve such a shape."""
    backend = load(LATENT_ATTENTION, name)
    query = OpQuery(
        device="cuda",  # where it is not, Triton is interpreted
        dtype=str(shape.dtype).removeprefix("torch."),
        num_heads=shape.num_heads,
        num_kv_heads=1,
        head_dim=shape.head_dim,
        page_size=shape.page_size,
        latent=shape.latent,
    )
    if reason := backend.supports(query):
        pytest.skip(reason)
    return backend.create(shape, max_rows)


@pytest.fixture(params=["reference", "triton"])
def latent_rows(request: pytest.FixtureRequest) -> LatentRows:
    return load(LATENT_ROWS, request.param)


def small_enough(device: torch.device, num_heads: int, sizes: object) -> None:
    if device.type == "cpu" and sizes is LITE:
        pytest.skip("too much for Triton's interpreter")


@pytest.mark.parametrize(("num_heads", "sizes", "page_size"), [(3, TINY, 16), *((*shape, 64) for shape in SHAPES)])
def test_decode(name, device, dtype, num_heads, sizes, page_size):
    small_enough(device, num_heads, sizes)
    shape = latent_shape(device, dtype, num_heads, sizes, page_size)
    case = latent_case(shape, LENS, [1] * 5, num_padding=2)
    check(case, make(name, shape, 8).plan_decode(case.rows))


def test_decode_of_one_long_row(name, device, dtype):
    shape = latent_shape(device, dtype, 16, TINY if device.type == "cpu" else LITE, 64)
    case = latent_case(shape, [1000], [1])
    check(case, make(name, shape, 8).plan_decode(case.rows))


def test_decode_with_several_queries_per_row(name, device, dtype):
    shape = latent_shape(device, dtype, 4, TINY if device.type == "cpu" else LITE)
    case = latent_case(shape, [5, 64, 33, 3], [3] * 4)
    check(case, make(name, shape, 8).plan_decode(case.rows))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.filterwarnings("default")  # what other packages warn of on import is their business
@pytest.mark.parametrize("backend", ["triton", "flashinfer"])
@pytest.mark.parametrize("num_heads", [16, 128])
def test_a_graph_follows_new_plans(backend, num_heads):
    """Captured on padding alone; then real rows, longer ones, and another number of rows planned in between."""
    shape = latent_shape(torch.device("cuda"), torch.bfloat16, num_heads, LITE, 64)
    attention = make(backend, shape, 8)
    case = latent_case(shape, [320, 33, 880, 64], [1] * 4, captured=True)
    slots, lens = case.rows.slots.clone(), case.rows.lens.clone()
    case.rows.slots.fill_(len(case.rows.page_tables) - 1)
    case.rows.lens.fill_(1)
    planned = attention.plan_decode(dataclasses.replace(case.rows, len_bounds=[1] * 4))
    q = absorbed(case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        planned.run(q, case.row, case.pages, case.up)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        out = planned.run(q, case.row, case.pages, case.up)
        graph.capture_end()
        for shorter in (310, 0):
            case.rows.slots.copy_(slots)
            case.rows.lens.copy_((lens - shorter).clamp(min=1))
            other = latent_case(shape, [500, 20], [1] * 2)
            attention.plan_decode(other.rows)
            rows = dataclasses.replace(case.rows, len_bounds=case.rows.lens.tolist())
            attention.plan_decode(rows)
            graph.replay()
            stream.synchronize()
            close(out, expected_values(dataclasses.replace(case, rows=rows)))


def test_a_captured_decode_follows_the_tensors(device):
    shape = latent_shape(device, torch.float32, 4, TINY)
    check_captured(latent_case(shape, [40, 90, 700], [1] * 3, captured=True), make("triton", shape, 8))


@pytest.mark.parametrize(
    "form", ["absorbed", "expanded", "in small chunks", "some absorbed", "half absorbed", "cheapest"]
)
@pytest.mark.parametrize(("num_heads", "sizes"), SHAPES)
def test_prefill_after_cached_prefixes(name, device, dtype, num_heads, sizes, form, monkeypatch):
    """Rows without a prefix stand between those with one."""
    small_enough(device, num_heads, sizes)
    if form != "cheapest":
        rows = {"absorbed": range(6), "some absorbed": (1, 3, 5), "half absorbed": (0, 1, 2)}.get(form, ())
        monkeypatch.setattr(prefill, "rows_to_absorb", lambda *_: list(rows))
    if form == "in small chunks":
        monkeypatch.setattr(prefill, "_CHUNK_BYTES", 50 * num_heads * shape_bytes(sizes, dtype))
    shape = latent_shape(device, dtype, num_heads, sizes, 64)
    case = latent_case(shape, [3, 150, 70, 12, 131, 66], [1, 9, 70, 12, 2, 65])
    planned = make(name, shape, 8).plan_prefill(case.rows)
    assert planned.absorbed or form != "absorbed"
    check(case, planned)


def shape_bytes(sizes, dtype):
    return (sizes.nope_dim + sizes.rope_dim + sizes.value_dim) * dtype.itemsize


@pytest.mark.cpu
def test_what_is_cheaper():
    def rows(sizes, *lens, most=None):
        return prefill.rows_to_absorb(sizes, 2, *lens, most)

    assert rows(LITE, [4096], [0]) == []
    assert rows(LITE, [2048], [2048]) == []
    assert rows(LITE, [64] * 100, [2048] * 100) == list(range(100))
    assert rows(LITE, [64] * 100, [2048] * 100, most=180) == [0, 1]
    assert rows(LITE, [2112, 64, 64], [0, 2048, 2048]) == [1, 2]
    assert rows(LITE, [10, 64, 64], [0, 2048, 2048]) == [0, 1, 2]
    assert rows(LITE, [8192], [100_000]) == []
    assert rows(LITE, [16], [100_000]) == [0]


@pytest.mark.cpu
def test_chunks_hold_every_token_of_every_prefix_once():
    chunks = prefill._chunks([0, 5, 0, 12, 3], 8)
    assert [[(p.row, p.start, p.length) for p in chunk] for chunk in chunks] == [
        [(1, 0, 5), (3, 0, 3)],
        [(3, 3, 8)],
        [(3, 11, 1), (4, 0, 3)],
    ]


@pytest.mark.parametrize(("num_heads", "sizes"), [*SHAPES, (2, WIDE)])
@pytest.mark.parametrize("num_tokens", [3, 37])
def test_neighbours_turn_together_and_latents_alone_are_normalised(
    latent_rows, device, dtype, num_heads, sizes, num_tokens
):
    small_enough(device, num_heads, sizes)
    if device.type == "cpu" and dtype != torch.float32:
        pytest.skip("in Triton's slow interpreter float32 says enough, and it cannot multiply bfloat16 matrices")
    rank, width = sizes.rank, sizes.rank + sizes.rope_dim
    positions = torch.randint(0, 16, (num_tokens,), device=device)
    rows = torch.randperm(64, device=device)[:num_tokens]
    wide = torch.randn(num_tokens, num_heads * (sizes.nope_dim + sizes.rope_dim) + width, device=device).to(dtype)
    q, row = wide.split((wide.shape[1] - width, width), 1)
    q = q.unflatten(1, (num_heads, -1))
    up = torch.randn(num_heads, sizes.nope_dim + sizes.value_dim, rank, device=device).to(dtype) * rank**-0.5
    norm = InputNorm(weight=torch.rand(rank, device=device).to(dtype), eps=1e-6)
    rotation = Rotation(table=rope_table(sizes.rope_dim, 100.0, None, 16).to(device), positions=positions)
    expected_q, expected_row = turned(q, rotation), turned(row, rotation)
    latent = row[:, :rank].double()
    latent = latent * norm.weight * (latent.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    expected_row[:, :rank] = latent
    absorbed = torch.einsum("thn,hnc->thc", expected_q[..., : sizes.nope_dim], up[:, : sizes.nope_dim].double())
    absorbed = torch.cat((absorbed, expected_q[..., sizes.nope_dim :]), -1)

    close = {"atol": 2e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    for way in ("absorb", "store"):
        pages = torch.zeros(1, 64, 1, width, device=device, dtype=dtype)
        if way == "absorb":
            mine = wide.clone().split((wide.shape[1] - width, width), 1)
            out = latent_rows.absorb(mine[0].unflatten(1, (num_heads, -1)), mine[1], norm, rotation, pages, rows, up)
            torch.testing.assert_close(out.double(), absorbed, **close)
        else:
            latent_rows.store(q, row, norm, rotation, pages, rows)
            torch.testing.assert_close(q.double(), expected_q, **close)
            torch.testing.assert_close(row.double(), expected_row, **close)
        torch.testing.assert_close(pages.flatten(0, 2)[rows].double(), expected_row, **close)
        assert pages.abs().sum(-1).count_nonzero() == num_tokens


def turned(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """In float64, with complex numbers: the last features of x [T, ..., D]."""
    cos, sin = rotation.table[rotation.positions].double().chunk(2, -1)
    by = torch.complex(cos, sin)
    result, width = x.double().clone(), rotation.table.shape[1]
    ends = torch.view_as_complex(result[..., -width:].unflatten(-1, (-1, 2)).contiguous())
    result[..., -width:] = torch.view_as_real(ends * (by[:, None] if x.dim() == 3 else by)).flatten(-2)
    return result


@pytest.mark.cpu
def test_what_triton_refuses():
    query = OpQuery(
        device="cuda", dtype="bfloat16", num_heads=4, num_kv_heads=1, head_dim=576, page_size=64, latent=LITE
    )
    for registry in (LATENT_ATTENTION, LATENT_ROWS):
        backend = load(registry, "triton")
        assert backend.supports(query) is None
        assert "CUDA" in backend.supports(dataclasses.replace(query, device="cpu"))
    odd = LatentSizes(rank=24, rope_dim=8, nope_dim=16, value_dim=16)
    assert "power of two" in load(LATENT_ATTENTION, "triton").supports(dataclasses.replace(query, latent=odd))
