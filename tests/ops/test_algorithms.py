"""The library's algorithms, by search: whatever is chosen computes the same, and choices outlive the process."""

import pytest
import torch

from hornbeam.ops.linear import algorithms
from hornbeam.ops.linear.cublaslt import CLUSTER_SHAPES, SWIZZLES


@pytest.mark.cpu
def test_a_table_is_kept(tmp_path):
    path = tmp_path / "folder" / "table.json"
    choices = {("bfloat16", 64, 96, 128): bytes(range(64)), ("float16", 8192, 96, 128): None}
    algorithms._write(path, choices)
    assert algorithms._read(path) == choices
    assert [entry.name for entry in path.parent.iterdir()] == ["table.json"]


@pytest.mark.cpu
@pytest.mark.parametrize("content", ["", "[[1, 2]]", '{"a": 1}', '[["bfloat16", 1, 2, 3, "xyz"]]'])
def test_a_damaged_table_is_searched_again(tmp_path, caplog, content):
    path = tmp_path / "table.json"
    path.write_text(content)
    assert algorithms._read(path) == {}
    assert "cannot be read" in caplog.text


@pytest.mark.cpu
def test_no_table_is_no_event(tmp_path, caplog):
    assert algorithms._read(tmp_path / "none.json") == {}
    assert not caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [24, 192, 4096])
def test_all_algorithms_agree(tmp_path, monkeypatch, dtype, num_rows):
    monkeypatch.setenv("HORNBEAM_CACHE_DIR", str(tmp_path))
    products = algorithms.LibraryProducts(torch.device("cuda"))
    weight = torch.randn(1536, 1024, device="cuda", dtype=dtype) / 32
    x = torch.randn(num_rows, 1024 + 64, device="cuda", dtype=dtype)[:, :1024]
    expected = x.float() @ weight.float().T
    lib = products._library
    offers = lib.offers(x, weight)
    assert offers
    variants = (v for setting in (CLUSTER_SHAPES, SWIZZLES) for v in lib.variants(x, weight, offers[0], setting))
    for algorithm in (*offers, *variants):
        torch.testing.assert_close(lib.linear(x, weight, algorithm).float(), expected, rtol=1e-2, atol=2e-2)
        total = torch.ones_like(expected, dtype=dtype)
        assert lib.linear(x, weight, algorithm, total) is total
        torch.testing.assert_close(total.float(), expected + 1, rtol=1e-2, atol=2e-2)
    products.prepare([(num_rows, weight)])
    torch.testing.assert_close(products.linear(x, weight).float(), expected, rtol=1e-2, atol=2e-2)
    again = algorithms.LibraryProducts(torch.device("cuda"))
    again.prepare([(num_rows, weight)])
    assert again._choices == products._choices
    assert torch.equal(again.linear(x, weight), products.linear(x, weight))
