"""`hornbeam bench ablation`: workloads with everything on, then with one part of the design off at a time.

Each variant is `hornbeam bench offline` in a process of its own, so that none inherits another's memory or kernels; it
runs those workloads that its part is made for.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hornbeam.bench.report import append_json, show
from hornbeam.bench.workloads import WORKLOADS
from hornbeam.core.errors import ConfigError, HornbeamError
from hornbeam.serve.cli import FlagParser, as_arguments

ALL_ON = "all on"


@dataclass(frozen=True, slots=True)
class Part:
    """Something of the design that flags switch, and the workloads that show what it is worth."""

    flags: tuple[str, ...]
    workloads: tuple[str, ...]


PARTS: Mapping[str, Part] = {  # switched off
    "graphs": Part(("--disable-cuda-graph",), ("single", "prefix")),
    "graphs of steps with prompts": Part(("--disable-prefill-cuda-graph",), ("prefix",)),
    "mixed steps": Part(("--disable-mixed-chunk",), ("mix",)),
    "overlap": Part(("--disable-overlap-schedule",), ("single", "mix")),
    "radix cache": Part(("--disable-radix-cache",), ("prefix",)),
    "cascade attention": Part(("--disable-cascade-attention",), ("prefix",)),
    "fused kernels": Part(("--disable-fused-kernels",), ("single", "prefill")),
    "attention kernels": Part(("--attention-backend", "reference"), ("single",)),
}
EXTRAS: Mapping[str, Part] = {  # off by themselves: switched on
    "torch.compile": Part(("--enable-torch-compile",), ("single",)),
}
_ROW = "{:<36} {:<9} {:>9} {:>11} {:>13} {:>9} {:>9}"


def main(argv: Sequence[str]) -> int:
    """`hornbeam bench ablation`. A variant that fails is told, and the others still run; 1 then.

    Raises:
        ConfigError: no part is wanted that one of the wanted workloads shows.
        HornbeamError: the run with everything on fails.
    """
    parser = FlagParser("hornbeam bench ablation", __doc__ or "")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help=_WORKLOAD_HELP)
    parser.add_argument("--scale", type=float, default=1.0, help="See `bench offline`. Default: 1.")
    switched = {**PARTS, **EXTRAS}
    parser.add_argument("--without", nargs="+", choices=switched, default=[*switched], metavar="PART", help=_PARTS_HELP)
    parser.add_argument("--json", "--result-filename", type=Path, metavar="FILE", help="Append JSON lines to it.")
    parser.add_flags()
    values = parser.parse_flags(argv)
    own = {name: values.pop(name) for name in ("workload", "scale", "without", "json")}
    flags = ["--scale", str(own["scale"]), *as_arguments(values)]
    wanted = {name: [w for w in own["workload"] if w in switched[name].workloads] for name in own["without"]}
    workloads = [w for w in own["workload"] if any(w in some for some in wanted.values())]
    if not workloads:
        shown = "; ".join(f"{name}: {', '.join(switched[name].workloads)}" for name in own["without"])
        raise ConfigError(f"what --without names does not show in {', '.join(own['workload'])}, but in ({shown})")
    show(_ROW.format("", "workload", "seconds", "tok/s out", "tok/s in+out", "slower by", "start"))
    all_on = _run(workloads, flags)
    results = _shown(ALL_ON, all_on, all_on)
    failed = False
    for name in filter(wanted.get, own["without"]):
        try:
            results += _shown(_label(name), _run(wanted[name], [*flags, *switched[name].flags]), all_on)
        except HornbeamError as error:
            failed = True
            show(f"{_label(name)}: {error}")
    show("\n".join(map(json.dumps, results)))
    append_json(own["json"], results)
    return int(failed)


_WORKLOAD_HELP = "Run no others than these. Default: for each part those that show what it is worth."
_PARTS_HELP = f"What to switch off, one at a time: {', '.join(PARTS)}; or on: {', '.join(EXTRAS)}. Default: each."


def _label(name: str) -> str:
    return f"without {name}" if name in PARTS else f"with {name}"


def _shown(label: str, runs: Mapping[str, Any], all_on: Mapping[str, Any]) -> list[dict[str, Any]]:
    for workload, run in runs.items():
        slower = run["seconds"] / all_on[workload]["seconds"] - 1
        rates = f"{run['output_tokens_per_second']:.1f}", f"{run['total_tokens_per_second']:.1f}"
        start = f"{run['startup_seconds']:.1f} s"
        show(_ROW.format(label, workload, f"{run['seconds']:.3f}", *rates, f"{slower:+.1%}", start))
    return [{"variant": label} | run for run in runs.values()]


def _run(workloads: Sequence[str], flags: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The results by workload."""
    with tempfile.TemporaryDirectory(prefix="hornbeam-") as folder:
        path = Path(folder) / "results.jsonl"
        command = [sys.executable, "-m", "hornbeam", "bench", "offline", "--workload", *workloads, *flags]
        done = subprocess.run([*command, "--json", str(path)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise HornbeamError(f"a run failed ({' '.join(command[4:])}): {done.stderr.strip()[-2000:]}")
        results = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return {result["workload"]: result for result in results}
