"""The CPU's own backends against the references."""

import dataclasses

import pytest
import torch
from ops.paged import expected_output, make_case, make_shape, tolerance
from ops.test_cascade import GROUPS, share

from hornbeam.ops.activation.cpu import CpuActivation
from hornbeam.ops.activation.reference import ReferenceActivation
from hornbeam.ops.attention.cpu import CpuAttention
from hornbeam.ops.norm.cpu import CpuNorm
from hornbeam.ops.norm.reference import ReferenceNorm
from hornbeam.ops.qkv.contract import HeadNorms, Rotation
from hornbeam.ops.qkv.cpu import CpuQkv
from hornbeam.ops.qkv.reference import ReferenceQkv
from hornbeam.ops.sample.cpu import CpuSample, lowest_argmax
from hornbeam.ops.sample.reference import ReferenceSample

pytestmark = pytest.mark.cpu
CPU = torch.device("cpu")
TOLERANCE = tolerance(torch.float32)


@pytest.fixture(autouse=True)
def same_draws() -> None:
    torch.manual_seed(0)


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
def test_attention(lens: list[int], query_lens: list[int], window: int | None, has_sinks: bool) -> None:
    case = make_case(make_shape(CPU, torch.float32, 6, 2, 16, window=window), lens, query_lens)
    attention = CpuAttention(case.shape)
    plan = attention.plan_decode if set(query_lens) == {1} else attention.plan_prefill
    sinks = torch.randn(6) if has_sinks else None
    actual = plan(case.rows)(case.q, case.k_pages, case.v_pages, sinks)
    torch.testing.assert_close(actual, expected_output(case, sinks).float(), **TOLERANCE)


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("groups", GROUPS)
def test_shared_prefixes_are_read_once(groups: list, has_sinks: bool) -> None:
    case = share(make_case(make_shape(CPU, torch.float32, 6, 2, 16), [330, 400, 321, 339, 500, 350], [1] * 6), groups)
    sinks = torch.randn(6) if has_sinks else None
    expected = expected_output(dataclasses.replace(case, rows=dataclasses.replace(case.rows, shared=None)), sinks)
    actual = CpuAttention(case.shape).plan_decode(case.rows)(case.q, case.k_pages, case.v_pages, sinks)
    torch.testing.assert_close(actual, expected.float(), **TOLERANCE)


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("num_rotated", [0, 8, 16])
def test_qkv(num_rotated: int, has_norms: bool) -> None:
    wide = torch.randn(5, 10, 16)
    norms = HeadNorms(query=torch.randn(16), key=torch.randn(16), eps=1e-6) if has_norms else None
    rotation = Rotation(table=torch.randn(9, num_rotated), positions=torch.tensor([3, 8, 0, 3, 1]))
    results = []
    for backend in (CpuQkv(), ReferenceQkv()):
        heads, k_pages, v_pages = wide.clone(), torch.zeros(4, 4, 2, 16), torch.zeros(4, 4, 2, 16)
        q, k, v = heads.split((6, 2, 2), 1)
        rows = torch.tensor([5, 0, 15, 7, 8])
        backend.store(q, k, v, norms, rotation if num_rotated else None, k_pages, v_pages, rows)
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
@pytest.mark.parametrize("thresholds", [None, torch.zeros(4)])
def test_sample(vocab_size: int, temperatures: list[float], thresholds: torch.Tensor | None) -> None:
    logits = torch.randn(4, vocab_size)
    logits[0, 400] = logits[0, 300] = logits[0, 301] = 9.0
    arguments = torch.tensor(temperatures), torch.arange(4), torch.arange(4) + 7, thresholds
    assert CpuSample().sample(logits, *arguments).equal(ReferenceSample().sample(logits, *arguments))
    assert lowest_argmax(logits)[0] == 300
