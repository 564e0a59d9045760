"""The CPU's own backends, through torch and of our own kernels, against the references."""

import dataclasses

import pytest
import torch
from ops.paged import expected_output, make_case, make_shape, tolerance
from ops.test_cascade import GROUPS, share

from hornbeam.core.plan import SharedPrefix
from hornbeam.ops.activation.cpu import CpuActivation
from hornbeam.ops.activation.reference import ReferenceActivation
from hornbeam.ops.attention.contract import AttentionBackend
from hornbeam.ops.attention.cpu import BACKEND as CPU_ATTENTION
from hornbeam.ops.attention.native import BACKEND as NATIVE_ATTENTION
from hornbeam.ops.linear.contract import InputNorm
from hornbeam.ops.linear.native import BACKEND as NATIVE_LINEAR
from hornbeam.ops.linear.reference import ReferenceLinear
from hornbeam.ops.native.loader import needs_library
from hornbeam.ops.norm.cpu import CpuNorm
from hornbeam.ops.norm.reference import ReferenceNorm
from hornbeam.ops.qkv.contract import HeadNorms, Qkv, Rotation
from hornbeam.ops.qkv.cpu import CpuQkv
from hornbeam.ops.qkv.native import NativeQkv
from hornbeam.ops.qkv.reference import ReferenceQkv
from hornbeam.ops.query import OpQuery
from hornbeam.ops.sample.contract import Limits
from hornbeam.ops.sample.cpu import CpuSample, lowest_argmax
from hornbeam.ops.sample.reference import ReferenceSample

pytestmark = pytest.mark.cpu
CPU = torch.device("cpu")
TOLERANCE = tolerance(torch.float32)
QUERY = OpQuery(device="cpu", dtype="float32", num_heads=6, num_kv_heads=2, head_dim=16, page_size=16)
LACKING = needs_library(QUERY)
NEEDS_NATIVE = pytest.mark.skipif(LACKING is not None, reason=str(LACKING))
every_attention = pytest.mark.parametrize(
    "backend", [CPU_ATTENTION, pytest.param(NATIVE_ATTENTION, marks=NEEDS_NATIVE)], ids=["torch", "native"]
)


@pytest.fixture(autouse=True)
def same_draws() -> None:
    torch.manual_seed(0)


@every_attention
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 20, 200])
@pytest.mark.parametrize(
    ("lens", "query_lens"),
    [
        ([40], [1]),
        ([1, 50, 17, 330, 45], [1] * 5),
        ([60, 60, 60], [60] * 3),
        ([100], [100]),
        ([100, 30, 17, 31, 90, 300], [100, 30, 17, 20, 1, 70]),
    ],
)
def test_attention(
    lens: list[int], query_lens: list[int], window: int | None, has_sinks: bool, backend: AttentionBackend
) -> None:
    case = make_case(make_shape(CPU, torch.float32, 6, 2, 16, window=window), lens, query_lens)
    attention = backend.create(case.shape, len(lens))
    plan = attention.plan_decode if set(query_lens) == {1} else attention.plan_prefill
    sinks = torch.randn(6) if has_sinks else None
    actual = plan(case.rows)(case.q, case.k_pages, case.v_pages, sinks)
    torch.testing.assert_close(actual, expected_output(case, sinks).float(), **TOLERANCE)


@every_attention
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("groups", GROUPS)
def test_shared_prefixes_are_read_once(groups: list, has_sinks: bool, backend: AttentionBackend) -> None:
    case = share(make_case(make_shape(CPU, torch.float32, 6, 2, 16), [330, 400, 321, 339, 500, 350], [1] * 6), groups)
    sinks = torch.randn(6) if has_sinks else None
    expected = expected_output(dataclasses.replace(case, rows=dataclasses.replace(case.rows, shared=None)), sinks)
    actual = backend.create(case.shape, 6).plan_decode(case.rows)(case.q, case.k_pages, case.v_pages, sinks)
    torch.testing.assert_close(actual, expected.float(), **TOLERANCE)


@NEEDS_NATIVE
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(1, 1, 256), (9, 3, 64), (32, 1, 80)])
def test_a_query_does_not_depend_on_its_batch(heads: int, kv_heads: int, size: int) -> None:
    """Alone, beside others with the same prefix, or within a prompt: the same numbers."""
    shape = make_shape(CPU, torch.float32, heads, kv_heads, size)
    case = make_case(shape, [70, 90, 61, 77], [1] * 4)
    case = share(case, [SharedPrefix(rows=(0, 1, 2, 3), num_tokens=48)])
    attention = NATIVE_ATTENTION.create(shape, 4)
    pages = case.k_pages, case.v_pages
    together = attention.plan_decode(case.rows)(case.q, *pages)
    torch.testing.assert_close(together, expected_output(case, None).float(), **TOLERANCE)
    apart = attention.plan_decode(dataclasses.replace(case.rows, shared=None))(case.q, *pages)
    assert together.equal(apart)
    prompt = dataclasses.replace(
        case.rows, slots=case.rows.slots[:1], lens=case.rows.lens[:1], query_lens=(40,), len_bounds=(70,), shared=None
    )
    q = torch.cat((torch.randn(39, heads, size), case.q[:1]))
    assert attention.plan_prefill(prompt)(q, *pages)[39].equal(together[0])


