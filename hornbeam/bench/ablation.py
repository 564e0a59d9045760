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
    "overlap": ("--disable-overlap-schedule",),
    "radix cache": ("--disable-radix-cache",),
    "cascade attention": ("--disable-cascade-attention",),
    "attention kernels": ("--attention-backend", "reference"),
}
_ROW = "{:<20} {:>9} {:>11} {:>13} {:>9}"


def main(argv: Sequence[str]) -> int:
    """`hornbeam bench ablation`. Raises HornbeamError if a run fails."""
    parser = FlagParser("hornbeam bench ablation", __doc__ or "")
    parser.add_argument("--workload", choices=WORKLOADS, default="mix", help="Default: %(default)s.")
    parser.add_argument("--scale", type=float, default=1.0, help="See `bench offline`. Default: 1.")
    parser.add_argument("--without", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=_PARTS_HELP)
    parser.add_argument("--json", "--result-filename", type=Path, metavar="FILE", help="Append JSON lines to it.")
    parser.add_flags()
    values = parser.parse_flags(argv)
    own = {name: values.pop(name) for name in ("workload", "scale", "without", "json")}
    flags = as_arguments(values)
    shape = ["--workload", own["workload"], "--scale", str(own["scale"])]
    show(_ROW.format("without", "seconds", "tok/s out", "tok/s in+out", "slower by"))
    results: list[dict[str, Any]] = []
    for part in (ALL_ON, *own["without"]):
        result = {"without": part} | _run([*shape, *flags, *PARTS.get(part, ())])
        results.append(result)
        slower = result["seconds"] / results[0]["seconds"] - 1
        rates = f"{result['output_tokens_per_second']:.1f}", f"{result['total_tokens_per_second']:.1f}"
        show(_ROW.format(part, f"{result['seconds']:.3f}", *rates, f"{slower:+.1%}"))
    show("\n".join(map(json.dumps, results)))
    append_json(own["json"], results)
    return 0


_PARTS_HELP = f"What to switch off, one at a time: {', '.join(PARTS)}. Default: each."


def _run(arguments: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="hornbeam-") as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, "-m", "hornbeam", "bench", "offline", *arguments, "--json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise HornbeamError(f"a run failed ({' '.join(command[4:])}): {done.stderr.strip()[-2000:]}")
        result: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return result
