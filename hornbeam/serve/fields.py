"""Reads JSON objects by a table of their fields (`serve/tables.py`); the table is their JSON schema, too.

The fields that all generating APIs share become sampling parameters and text options here. Knows no HTTP.
"""

import contextlib
import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hornbeam.core.errors import BadRequest
from hornbeam.core.request import SamplingParams
from hornbeam.text.session import TextOptions

logger = logging.getLogger(__name__)

MAX_SIBLINGS = 1024
# What an API calls a field of SamplingParams; the others have the same name everywhere.
GENERATE_NAMES = {"seed": "sampling_seed"}
OPENAI_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}

_PARAMS = frozenset(field.name for field in dataclasses.fields(SamplingParams))
_TEXT_OPTIONS = frozenset(field.name for field in dataclasses.fields(TextOptions))

Schema = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of JSON values. `schema` describes what `accepts` lets pass."""

    name: str  # "an integer"
    accepts: Callable[[Any], bool]
    schema: Schema

    def or_list(self) -> "Kind":
        """The same, or a list of it with one value for each prompt of a batch."""
        return Kind(
            f"{self.name} or a list of such, one per prompt",
            lambda value: all(map(self.accepts, value)) if isinstance(value, list) else self.accepts(value),
            {"anyOf": [self.schema, _array(self.schema)]},
        )


def one_of(*values: str) -> Kind:
    """One of these strings."""
    name = f"{', '.join(values[:-1])} or {values[-1]}" if len(values) > 1 else values[0]
    return Kind(name, lambda value: isinstance(value, str) and value in values, {"enum": list(values)})


def _array(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_int, value))


def _is_id_lists(value: Any) -> bool:
    return _is_ids(value) or (isinstance(value, list) and all(map(_is_ids, value)))


def _is_prompt_ids(value: Any) -> bool:
    """By the first item and the lists alone: prompts are long, and the ids themselves are checked by `known_ids`."""
    if not isinstance(value, list):
        return False
    return not value or isinstance(value[0], int) or all(isinstance(row, list) for row in value)


def _is_strings(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _is_biases(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(key.isascii() and key.isdigit() and len(key) < 19 for key in value)
        and all(map(NUMBER.accepts, value.values()))
    )


def _is_messages(value: Any) -> bool:
    return (
        bool(value)
        and isinstance(value, list)
        and all(isinstance(item, dict) and isinstance(item.get("role"), str) for item in value)
    )


_COUNTS = re.compile("[1-9][0-9]{0,8}")
_FILE_NAMES = re.compile("[A-Za-z0-9._-]{1,100}")
_INTEGER: Schema = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
_IDS = _array(_INTEGER)
_STRINGS: Schema = {"anyOf": [{"type": "string"}, _array({"type": "string"})]}
_MESSAGE: Schema = {"type": "object", "properties": {"role": {"type": "string"}}, "required": ["role"]}

BOOLEAN = Kind("a boolean", lambda value: isinstance(value, bool), {"type": "boolean"})
INTEGER = Kind("an integer", _is_int, _INTEGER)
COUNT = Kind("an integer of at least 0", lambda value: _is_int(value) and value >= 0, {**_INTEGER, "minimum": 0})
NUMBER = Kind("a number", lambda value: isinstance(value, float) or _is_int(value), {"type": "number"})
STRING = Kind("a string", lambda value: isinstance(value, str), {"type": "string"})
OBJECT = Kind("an object", lambda value: isinstance(value, dict), {"type": "object"})
IDS = Kind("a list of integers", _is_ids, _IDS)
STRINGS = Kind("a string or a list of strings", _is_strings, _STRINGS)
PROMPT_IDS = Kind("a list of integers, or a list of such lists", _is_prompt_ids, {"anyOf": [_IDS, _array(_IDS)]})
PROMPTS = Kind(
    "a string, a list of strings, a list of token ids, or a list of such lists",
    lambda value: _is_strings(value) or _is_prompt_ids(value),
    {"anyOf": [_STRINGS, _IDS, _array(_IDS)]},
)
ID_LISTS = Kind("a list of integers, or one such list per prompt", _is_id_lists, PROMPT_IDS.schema)
BIASES = Kind(
    "an object of numbers by token id",
    _is_biases,
    {"type": "object", "patternProperties": {"^[0-9]{1,18}$": {"type": "number"}}, "additionalProperties": False},
)
STEPS = Kind(  # old clients send it as a string
    "an integer of at least 1",
    lambda value: (_is_int(value) and value >= 1) or (isinstance(value, str) and _COUNTS.fullmatch(value) is not None),
    {"anyOf": [{**_INTEGER, "minimum": 1}, {"type": "string", "pattern": f"^{_COUNTS.pattern}$"}]},
)
ACTIVITIES = Kind(
    "a list of CPU and GPU",
    lambda value: isinstance(value, list) and bool(value) and all(item in ("CPU", "GPU") for item in value),
    _array({"enum": ["CPU", "GPU"]}, minItems=1),
)
FILE_NAME = Kind(
    "1 to 100 letters, digits, dots, dashes or underscores",
    lambda value: isinstance(value, str) and _FILE_NAMES.fullmatch(value) is not None,
    {"type": "string", "pattern": f"^{_FILE_NAMES.pattern}$"},
)
MESSAGES = Kind("a list of at least one message with a role", _is_messages, _array(_MESSAGE, minItems=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What happens to one field. `null` is always the same as leaving the field out."""

    treatment: Literal["honoured", "no effect", "refused"]
    kind: Kind | None = None  # of an honoured field
    harmless: tuple[Any, ...] = ()  # values of a refused field that ask for nothing

    @property
    def schema(self) -> Schema:
        """For the API's document."""
        if self.kind is not None:
            return {"anyOf": [self.kind.schema, {"type": "null"}]}
        if self.treatment == "no effect":
            return {"description": "Accepted without effect."}
        return {"enum": [*self.harmless, None], "description": "Not supported yet."}


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """The fields of one kind of JSON object."""

    name: str  # for messages: what the fields belong to
    unknown: Literal["ignored", "refused"]
    rules: Mapping[str, Rule] = field(default_factory=dict)
    required: tuple[str, ...] = ()  # of its honoured fields

    @property
    def schema(self) -> Schema:
        """For the API's document."""
        properties = {name: rule.schema for name, rule in self.rules.items()}
        return {
            "type": "object",
            "properties": {**properties, **{name: self._kind(name).schema for name in self.required}},
            "required": list(self.required),
            "additionalProperties": self.unknown == "ignored",
        }

    @property
    def kind(self) -> Kind:
        """Of fields that hold such an object; its own fields are read later."""
        return Kind("an object", OBJECT.accepts, self.schema)

    def _kind(self, name: str) -> Kind:
        kind = self.rules[name].kind
        assert kind is not None, "what is required is honoured"
        return kind

    def read(self, body: Any) -> dict[str, Any]:
        """The honoured fields of `body` that are set.

        Raises:
            BadRequest: a field is of the wrong type, refused, or unknown where that is refused; it names the field.
        """
        if not isinstance(body, dict):
            raise BadRequest(f"{self.name} must be a JSON object, not {type(body).__name__}")
        values: dict[str, Any] = {}
        for name, value in body.items():
            rule = self.rules.get(name)
            if rule is None and self.unknown == "refused":
                raise BadRequest(f"{self.name} has no field {name!r}", name)
            if rule is None or rule.treatment == "no effect":
                _log_once(self.name, name)
            elif value is None:
                continue
            elif rule.kind is not None:
                if not rule.kind.accepts(value):
                    raise BadRequest(f"{name} must be {rule.kind.name}", name)
                values[name] = value
            elif value not in rule.harmless:
                allowed = "".join(f" (other than {default!r})" for default in rule.harmless)
                raise BadRequest(f"{name}{allowed} is not supported yet; leave it out", name)
        for name in self.required:
            if name not in values:
                raise BadRequest(f"{name} must be given: {self._kind(name).name}", name)
        return values


