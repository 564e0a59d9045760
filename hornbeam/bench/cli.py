"""`hornbeam bench`: a table for people and one JSON line per workload for machines."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hornbeam import Engine, __version__
from hornbeam.bench.offline import Measurement, measure
from hornbeam.bench.scheduler import run_scheduler_benchmark
from hornbeam.bench.simulate import Load, Sessions, burst, recorded, run_simulations, streams_and_a_long_prompt
from hornbeam.bench.workloads import WORKLOADS, warm_up
from hornbeam.config.flags import check_flags
from hornbeam.core.errors import HornbeamError
from hornbeam.engine.logs import set_up_logging
from hornbeam.scheduler.record import read_record, replay
from hornbeam.scheduler.waiting import POLICIES, RANDOM
from hornbeam.serve.cli import add_flags

_ROW = "{:<10} {:>8} {:>10} {:>10} {:>10} {:>9} {:>11} {:>13}"
_TITLES = ("workload", "requests", "tokens in", "tokens out", "cached", "seconds", "tok/s out", "tok/s in+out")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line after `hornbeam bench`; the exit code."""
    values = vars(_parser().parse_args(argv))
    try:
        match values.pop("command"):
            case "scheduler":
                _print("\n".join(run_scheduler_benchmark()))
            case "simulate":
                for line in run_simulations(values["policy"], _load(values), values["cache_tokens"]):
                    _print(line)
            case "replay":
                with values["file"].open("rb") as file:
                    stats = replay(read_record(file)).stats()
                _print(f"the same plans; {stats.total_generated_tokens} tokens generated")
            case "offline":
                names, scale, json_path = (values.pop(name) for name in ("workload", "scale", "json"))
                if not 0 < scale <= 1:
                    raise HornbeamError(f"--scale must be above 0 and at most 1, not {scale}")
                run_offline(list(WORKLOADS) if "all" in names else names, scale, json_path, check_flags(values))
    except HornbeamError as error:
        print(f"hornbeam bench: error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run_offline(names: Sequence[str], scale: float, json_path: Path | None, user: dict[str, Any]) -> None:
    """Measure the named workloads on an engine with the checked flags `user`; print, and append to `json_path`.

    Raises:
        HornbeamError: the engine could not start, or an answer is wrong.
    """
    user = {**user, "skip_tokenizer_init": True}
    set_up_logging(user.get("log_level", "warning"), "bench")
    started = time.perf_counter()
    with Engine(**user) as engine:
        startup_seconds = round(time.perf_counter() - started, 2)
        info = engine.get_server_info()
        _print(f"hornbeam {__version__}, {info['model_path']}, {info['device_name']}, ready in {startup_seconds:.1f} s")
        for workload in warm_up(scale):
            measure(engine, workload)
        _print(_ROW.format(*_TITLES))
        lines = []
        for name in names:
            measurement = measure(engine, WORKLOADS[name](scale))
            _print(_table_row(measurement))
            run = {"startup_seconds": startup_seconds, "scale": scale, "device": info["device_name"]}
            run |= {"model_path": info["model_path"], "version": __version__, "flags": user}
            lines.append(json.dumps(measurement.as_json() | run))
    _print("\n".join(lines))
    if json_path is not None:
        with json_path.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hornbeam bench", description="Measures speed.")
    commands = parser.add_subparsers(dest="command", required=True)
    offline = commands.add_parser(
        "offline",
        help="fixed workloads on an engine in this process",
        description="Runs fixed workloads on an engine in this process: token ids in, exact numbers of them out.",
    )
    offline.add_argument(
        "--workload", nargs="+", choices=(*WORKLOADS, "all"), default=["all"], help="What to run. Default: all."
    )
    offline.add_argument("--scale", type=float, default=1.0, help="Share of the full numbers and lengths. Default: 1.")
    offline.add_argument("--json", type=Path, metavar="FILE", help="Append the JSON lines to this file, too.")
    add_flags(offline)
    simulate = commands.add_parser(
        "simulate",
        help="the scheduler's policies on a pretended GPU",
        description="Runs sessions that share system prompts on the real scheduler and a cost model of a GPU.",
    )
    policies, load = (*POLICIES, RANDOM), Sessions()
    simulate.add_argument("--policy", nargs="+", choices=policies, default=policies, help="Default: all.")
    simulate.add_argument(
        "--load",
        choices=("sessions", "long-prompt", "burst"),
        default="sessions",
        help="Sessions of several turns; streams, and then a prompt of 32,000 tokens; 512 requests at once.",
    )
    simulate.add_argument("--record", type=Path, metavar="FILE", help="The load of a recorded run (--record-schedule).")
    simulate.add_argument("--sessions", type=int, default=load.num_sessions, help="Default: %(default)s.")
    simulate.add_argument("--turns", type=int, default=load.num_turns, help="Per session. Default: %(default)s.")
    simulate.add_argument("--cache-tokens", type=int, default=100_000, help="In all. Default: %(default)s.")
    command = commands.add_parser(
        "replay",
        help="whether the scheduler plans what it planned before",
        description="Feeds a run (see --record-schedule) to the scheduler, without a model, and compares the plans.",
    )
    command.add_argument("file", type=Path)
    commands.add_parser(
        "scheduler",
        help="what scheduling costs, without a model",
        description="Times the planning of decode steps and the search for a prompt's prefix, and how they grow.",
    )
    return parser


def _load(values: dict[str, Any]) -> Load:
    if values["record"] is not None:
        with values["record"].open("rb") as file:
            return recorded(read_record(file))
    match values["load"]:
        case "long-prompt":
            return streams_and_a_long_prompt()
        case "burst":
            return burst()
    return Sessions(num_sessions=values["sessions"], num_turns=values["turns"]).draw(seed=0)


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


def _print(text: str) -> None:
    print(text, flush=True)  # noqa: T201
