"""`hornbeam bench ablation`: one workload with everything on, then with one part of the design off at a time.

Each run is `hornbeam bench offline` in a process of its own, so that none inherits another's memory or kernels.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hornbeam.bench.report import append_json, show
from hornbeam.bench.workloads import WORKLOADS
from hornbeam.core.errors import HornbeamError
from hornbeam.serve.cli import FlagParser, as_arguments

ALL_ON = "all on"
PARTS: Mapping[str, tuple[str, ...]] = {  # what is switched off, and by which flags
    "graphs": ("--disable-cuda-graph",),
    "graphs of steps with prompts": ("--disable-prefill-cuda-graph",),
    "mixed steps": ("--disable-mixed-chunk",),
    "overlap": ("--disable-overlap-schedule",),
    "radix cache": ("--disable-radix-cache",),
    "cascade attention": ("--disable-cascade-attention",),
    "fused kernels": ("--disable-fused-kernels",),
    "attention kernels": ("--attention-backend", "reference"),
}
EXTRAS: Mapping[str, tuple[str, ...]] = {"torch.compile": ("--enable-torch-compile",)}  # off by themselves: switched on
_ROW = "{:<36} {:>9} {:>11} {:>13} {:>9}"


def main(argv: Sequence[str]) -> int:
    """`hornbeam bench ablation`. Raises HornbeamError if a run fails."""
    parser = FlagParser("hornbeam bench ablation", __doc__ or "")
    parser.add_argument("--workload", choices=WORKLOADS, default="mix", help="Default: %(default)s.")
    parser.add_argument("--scale", type=float, default=1.0, help="See `bench offline`. Default: 1.")
    parts = [*PARTS, *EXTRAS]
    parser.add_argument("--without", nargs="+", choices=parts, default=parts, metavar="PART", help=_PARTS_HELP)
    parser.add_argument("--json", "--result-filename", type=Path, metavar="FILE", help="Append JSON lines to it.")
    parser.add_flags()
    values = parser.parse_flags(argv)
    own = {name: values.pop(name) for name in ("workload", "scale", "without", "json")}
    flags = as_arguments(values)
    shape = ["--workload", own["workload"], "--scale", str(own["scale"])]
    show(_ROW.format("", "seconds", "tok/s out", "tok/s in+out", "slower by"))
    results: list[dict[str, Any]] = []
    for part in (ALL_ON, *own["without"]):
        result = {"variant": _label(part)} | _run([*shape, *flags, *PARTS.get(part, ()), *EXTRAS.get(part, ())])
        results.append(result)
        slower = result["seconds"] / results[0]["seconds"] - 1
        rates = f"{result['output_tokens_per_second']:.1f}", f"{result['total_tokens_per_second']:.1f}"
        show(_ROW.format(result["variant"], f"{result['seconds']:.3f}", *rates, f"{slower:+.1%}"))
    show("\n".join(map(json.dumps, results)))
    append_json(own["json"], results)
    return 0


_PARTS_HELP = f"What to switch off, one at a time: {', '.join(PARTS)}; or on: {', '.join(EXTRAS)}. Default: each."


def _label(part: str) -> str:
    return f"without {part}" if part in PARTS else f"with {part}" if part in EXTRAS else part


def _run(arguments: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="hornbeam-") as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, "-m", "hornbeam", "bench", "offline", *arguments, "--json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise HornbeamError(f"a run failed ({' '.join(command[4:])}): {done.stderr.strip()[-2000:]}")
        result: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return result
