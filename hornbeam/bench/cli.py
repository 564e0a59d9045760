"""`hornbeam bench`: a table for people, and JSON lines for machines."""

import argparse
import importlib
from collections.abc import Callable, Sequence

from hornbeam.serve.cli import exit_code

_COMMANDS = {  # name -> (where it is; what it does)
    "serving": ("hornbeam.bench.serving:main", "load on a running server: throughput and latencies"),
    "one-batch-server": ("hornbeam.bench.one_batch:main_server", "one batch at a time on a running server"),
    "one-batch": ("hornbeam.bench.one_batch:main", "one batch at a time on an engine in this process"),
    "offline": ("hornbeam.bench.offline_run:main", "fixed workloads, or a data set, on an engine in this process"),
    "ablation": ("hornbeam.bench.ablation:main", "what each part of the design is worth, by switching it off"),
    "fidelity": ("hornbeam.bench.fidelity:main", "how far rounded arithmetic is from float32"),
    "kernels": ("hornbeam.bench.kernels:main", "each kernel against its reference and against the machine's limit"),
    "simulate": ("hornbeam.bench.scheduling:simulate", "the scheduler's policies on a pretended GPU"),
    "replay": ("hornbeam.bench.scheduling:replay", "whether the scheduler plans what it planned before"),
    "load": ("hornbeam.bench.loading:main", "how fast weights are loaded, and with how much memory"),
    "server": ("hornbeam.bench.server:main", "what the server costs per token, without a model"),
    "soak": ("hornbeam.bench.soak:main", "whether memory stays flat over thousands of requests, some of them aborted"),
    "engine-soak": ("hornbeam.bench.engine_soak:main", "the same through an engine in this process, with a model"),
    "scheduler": ("hornbeam.bench.scheduling:scheduler", "what scheduling costs, without a model"),
}


def main(argv: Sequence[str]) -> int:
    """Run the command line after `hornbeam bench`; the exit code."""
    parser = argparse.ArgumentParser(
        prog="hornbeam bench",
        description="Measures speed.",
        epilog="commands:\n" + "\n".join(f"  {name:<17} {text}" for name, (_, text) in _COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=_COMMANDS, metavar="command", help="see below, and --help of each")
    command = parser.parse_args(argv[:1]).command
    module, _, attribute = _COMMANDS[command][0].partition(":")
    run: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), attribute)
    return exit_code(f"hornbeam bench {command}", lambda: run(argv[1:]))
