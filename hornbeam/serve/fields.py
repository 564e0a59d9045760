"""Every field of every API, once: honoured (and of which type), accepted without effect, or refused with 400.

A refused field may be sent with a value that asks for nothing. What is not listed is unknown; each API says what
happens to that. The fields that all generating APIs share become sampling parameters and text options here, too.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
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


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of JSON values."""

    name: str  # "an integer"
    accepts: Callable[[Any], bool]

    def or_list(self) -> "Kind":
        """The same, or a list of it with one value for each prompt of a batch."""
        return Kind(
            f"{self.name} or a list of such, one per prompt",
            lambda value: all(map(self.accepts, value)) if isinstance(value, list) else self.accepts(value),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What happens to one field. `null` is always the same as leaving the field out."""

    treatment: Literal["honoured", "no effect", "refused"]
    kind: Kind | None = None  # of an honoured field
    harmless: tuple[Any, ...] = ()  # values of a refused field that ask for nothing


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


BOOLEAN = Kind("a boolean", lambda value: isinstance(value, bool))
INTEGER = Kind("an integer", _is_int)
COUNT = Kind("an integer of at least 0", lambda value: _is_int(value) and value >= 0)
NUMBER = Kind("a number", lambda value: isinstance(value, float) or _is_int(value))
STRING = Kind("a string", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
IDS = Kind("a list of integers", lambda value: isinstance(value, list) and all(map(_is_int, value)))
STRINGS = Kind(
    "a string or a list of strings",
    lambda value: isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value)),
)
PROMPT_IDS = Kind(
    "a list of integers, or a list of such lists",
    lambda value: isinstance(value, list) and (all(map(_is_int, value)) or all(map(IDS.accepts, value))),
)
ID_LISTS = Kind("a list of integers, or one such list per prompt", PROMPT_IDS.accepts)
BIASES = Kind(
    "an object of numbers by token id",
    lambda value: (
        isinstance(value, dict)
        and all(key.isascii() and key.isdigit() and len(key) < 19 for key in value)
        and all(map(NUMBER.accepts, value.values()))
    ),
)
MESSAGES = Kind(
    "a list of at least one message with a role",
    lambda value: (
        bool(value)
        and isinstance(value, list)
        and all(isinstance(item, dict) and isinstance(item.get("role"), str) for item in value)
    ),
)


def _honoured(**kinds: Kind) -> dict[str, Rule]:
    return {name: Rule(treatment="honoured", kind=kind) for name, kind in kinds.items()}


def _no_effect(*names: str) -> dict[str, Rule]:
    return {name: Rule(treatment="no effect") for name in names}


def _refused(*names: str, **harmless: Any) -> dict[str, Rule]:
    plain = {name: Rule(treatment="refused") for name in names}
    return plain | {name: Rule(treatment="refused", harmless=(value,)) for name, value in harmless.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """The fields of one kind of JSON object."""

    name: str  # for messages: what the fields belong to
    unknown: Literal["ignored", "refused"]
    rules: Mapping[str, Rule] = field(default_factory=dict)

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
    try:
        return SamplingParams(**given)
    except BadRequest as error:
        message = str(error)
        for ours, theirs in names.items():
            message = message.replace(ours, theirs)
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


SAMPLING = Api(
    name="sampling_params",
    unknown="refused",
    rules={
        **_honoured(
            max_new_tokens=INTEGER,
            temperature=NUMBER,
            top_k=INTEGER,
            top_p=NUMBER,
            sampling_seed=INTEGER,
            stop=STRINGS,
            stop_regex=STRINGS,
            n=INTEGER,
            min_p=NUMBER,
            frequency_penalty=NUMBER,
            presence_penalty=NUMBER,
            repetition_penalty=NUMBER,
            logit_bias=BIASES,
            min_new_tokens=INTEGER,
            stop_token_ids=IDS,
            ignore_eos=BOOLEAN,
            skip_special_tokens=BOOLEAN,
            spaces_between_special_tokens=BOOLEAN,
            no_stop_trim=BOOLEAN,
            stream_interval=INTEGER,
        ),
        **_refused("json_schema", "regex", "ebnf", "structural_tag", "custom_params"),
    },
)

GENERATE = Api(
    name="/generate",
    unknown="ignored",
    rules={
        **_honoured(
            text=STRINGS,
            input_ids=PROMPT_IDS,
            sampling_params=OBJECT.or_list(),
            rid=STRING.or_list(),
            stream=BOOLEAN,
            return_logprob=BOOLEAN.or_list(),
            logprob_start_len=INTEGER.or_list(),
            top_logprobs_num=COUNT.or_list(),
            token_ids_logprob=ID_LISTS,
            return_text_in_logprobs=BOOLEAN,
            extra_key=STRING.or_list(),
            priority=INTEGER.or_list(),
            routing_key=STRING.or_list(),
        ),
        **_no_effect(
            *("stream_options", "parallel_batch", "log_metrics", "no_logs", "custom_labels", "conversation_id"),
            *("background", "modalities"),
        ),
        **_refused(
            *("input_embeds", "image_data", "video_data", "audio_data", "lora_path"),
            *("session_params", "custom_logit_processor", "bootstrap_host", "bootstrap_port"),
            *("bootstrap_room", "routed_dp_rank", "disagg_prefill_dp_rank"),
            return_hidden_states=False,
            return_routed_experts=False,
            return_indexer_topk=False,
            return_entropy=False,
            return_prompt_token_ids=False,
            require_reasoning=False,
        ),
    },
)

PAUSE = Api(
    name="/pause_generation",
    unknown="ignored",
    rules=_honoured(mode=Kind("in_place, retract or abort", ("in_place", "retract", "abort").__contains__)),
)
RESUME = Api(name="/continue_generation", unknown="ignored", rules=_no_effect("torch_empty_cache"))
ABORT = Api(name="/abort_request", unknown="ignored", rules=_honoured(rid=STRING, abort_all=BOOLEAN))

STREAM_OPTIONS = Api(
    name="stream_options",
    unknown="refused",
    rules=_honoured(include_usage=BOOLEAN, continuous_usage_stats=BOOLEAN),
)

CHAT = Api(
    name="/v1/chat/completions",
    unknown="refused",
    rules={
        **_honoured(
            model=STRING,
            messages=MESSAGES,
            max_tokens=INTEGER,
            max_completion_tokens=INTEGER,
            temperature=NUMBER,
            top_p=NUMBER,
            top_k=INTEGER,
            seed=INTEGER,
            stop=STRINGS,
            stop_regex=STRINGS,
            n=INTEGER,
            min_p=NUMBER,
            frequency_penalty=NUMBER,
            presence_penalty=NUMBER,
            repetition_penalty=NUMBER,
            logit_bias=BIASES,
            min_tokens=INTEGER,
            stop_token_ids=IDS,
            ignore_eos=BOOLEAN,
            skip_special_tokens=BOOLEAN,
            no_stop_trim=BOOLEAN,
            stream=BOOLEAN,
            stream_options=OBJECT,
            logprobs=BOOLEAN,
            top_logprobs=COUNT,
            continue_final_message=BOOLEAN,
            chat_template_kwargs=OBJECT,
            rid=STRING,
            extra_key=STRING,
            cache_salt=STRING,
            priority=INTEGER,
            routing_key=STRING,
        ),
        **_no_effect(
            *("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity"),
            *("parallel_tool_calls", "separate_reasoning", "stream_reasoning", "reasoning_effort", "reasoning"),
        ),
        **_refused(
            *("function_call", "input_ids", "json_schema", "regex", "ebnf", "lora_path", "audio"),
            *("session_params", "custom_params", "custom_logit_processor", "prediction"),
            *("web_search_options", "bootstrap_host", "bootstrap_port", "bootstrap_room", "routed_dp_rank"),
            tools=[],
            functions=[],
            modalities=["text"],
            response_format={"type": "text"},
            return_hidden_states=False,
            return_routed_experts=False,
            return_prompt_token_ids=False,
            return_meta_info=False,
            return_cached_tokens_details=False,
        ),
        "tool_choice": Rule(treatment="refused", harmless=("none", "auto")),
    },
)
