"""The library's algorithms, by search: whatever is chosen computes the same, and choices outlive the process."""

import pytest
import torch

from hornbeam.ops.linear import algorithms
from hornbeam.ops.linear.cublaslt import CLUSTER_SHAPES, SWIZZLES
from hornbeam.ops.linear.timing import Way
from hornbeam.ops.norm.contract import PART_COUNTS
from hornbeam.ops.norm.reference import ReferenceNorm


@pytest.mark.cpu
def test_a_table_is_kept(tmp_path):
    path = tmp_path / "folder" / "table.json"
    choices = {
        ("bfloat16", 64, 96, 128): algorithms.Choice(bytes(range(64)), Way(b"another", 2)),
        ("float16", 8192, 96, 128): algorithms.Choice(b"", Way(b"")),
    }
    algorithms._write(path, choices)
    assert algorithms._read(path) == choices
    assert [entry.name for entry in path.parent.iterdir()] == ["table.json"]


@pytest.mark.cpu
@pytest.mark.parametrize("content", ["", "[[1, 2]]", '{"a": 1}', '[["bfloat16", 1, 2, 3, null]]'])
def test_a_damaged_table_is_searched_again(tmp_path, caplog, content):
    path = tmp_path / "table.json"
    path.write_text(content)
    assert algorithms._read(path) == {}
    assert "cannot be read" in caplog.text


@pytest.mark.cpu
def test_no_table_is_no_event(tmp_path, caplog):
    assert algorithms._read(tmp_path / "none.json") == {}
    assert not caplog.text


@pytest.mark.cpu
def test_what_is_shipped_can_be_read():
    tables = list(algorithms.SHIPPED.glob("*.json"))
    assert tables
    for path in tables:
        for (dtype, *sizes), choice in algorithms._read(path).items():
            assert dtype in ("bfloat16", "float16")
            assert min(sizes) > 0
            assert {len(choice.alone), len(choice.added.algorithm)} == {64}
            assert choice.added.num_parts in (1, *PART_COUNTS)


class FakeLibrary:
    """Two offers for each product; computes on the CPU. `refused` is not allowed."""

    version = 7
    refused = b""

    def __init__(self, device):
        pass

    def offers(self, x, weight, num_parts=1):
        return [b"slow", b"fast"]

    def variants(self, x, weight, algorithm, setting, num_parts=1):
        yield algorithm + b"er"

    def allows(self, x, weight, algorithm, num_parts=1):
        return algorithm != self.refused

    def linear(self, x, weight, algorithm, residual=None, num_parts=1):
        if num_parts > 1:
            return torch.stack(
                [a @ b.T for a, b in zip(x.chunk(num_parts, 1), weight.chunk(num_parts, 1), strict=True)]
            )
        return x @ weight.T if residual is None else residual.add_(x @ weight.T)


class FakeStopwatch:
    """By the names of algorithms; parts are faster in graphs."""

    def __init__(self, device):
        pass

    def singly(self, runs, num_rounds):
        ways = [run.args[0] for run in runs]
        return [len(way.algorithm) + 10 * (b"slow" in way.algorithm) for way in ways]

    def in_graphs(self, runs):
        return [10 - run.num_parts for run in runs]

    def in_turns(self, runs, num_runs):
        return self.singly(runs, 1)


