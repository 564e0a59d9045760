"""Compiles chat templates, which come from strangers, so that they can do no harm and always end.

Offers what templates written for Hugging Face expect: `raise_exception`, `strftime_now`, a `tojson` that leaves
characters as they are, loop controls, and `{% generation %}` as a mere bracket. Knows no chats.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MAX_REPEATS = 100_000  # of a text, as for ranges
_MAX_BITS = 4096  # of a power
_LOOP_FILTER = "hornbeam_loop"


def compile_template(source: str, loop: Callable[[Context, Any], Iterator[Any]]) -> jinja2.Template:
    """The template; the items of each of its loops pass through `loop`, which may stop them.

    Raises:
        jinja2.TemplateError, RecursionError: `source` is no template.
    """
    # Not optimized: that would compute what the template says of constants while it is compiled.
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters |= {"tojson": _to_json, _LOOP_FILTER: loop}
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    tree = environment.parse(source)
    for statement in tree.find_all(nodes.For):
        statement.iter = nodes.Filter(statement.iter, _LOOP_FILTER, [], [], None, None)
    return jinja2.Template.from_code(environment, environment.compile(tree), environment.make_globals(None))


class _Sandbox(ImmutableSandboxedEnvironment):
    """Forbids private attributes, changes to the messages, long ranges, and products and powers without measure."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """left * right or left ** right."""
        whole = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and whole and left.bit_length() * right > _MAX_BITS:
            raise jinja2.TemplateError(f"a power of more than {_MAX_BITS} bits")
        text, times = (right, left) if isinstance(left, int) else (left, right)
        if operator == "*" and isinstance(text, Sequence) and len(text) * times > _MAX_REPEATS:
            raise jinja2.TemplateError(f"a repetition longer than {_MAX_REPEATS}")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's tokens for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Replace the tag by what stands inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
