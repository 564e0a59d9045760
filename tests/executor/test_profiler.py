"""Profiles of the platform's own thread."""

import gzip
import json

import pytest
import torch

from hornbeam.core.profile import ProfileOptions
from hornbeam.executor.profiler import StepProfiler
from hornbeam.platforms.cpu import CpuPlatform

pytestmark = pytest.mark.cpu


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_trace_has_the_worker_threads_calls(tmp_path):
    platform = CpuPlatform()
    profiler = StepProfiler(platform)
    profiler.start(ProfileOptions(output_dir=str(tmp_path / "new"), prefix="mine"))
    product = platform.submit(lambda: torch.ones(4, 4).mm(torch.ones(4, 4)).sum).result()
    file = profiler.stop()
    assert float(product) == 64
    assert file.startswith(str(tmp_path / "new" / "mine-"))
    with gzip.open(file, "rt") as text:
        assert "aten::mm" in {event.get("name") for event in json.load(text)["traceEvents"]}


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        StepProfiler(CpuPlatform()).start(ProfileOptions(output_dir=str(tmp_path / "file")))
