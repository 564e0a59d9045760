from pathlib import Path

import pytest

from hornbeam.bench.loading import measure_loading

pytestmark = pytest.mark.cpu


def test_memory_beyond_the_weights_is_bounded(tmp_path: Path) -> None:
    measurement = measure_loading(tmp_path, num_files=4, tensors_per_file=1)
    assert measurement.size == 4 << 25
    assert measurement.peak_memory - measurement.size < measurement.largest_file + (64 << 20)
    assert len(measurement.lines()) == 5
    assert not list(tmp_path.iterdir())
