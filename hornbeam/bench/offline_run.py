"""`hornbeam bench offline`: workloads on an engine in this process."""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hornbeam import Engine, __version__
from hornbeam.bench.datasets import DATASET_FLAGS, TEXT_DATASETS, add_dataset_flags, draw_samples
from hornbeam.bench.expert_counts import counted_experts
from hornbeam.bench.offline import Measurement, measure
from hornbeam.bench.profile import ProfiledEngine, traced
from hornbeam.bench.report import append_json, show
from hornbeam.bench.workloads import KINDS, WORKLOADS, Workload, warm_up
from hornbeam.core.errors import ConfigError
from hornbeam.engine.logs import set_up_logging
from hornbeam.serve.cli import FlagParser, checked
from hornbeam.text.loading import load_tokenizer

_ROW = "{:<10} {:>8} {:>10} {:>10} {:>10} {:>9} {:>11} {:>13}"
_TITLES = ("workload", "requests", "tokens in", "tokens out", "cached", "seconds", "tok/s out", "tok/s in+out")


def main(argv: Sequence[str]) -> int:
    """`hornbeam bench offline`.

    Raises:
        HornbeamError: a flag is wrong, the engine could not start, or an answer is wrong.
    """
    values = _parser().parse_flags(argv)
    names, scale, json_path, profile, trace, counts = (
        values.pop(name) for name in ("workload", "scale", "json", "profile", "profile_trace", "count_experts")
    )
    if not 0 < scale <= 1:
        raise ConfigError(f"--scale must be above 0 and at most 1, not {scale}")
    own = argparse.Namespace(**{name: values.pop(name) for name in list(values) if name in DATASET_FLAGS})
    makers, groups = WORKLOADS | KINDS, {"all": WORKLOADS, "kinds": KINDS}
    names = [name for given in names for name in groups.get(given, (given,))]
    user = checked(values)

    def workloads(info: Mapping[str, Any]) -> list[Workload]:
        if own.dataset_name is None:
            return [makers[name](scale) for name in names]
        path = user.get("tokenizer_path", info["model_path"])
        tokenizer = load_tokenizer(path) if own.dataset_name in TEXT_DATASETS else None
        samples = draw_samples(own, tokenizer, info["vocab_size"])
        prompts = tuple(sample.token_ids for sample in samples)
        lens = tuple(sample.num_output for sample in samples)
        return [Workload(name=own.dataset_name, prompts=prompts, output_lens=lens, temperature=0.0)]

    run_offline(workloads, scale, json_path, user, profile, trace, counts)
    return 0


def run_offline(
    draw: Callable[[Mapping[str, Any]], Sequence[Workload]],
    scale: float,
    json_path: Path | None,
    user: dict[str, Any],
    profile: bool = False,
    trace: Path | None = None,
    counts: bool = False,
) -> None:
    """Measure on an engine with the checked flags `user`; print, and append to `json_path`.

    Args:
        draw: what to run after a warm-up, drawn when the engine has told its facts (see `get_server_info`).
        scale: of the warm-up.
        json_path: a file for the JSON lines.
        user: checked flags.
        profile: also tell where the time goes.
        trace: also write a trace of torch's profiler there.
        counts: also tell how many distinct experts layers took.

    Raises:
        HornbeamError: the engine could not start, or an answer is wrong.
    """
    user = {**user, "skip_tokenizer_init": True}
    set_up_logging(user.get("log_level", "warning"), "bench")
    started = time.perf_counter()
    with counted_experts() if counts else nullcontext() as counter:
        engine = ProfiledEngine(user) if profile else Engine(**user)
    with engine:
        startup_seconds = round(time.perf_counter() - started, 2)
        info = engine.get_server_info()
        show(f"hornbeam {__version__}, {info['model_path']}, {info['device_name']}, ready in {startup_seconds:.1f} s")
        workloads = draw(info)
        for workload in warm_up(scale):
            measure(engine, workload)
        if counter is not None:
            counter.take()
        show(_ROW.format(*_TITLES))
        results = []
        run = {"startup_seconds": startup_seconds, "scale": scale, "device": info["device_name"]}
        run |= {"model_path": info["model_path"], "version": __version__, "flags": user}
        for workload in workloads:
            with engine.watched() if isinstance(engine, ProfiledEngine) else nullcontext() as split:
                measurement = measure(engine, workload)
            show(_table_row(measurement))
            results.append(measurement.as_json() | run)
            if counter is not None and (experts := counter.take()) is not None:
                show(experts.line())
                results[-1]["experts"] = asdict(experts)
            if split is not None:
                show(split.table())
                results[-1]["profile"] = split.as_json()
        if trace is not None:
            with traced(trace):
                measure(engine, workloads[0])
            show(f"trace of {workloads[0].name}: {trace}")
    show("\n".join(map(json.dumps, results)))
    append_json(json_path, results)


def _parser() -> FlagParser:
    parser = FlagParser(
        "hornbeam bench offline",
        "Runs fixed workloads on an engine in this process: token ids in, exact numbers of them out.",
    )
    names = (*WORKLOADS, "all", *KINDS, "kinds")
    what = "What to run; kinds: the nine of other kinds. Default: all, the first four."
    parser.add_argument("--workload", nargs="+", choices=names, default=["all"], help=what)
    parser.add_argument("--scale", type=float, default=1.0, help="Share of the full numbers and lengths. Default: 1.")
    parser.add_argument(
        "--json", "--result-filename", type=Path, metavar="FILE", help="Append the JSON lines to this file, too."
    )
    parser.add_argument("--profile", action="store_true", help="Tell where time goes: device, CPU by stage, bubbles.")
    parser.add_argument("--count-experts", action="store_true", help="Tell how many distinct experts layers took.")
    parser.add_argument(
        "--profile-trace", type=Path, metavar="FILE", help="Run the first workload again under torch's profiler."
    )
    add_dataset_flags(parser, None)
    parser.add_flags()
    return parser


def _table_row(run: Measurement) -> str:
    rates = f"{run.output_rate:.1f}", f"{run.total_rate:.1f}"
    return _ROW.format(
        run.workload,
        run.num_requests,
        run.input_tokens,
        run.output_tokens,
        run.cached_tokens,
        f"{run.seconds:.3f}",
        *rates,
    )
