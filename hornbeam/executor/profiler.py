"""Records steps with torch's profiler and writes them as a Chrome trace."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from hornbeam.core.profile import ProfileOptions
from hornbeam.platforms.contract import Platform

_ACTIVITIES = {"CPU": ProfilerActivity.CPU, "GPU": ProfilerActivity.CUDA}


class StepProfiler:
    """Starts and stops where the platform's work runs: torch records the calls of the thread that started it."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._profile: profile | None = None
        self._file = Path()

    def start(self, options: ProfileOptions) -> None:
        """Record from now on. Raises OSError if there can be no file."""
        folder = Path(options.output_dir or tempfile.mkdtemp(prefix="hornbeam-profile-"))
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"{options.prefix}-{time.time_ns()}.trace.json.gz"
        self._file.touch()
        wanted = [_ACTIVITIES[name] for name in options.activities]
        if not torch.cuda.is_available():
            wanted = [ProfilerActivity.CPU]
        self._profile = profile(activities=wanted, with_stack=options.with_stack, record_shapes=options.record_shapes)
        self._run(self._profile.start)

    def stop(self) -> str:
        """End the recording; the file that it was written to. Raises OSError if it cannot be written."""
        assert self._profile is not None, "start() comes first"
        self._run(self._profile.stop)
        self._profile.export_chrome_trace(str(self._file))
        self._profile = None
        return str(self._file)

    def _run(self, call: Callable[[], None]) -> None:
        def work() -> Callable[[], None]:
            call()
            return lambda: None

        self._platform.submit(work).result()