@pytest.fixture
def faked(tmp_path, monkeypatch):
    monkeypatch.setenv("HORNBEAM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(algorithms, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(algorithms, "CublasLt", FakeLibrary)
    monkeypatch.setattr(algorithms, "Stopwatch", FakeStopwatch)
    monkeypatch.setattr(algorithms.ProductInModel, "in_layers", lambda self, way: way)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Fake")
    return tmp_path


def made():
    return algorithms.LibraryProducts(torch.device("cpu"))


UP, DOWN = torch.randn(2048, 512), torch.randn(512, 3072)


@pytest.mark.cpu
def test_only_what_goes_to_the_running_sum_is_left_in_parts(faked):
    products = made()
    products.prepare([(24, [UP]), (24, [DOWN]), (8192, [DOWN])])
    chosen = {product[1:]: choice.added.num_parts for product, choice in products._choices.items()}
    assert chosen == {(24, 2048, 512): 1, (24, 512, 3072): 4, (8192, 512, 3072): 1}
    x, residual = torch.randn(24, 3072), torch.randn(24, 512)
    out, left = products.added(x, DOWN, residual)
    assert (out.shape, left) == ((4, 24, 512), residual)
    torch.testing.assert_close(out.sum(0), x @ DOWN.T, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(products.linear(x, DOWN), x @ DOWN.T)
    assert made()._choices == products._choices


@pytest.mark.cpu
def test_what_is_shipped_is_not_searched_unless_the_library_refuses_it(faked, monkeypatch):
    shipped = algorithms.Choice(b"shipped", Way(b"shipped", 2))
    key = ("float32", 24, 512, 3072)
    algorithms._write(faked / "shipped" / "NVIDIA_Fake,cublaslt-7.json", {key: shipped})
    products = made()
    products.prepare([(24, [DOWN])])
    assert products._choices == {key: shipped}
    assert not (faked / "products").exists()
    monkeypatch.setattr(FakeLibrary, "refused", b"shipped")
    products.prepare([(24, [UP]), (24, [DOWN])])
    assert products._choices[key].alone == b"fast"
    assert made()._choices == products._choices


@pytest.mark.cpu
def test_a_search_that_fails_leaves_the_librarys_choice(faked, monkeypatch, caplog):
    def failing(self, runs):
        raise RuntimeError("capture failed")

    monkeypatch.setattr(FakeStopwatch, "in_graphs", failing)
    products = made()
    products.prepare([(24, [UP]), (24, [DOWN])])
    assert products._choices == {}
    assert "capture failed" in caplog.text
    x, residual = torch.randn(24, 3072), torch.randn(24, 512)
    expected = residual + x @ DOWN.T
    assert products.added(x, DOWN, residual) == (residual, None)
    torch.testing.assert_close(residual, expected, rtol=1e-4, atol=1e-3)


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
    for num_parts in PART_COUNTS:
        if 1024 % (64 * num_parts) == 0:
            for algorithm in lib.offers(x, weight, num_parts):
                parts = lib.linear(x, weight, algorithm, num_parts=num_parts)
                assert (len(parts), parts.dtype) == (num_parts, torch.float32)
                torch.testing.assert_close(parts.sum(0), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("num_rows", [24, 192, 4096])
def test_what_is_chosen_computes_the_same(tmp_path, monkeypatch, num_rows):
    """Beside a weight of another shape, from which the size of hidden rows can be told. Nothing of it is shipped."""
    monkeypatch.setenv("HORNBEAM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(algorithms, "SHIPPED", tmp_path / "shipped")
    products = algorithms.LibraryProducts(torch.device("cuda"))
    down, up = (torch.randn(*size, device="cuda", dtype=torch.bfloat16) / 32 for size in ((512, 3072), (2048, 512)))
    x, residual = (torch.randn(num_rows, n, device="cuda", dtype=torch.bfloat16) for n in (3072, 512))
    expected = x.float() @ down.float().T
    searched = [(num_rows, [down, down]), (num_rows, [up])]
    products.prepare(searched)
    assert len(products._choices) == 2
    torch.testing.assert_close(products.linear(x, down).float(), expected, rtol=1e-2, atol=2e-2)
    again = algorithms.LibraryProducts(torch.device("cuda"))
    again.prepare(searched)
    assert again._choices == products._choices
    totals = []
    for known in (products, again):
        total = residual.clone()
        out, left = known.added(x, down, total)
        if left is not None:
            assert left is total
            ReferenceNorm().add_rms_norm(out, total, torch.ones_like(total[0]), 1e-5)
        torch.testing.assert_close(total.float(), expected + residual.float(), rtol=1e-2, atol=2e-2)
        totals.append(total)
    assert torch.equal(*totals)
