"""The `hornbeam` command. Imports what a command needs when it runs, so that `--help` answers at once."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from hornbeam import __version__
from hornbeam.config.flags import FLAGS, Flag, check_flags
from hornbeam.core.errors import HornbeamError

ELSEWHERE = {"bench": "hornbeam.bench.cli"}  # commands of folders that stand above this one: by name, when asked for


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:
        bench = importlib.import_module("hornbeam.bench.cli")  # by name: it stands on this folder
        return int(bench.main(arguments[1:]))
    parser = argparse.ArgumentParser(prog="hornbeam", description="Serves large language models.")
    parser.add_argument("--version", action="version", version=f"hornbeam {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    add_flags(commands.add_parser("serve", help="run an HTTP server", description="Runs an HTTP server."))
    commands.add_parser("bench", help="measure speed; see hornbeam bench --help", add_help=False)
    values = vars(parser.parse_args(arguments))
    del values["command"]
    try:
        user = check_flags(values)
        from hornbeam.serve.server import run_server

        run_server(user)
    except HornbeamError as error:
        print(f"hornbeam: error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Every flag of the table; those that are not given are None."""
    groups = {flag.group: parser.add_argument_group(flag.group) for flag in FLAGS}
    for flag in FLAGS:
        names = [f"--{name.replace('_', '-')}" for name in (flag.name, *flag.aliases)]
        if flag.type is bool:
            groups[flag.group].add_argument(*names, dest=flag.name, action="store_true", default=None, help=flag.help)
        else:
            groups[flag.group].add_argument(
                *names,
                dest=flag.name,
                type=flag.type,
                nargs="+" if flag.many else None,
                choices=flag.choices or None,
                metavar=None if flag.choices else flag.type.__name__.upper(),
                help=_help(flag),
            )


def _help(flag: Flag) -> str:
    text = flag.help if flag.default is None else f"{flag.help} Default: {flag.default}."
    return text.replace("%", "%%")
