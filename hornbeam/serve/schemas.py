"""JSON schemas of the answers, for the API's document. Answers are not checked against them on their way out."""

from typing import Any

from hornbeam.serve.fields import Schema

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}
ANYTHING: Schema = {}


def array(items: Schema) -> Schema:
    """A list of such values."""
    return {"type": "array", "items": items}


def nullable(schema: Schema) -> Schema:
    """Such a value, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def record(optional: tuple[str, ...] = (), /, **properties: Schema) -> Schema:
    """An object of these fields, and maybe more."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


def _either(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


_ERROR_FIELDS: dict[str, Any] = {
    "message": STRING,
    "type": STRING,
    "param": nullable(STRING),
    "code": _either(INTEGER, STRING),
}
ERROR = record(object={"const": "error"}, error=record(**_ERROR_FIELDS), **_ERROR_FIELDS)

_USAGE = record(
    prompt_tokens=INTEGER,
    completion_tokens=INTEGER,
    total_tokens=INTEGER,
    prompt_tokens_details=nullable(record(cached_tokens=INTEGER)),
)
_FINISH: dict[str, Schema] = {"finish_reason": nullable(STRING), "matched_stop": ANYTHING}
MODEL = record(id=STRING, object={"const": "model"}, created=INTEGER, owned_by=STRING, max_model_len=INTEGER)
MODELS = record(object={"const": "list"}, data=array(MODEL))
COMPLETION = record(
    id=STRING,
    object={"const": "text_completion"},
    created=INTEGER,
    model=STRING,
    choices=array(record(index=INTEGER, text=STRING, logprobs=nullable(OBJECT), **_FINISH)),
    usage=_USAGE,
)
CHAT_COMPLETION = record(
    id=STRING,
    object={"const": "chat.completion"},
    created=INTEGER,
    model=STRING,
    choices=array(
        record(
            index=INTEGER,
            message=record(role=STRING, content=nullable(STRING)),
            logprobs=nullable(OBJECT),
            **_FINISH,
        )
    ),
    usage=_USAGE,
)
_GENERATED = record(
    ("text", "prompt_token_ids"),
    text=STRING,
    output_ids=array(INTEGER),
    prompt_token_ids=array(INTEGER),
    meta_info=record(
        id=STRING,
        finish_reason=nullable(record(type=STRING)),
        prompt_tokens=INTEGER,
        completion_tokens=INTEGER,
        cached_tokens=INTEGER,
    ),
)
GENERATED = _either(_GENERATED, array(_GENERATED))
TOKENS = record(tokens=_either(array(INTEGER), array(array(INTEGER))), max_model_len=INTEGER)
TEXTS = record(text=_either(STRING, array(STRING)))
MODEL_INFO = record(model_path=STRING, tokenizer_path=STRING, is_generation=BOOLEAN)
SERVER_INFO = record(model_path=STRING, version=STRING, max_total_num_tokens=INTEGER, internal_states=array(OBJECT))
STATUS = record(message=STRING, status=STRING)
LOADS = record(timestamp=STRING, version=STRING, loads=array(record(dp_rank=INTEGER)))
LOAD = array(record(dp_rank=INTEGER, num_reqs=INTEGER, num_waiting_reqs=INTEGER, num_tokens=INTEGER))
