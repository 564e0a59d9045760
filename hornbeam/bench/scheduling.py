"""`hornbeam bench simulate | replay | scheduler`: the scheduler without a model."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hornbeam.bench.report import show
from hornbeam.bench.scheduler import run_scheduler_benchmark
from hornbeam.bench.simulate import Load, Sessions, burst, recorded, run_simulations, streams_and_a_long_prompt
from hornbeam.scheduler.policies import POLICIES
from hornbeam.scheduler.record import read_record
from hornbeam.scheduler.record import replay as replay_record
from hornbeam.scheduler.waiting import FIRST_COME, RANDOM


def scheduler(argv: Sequence[str]) -> int:
    """`hornbeam bench scheduler`."""
    argparse.ArgumentParser(
        prog="hornbeam bench scheduler",
        description="Times the planning of decode steps and the search for a prompt's prefix, and how they grow.",
    ).parse_args(argv)
    for line in run_scheduler_benchmark():
        show(line)
    return 0


def replay(argv: Sequence[str]) -> int:
    """`hornbeam bench replay`. Raises what `hornbeam.scheduler.record.replay` does."""
    parser = argparse.ArgumentParser(
        prog="hornbeam bench replay",
        description="Feeds a run (see --record-schedule) to the scheduler, without a model, and compares the plans.",
    )
    parser.add_argument("file", type=Path)
    with parser.parse_args(argv).file.open("rb") as file:
        stats = replay_record(read_record(file)).stats()
    show(f"the same plans; {stats.total_generated_tokens} tokens generated")
    return 0


def simulate(argv: Sequence[str]) -> int:
    """`hornbeam bench simulate`. Raises ConfigError for a load that is none."""
    parser = argparse.ArgumentParser(
        prog="hornbeam bench simulate",
        description="Runs sessions that share system prompts on the real scheduler and a cost model of a GPU.",
    )
    policies, sessions = (FIRST_COME, *POLICIES, RANDOM), Sessions()
    parser.add_argument("--policy", nargs="+", choices=policies, default=policies, help="Default: all.")
    parser.add_argument(
        "--load",
        choices=("sessions", "long-prompt", "burst"),
        default="sessions",
        help="Sessions of several turns; streams, and then a prompt of 32,000 tokens; 512 requests at once.",
    )
    parser.add_argument("--record", type=Path, metavar="FILE", help="The load of a recorded run (--record-schedule).")
    parser.add_argument("--sessions", type=int, default=sessions.num_sessions, help="Default: %(default)s.")
    parser.add_argument("--turns", type=int, default=sessions.num_turns, help="Per session. Default: %(default)s.")
    parser.add_argument("--cache-tokens", type=int, default=100_000, help="In all. Default: %(default)s.")
    values = parser.parse_args(argv)
    for line in run_simulations(values.policy, _load(values), values.cache_tokens):
        show(line)
    return 0


def _load(values: argparse.Namespace) -> Load:
    if values.record is not None:
        with values.record.open("rb") as file:
            return recorded(read_record(file))
    match values.load:
        case "long-prompt":
            return streams_and_a_long_prompt()
        case "burst":
            return burst()
    return Sessions(num_sessions=values.sessions, num_turns=values.turns).draw(seed=0)