@NEEDS_NATIVE
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("page_size", [1, 4, 8])
def test_pages_of_any_size(page_size: int, window: int | None) -> None:
    case = make_case(make_shape(CPU, torch.float32, 6, 2, 16, window=window), [40, 90], [1, 30])
    parts = case.shape.page_size // page_size
    tables = (case.rows.page_tables.unsqueeze(-1) * parts + torch.arange(parts)).flatten(1).int()
    shape = dataclasses.replace(case.shape, page_size=page_size, max_pages=tables.shape[1])
    rows = dataclasses.replace(case.rows, page_tables=tables)
    pages = (x.view(-1, page_size, *x.shape[2:]) for x in (case.k_pages, case.v_pages))
    actual = NATIVE_ATTENTION.create(shape, 2).plan_prefill(rows)(case.q, *pages)
    torch.testing.assert_close(actual, expected_output(case, None).float(), **TOLERANCE)


@NEEDS_NATIVE
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 5, 8, 13, 70])
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 96), (576, 130), (33, 7)])
def test_linear(num_in: int, num_out: int, num_rows: int) -> None:
    x, weight = torch.randn(num_rows, num_in + 3)[:, :num_in], torch.randn(num_out, num_in)
    for bias in (None, torch.randn(num_out)):
        expected = ReferenceLinear().linear(x, weight, bias)
        torch.testing.assert_close(NATIVE_LINEAR.linear(x, weight, bias), expected, rtol=1e-5, atol=1e-4)


@NEEDS_NATIVE
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 96), (70, 130)])
def test_fused_linear(num_in: int, num_out: int, has_norm: bool, has_residual: bool, gated: bool) -> None:
    x, residual = torch.randn(11, num_in), torch.randn(11, num_in) if has_residual else None
    weight, bias, norm = (
        torch.randn(num_out, num_in),
        torch.randn(num_out),
        InputNorm(weight=torch.rand(num_in), eps=1e-5) if has_norm else None,
    )
    for actual, expected in zip(
        *(
            backend.normed(x, residual, norm, weight, bias, gated=gated)
            for backend in (NATIVE_LINEAR, ReferenceLinear())
        ),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", [CpuQkv(), pytest.param(NativeQkv(), marks=NEEDS_NATIVE)], ids=["torch", "native"])
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("num_rotated", [0, 8, 16])
def test_qkv(num_rotated: int, has_norms: bool, backend: Qkv) -> None:
    wide = torch.randn(5, 10, 16)
    norms = HeadNorms(query=torch.randn(16), key=torch.randn(16), eps=1e-6) if has_norms else None
    rotation = Rotation(table=torch.randn(9, num_rotated), positions=torch.tensor([3, 8, 0, 3, 1]))
    results = []
    for tried in (backend, ReferenceQkv()):
        heads, k_pages, v_pages = wide.clone(), torch.zeros(4, 4, 2, 16), torch.zeros(4, 4, 2, 16)
        q, k, v = heads.split((6, 2, 2), 1)
        rows = torch.tensor([5, 0, 15, 7, 8])
        tried.store(q, k, v, norms, rotation if num_rotated else None, k_pages, v_pages, rows)
        results.append((heads, k_pages, v_pages))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_norm() -> None:
    x, residual, weight = torch.randn(5, 96)[:, :64], torch.randn(5, 64), torch.randn(64)
    expected_residual = residual.clone()
    expected = ReferenceNorm().add_rms_norm(x, expected_residual, weight, 1e-5)
    torch.testing.assert_close(CpuNorm().rms_norm(x, weight, 1e-5), ReferenceNorm().rms_norm(x, weight, 1e-5))
    torch.testing.assert_close(CpuNorm().add_rms_norm(x, residual, weight, 1e-5), expected)
    torch.testing.assert_close(residual, expected_residual)


def test_activation() -> None:
    x = torch.randn(5, 64)
    torch.testing.assert_close(CpuActivation().silu_mul(x), ReferenceActivation().silu_mul(x))


@pytest.mark.parametrize("vocab_size", [512, 515])
@pytest.mark.parametrize("temperatures", [[0.0] * 4, [0.0, 1.0, 0.0, 0.5], [1.0] * 4])
@pytest.mark.parametrize("limited", [False, True])
def test_sample(vocab_size: int, temperatures: list[float], limited: bool) -> None:
    logits = torch.randn(4, vocab_size)
    logits[0, 400] = logits[0, 300] = logits[0, 301] = 9.0
    slots, last_ids = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    limits = Limits(top_ks=slots * 100, top_ps=torch.ones(4), min_ps=torch.zeros(4)) if limited else None
    arguments = slots, slots + 7, torch.tensor(temperatures), slots, last_ids, limits
    assert CpuSample().sample(logits, *arguments).equal(ReferenceSample().sample(logits, *arguments))
    assert lowest_argmax(logits)[0] == 300
