"""The `hornbeam` command. Imports what a command needs when it runs, so that `--help` answers at once."""

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hornbeam import __version__
from hornbeam.config.absent import ABSENT, dashed
from hornbeam.config.flags import FLAGS, GROUPS, Flag, check_flags, nearest
from hornbeam.core.errors import HornbeamError

_COMMANDS = {  # name -> (where it is: imported by name, as some stand above this folder; what it does)
    "serve": ("hornbeam.serve.cli:serve", "run an HTTP server"),
    "chat": ("hornbeam.serve.chat:main", "talk to a server, or to a model"),
    "bench": ("hornbeam.bench.cli:main", "measure speed"),
    "tune": ("hornbeam.bench.tune:main", "search the fastest settings of kernels"),
    "check-env": ("hornbeam.check_env:main", "tell versions, devices and usable backends"),
}
_MULTIPLES = {"k": 1000, "m": 1_000_000, "K": 1024, "M": 1024 * 1024}
_EXAMPLES = """
examples:
  hornbeam serve                                          the default model, on this machine alone
  hornbeam serve --model-path FOLDER --port 8000 --host 0.0.0.0 --api-key KEY
  hornbeam serve --config serve.yaml --port 8001          flags override the file

A flag may be shortened as long as it stays unique. docs/flags.md has the same list."""


class FlagParser(argparse.ArgumentParser):
    """Of commands that take the server's flags: groups them, and names the nearest flag to one it does not know."""

    def __init__(self, prog: str, description: str, epilog: str = "") -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse_flags(self, arguments: Sequence[str] | None) -> dict[str, Any]:
        """The values by name; what was not given is None, or the default. Ends the process on a mistake."""
        values, unknown = self.parse_known_args(arguments)
        if unknown:
            flag = unknown[0].partition("=")[0]
            known = [name.strip("-").replace("-", "_") for name in self._option_string_actions]
            self.error(f"unknown argument {unknown[0]}{nearest(flag.strip('-').replace('-', '_'), known)}")
        return vars(values)

    def add_flags(self) -> None:
        """Every flag of the table, and --config."""
        groups = {name: self.add_argument_group(name, text) for name, text in GROUPS.items()}
        groups["model"].add_argument(
            "--config", type=Path, metavar="FILE", help="YAML file with flags; those given here override it."
        )
        for flag in FLAGS:
            _add_flag(groups[flag.group], flag)
        for name in ABSENT:
            self.add_argument(dashed(name), dest=name, nargs="*", action=_Joined, help=argparse.SUPPRESS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="hornbeam",
        description="Serves large language models.",
        epilog="commands:\n" + "\n".join(f"  {name:<12} {text}" for name, (_, text) in _COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hornbeam {__version__}")
    parser.add_argument("command", choices=_COMMANDS, metavar="command", help="see below, and: hornbeam command --help")
    command = parser.parse_args(arguments[:1]).command
    module, _, attribute = _COMMANDS[command][0].partition(":")
    run: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), attribute)
    return exit_code(f"hornbeam {command}", lambda: run(arguments[1:]))


def serve(arguments: Sequence[str]) -> int:
    """`hornbeam serve`."""
    parser = FlagParser("hornbeam serve", "Runs an HTTP server: OpenAI's API and the native one.", _EXAMPLES)
    parser.add_flags()
    user = checked(parser.parse_flags(arguments))
    from hornbeam.serve.server import run_server

    run_server(user)
    return 0


def checked(values: dict[str, Any]) -> dict[str, Any]:
    """What the parsed flags and the file that `config` names say together; see `check_flags`.

    Raises:
        ConfigError: a flag or the file is wrong.
    """
    path = values.pop("config")
    if path is None:
        return check_flags(values)
    from hornbeam.config.file import read_config_file

    return {**check_flags(read_config_file(path)), **check_flags(values)}


def as_arguments(values: Mapping[str, Any]) -> list[str]:
    """The parsed flags as they were given, for another process."""
    arguments = []
    for name in ("config", *(flag.name for flag in FLAGS)):
        value = values.get(name)
        if value is not None:
            items = () if value is True else value if isinstance(value, (list, tuple)) else (value,)
            arguments += [dashed(name), *map(str, items)]
    return arguments


def exit_code(prog: str, run: Callable[[], int]) -> int:
    """Of `run`; what a user can cause is told in one line."""
    try:
        return run()
    except HornbeamError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        return 130


def run_module(command: str) -> NoReturn:
    """For modules such as `hornbeam.launch_server` that stand for `hornbeam <command>`."""
    sys.exit(main([*command.split(), *sys.argv[1:]]))


def whole_number(text: str) -> int:
    """ "8192", "8k" (8000) or "8K" (8192)."""
    multiple = _MULTIPLES.get(text[-1:], 1)
    return int(text if multiple == 1 else text[:-1]) * multiple


whole_number.__name__ = "whole number"  # argparse's word for it


class _Joined(argparse.Action):
    """Of a flag that does not exist, so that nobody knows how many values it takes."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, " ".join(values) or True)


def _add_flag(group: Any, flag: Flag) -> None:
    names = [dashed(name) for name in (flag.name, *flag.aliases)]
    if flag.type is bool:
        group.add_argument(*names, dest=flag.name, action="store_true", default=None, help=_help(flag))
        return
    group.add_argument(
        *names,
        dest=flag.name,
        type=whole_number if flag.type is int else flag.type,
        nargs="+" if flag.many else None,
        choices=flag.choices or None,
        metavar=None if flag.choices else {int: "N", float: "X"}.get(flag.type, "TEXT"),
        help=_help(flag),
    )


def _help(flag: Flag) -> str:
    text = flag.help if flag.default in (None, False) else f"{flag.help} Default: {flag.default}."
    return text.replace("%", "%%")