def as_strings(value: str | Sequence[str]) -> tuple[str, ...]:
    """`stop` as the APIs have it: one string, or several."""
    return (value,) if isinstance(value, str) else tuple(value)


def read_sampling(fields: Mapping[str, Any], names: Mapping[str, str], max_new_tokens: int | None) -> SamplingParams:
    """The sampling parameters among an API's fields.

    Args:
        fields: those that are set, of the right types.
        names: what the API calls ours.
        max_new_tokens: each API has its own default, and its own way to say "until the end".

    Raises:
        BadRequest: a value is out of its range; it has the API's name for the field.
    """
    given = {name: fields[theirs] for name in _PARAMS if (theirs := names.get(name, name)) in fields}
    given["max_new_tokens"] = max_new_tokens
    given["stop_token_ids"] = tuple(given.get("stop_token_ids", ()))
    given["logit_bias"] = tuple((int(token_id), float(bias)) for token_id, bias in given.get("logit_bias", {}).items())
    with renaming(names):
        return SamplingParams(**given)


@contextlib.contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """A BadRequest that is raised inside speaks of our fields by the names that the API has for them."""
    try:
        yield
    except BadRequest as error:
        message = str(error)
        for ours, theirs in names.items():
            message = re.sub(rf"\b{ours}\b", theirs, message)
        raise BadRequest(message, names.get(error.field or "", error.field)) from error


def read_text_options(fields: Mapping[str, Any]) -> TextOptions:
    """What becomes of the ids, among an API's fields. Raises BadRequest for stop strings that cannot be matched."""
    given = {name: fields[name] for name in _TEXT_OPTIONS if name in fields}
    for name in ("stop", "stop_regex"):
        if name in given:
            given[name] = as_strings(given[name])
    return TextOptions(**given)


def read_num_siblings(fields: Mapping[str, Any]) -> int:
    """`n`: generations for each prompt. Raises BadRequest if it is out of its range."""
    num: int = fields.get("n", 1)
    if not 1 <= num <= MAX_SIBLINGS:
        raise BadRequest(f"n must be in 1..{MAX_SIBLINGS}", "n")
    return num


@functools.lru_cache(maxsize=256)
def _log_once(api: str, name: str) -> None:
    logger.warning("field %r of %s has no effect", name[:80], api)
