import signal
from pathlib import Path

import pytest
import torch

from hornbeam.ops.moe.contract import ExpertsShape
from hornbeam.ops.moe.tiles import (
    SHIPPED,
    TableKey,
    Tiles,
    TileTable,
    default_tiles,
    load_table,
    read_table,
    write_table,
)

pytestmark = pytest.mark.cpu
CONFIGS = Path(__file__).parents[2] / "hornbeam/bench/configs"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this would search")
@pytest.mark.parametrize(("model", "reason"), [("qwen3-30b-a3b", "CUDA device"), ("llama-3.1-8b", "dense model")])
def test_what_cannot_be_tuned_is_told(model: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    from hornbeam.bench.tune import main

    assert main(["moe", "--model-path", str(CONFIGS / model)]) == 1
    assert reason in capsys.readouterr().err


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    entries: dict[int, Tiles] = {4: default_tiles(1), 64: default_tiles(100)}
    write_table(tmp_path / "table.json", entries)
    table = TileTable(read_table(tmp_path / "table.json"), num_experts=8, top_k=2)
    assert [table.of(n) for n in (1, 4, 5, 64, 1000)] == [entries[n] for n in (4, 4, 64, 64, 64)]


def test_what_was_tuned_here_goes_before_what_is_shipped_size_by_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"num_experts": 128, "intermediate_size": 768, "hidden_size": 2048, "top_k": 8}
    key = TableKey(**sizes, device="NVIDIA H200", dtype="bfloat16")
    shipped = read_table(SHIPPED / key.file_name)
    monkeypatch.setenv("HORNBEAM_CACHE_DIR", str(tmp_path))
    own = default_tiles(1)
    write_table(tmp_path / "tiles" / key.file_name, {64: own})
    table = load_table.__wrapped__(key)
    assert shipped[64] != own
    assert {size: table.of(size) for size in shipped} == shipped | {64: own}


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_tables_that_come_with_the_package(path: Path) -> None:
    entries = read_table(path)
    assert len(entries) > 8
    assert all(tiles.block_m in (16, 32, 64, 128) for tiles in entries.values())


def test_a_search_that_was_cut_off_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    from hornbeam.bench import tile_search, tune

    searched: list[int] = []

    class Search:
        def __init__(self, shape: ExpertsShape) -> None:
            """No GPU."""

        def best(self, num_tokens: int) -> Tiles:
            if len(searched) == 3:
                signal.raise_signal(signal.SIGTERM)
            searched.append(num_tokens)
            return default_tiles(num_tokens)

    monkeypatch.setattr(tile_search, "TileSearch", Search)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Made up")
    command = ["moe", "--model-path", str(CONFIGS / "qwen3-30b-a3b"), "--output", str(tmp_path)]
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert tune.main(command) == 130
        (path,) = tmp_path.iterdir()
        assert sorted(read_table(path)) == sorted(searched) == sorted(tune.NUM_TOKENS[:3])
        searched.append(0)  # past the one that ends it
        for _ in range(2):
            assert tune.main(command) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert searched == [*tune.NUM_TOKENS[:3], 0, *tune.NUM_TOKENS[3:]]
    assert sorted(read_table(path)) == sorted(tune.NUM_TOKENS)
    assert "cut off" in capsys.readouterr().err
