"""Every field of every API, once: honoured (and of which type), accepted without effect, or refused with 400.

A refused field may be sent with a value that asks for nothing. What is not listed is unknown; each API says what
happens to that.
"""

from collections.abc import Mapping
from typing import Any

from hornbeam.serve.fields import (
    ACTIVITIES,
    BIASES,
    BOOLEAN,
    COUNT,
    FILE_NAME,
    ID_LISTS,
    IDS,
    INTEGER,
    MESSAGES,
    NUMBER,
    OBJECT,
    PROMPT_IDS,
    PROMPTS,
    STEPS,
    STRING,
    STRINGS,
    Api,
    Kind,
    Rule,
    one_of,
)


def _honoured(**kinds: Kind) -> dict[str, Rule]:
    return {name: Rule(treatment="honoured", kind=kind) for name, kind in kinds.items()}


def _no_effect(*names: str) -> dict[str, Rule]:
    return {name: Rule(treatment="no effect") for name in names}


def _refused(*names: str, **harmless: Any) -> dict[str, Rule]:
    plain = {name: Rule(treatment="refused") for name in names}
    return plain | {name: Rule(treatment="refused", harmless=(value,)) for name, value in harmless.items()}


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
            sampling_params=SAMPLING.kind.or_list(),
            rid=STRING.or_list(),
            stream=BOOLEAN,
            return_logprob=BOOLEAN.or_list(),
            logprob_start_len=INTEGER.or_list(),
            top_logprobs_num=COUNT.or_list(),
            token_ids_logprob=ID_LISTS,
            return_text_in_logprobs=BOOLEAN,
            return_prompt_token_ids=BOOLEAN,
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
            require_reasoning=False,
        ),
    },
)

PAUSE = Api(
    name="/pause_generation",
    unknown="ignored",
    rules=_honoured(mode=one_of("in_place", "retract", "abort")),
)
RESUME = Api(name="/continue_generation", unknown="ignored", rules=_no_effect("torch_empty_cache"))
START_PROFILE = Api(
    name="/start_profile",
    unknown="ignored",
    rules={
        **_honoured(
            output_dir=STRING,
            num_steps=STEPS,
            activities=ACTIVITIES,
            with_stack=BOOLEAN,
            record_shapes=BOOLEAN,
            profile_prefix=FILE_NAME,
        ),
        **_refused("profile_stages", start_step=0, profile_by_stage=False, merge_profiles=False),
    },
)
ABORT = Api(name="/abort_request", unknown="ignored", rules=_honoured(rid=STRING, abort_all=BOOLEAN))

STREAM_OPTIONS = Api(
    name="stream_options",
    unknown="refused",
    rules=_honoured(include_usage=BOOLEAN, continuous_usage_stats=BOOLEAN),
)

_OPENAI: Mapping[str, Rule] = {  # of chats and texts alike
    **_honoured(
        model=STRING,
        max_tokens=INTEGER,
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
        stream_options=STREAM_OPTIONS.kind,
        rid=STRING,
        extra_key=STRING,
        cache_salt=STRING,
        priority=INTEGER,
        routing_key=STRING,
    ),
    **_no_effect("user", "metadata"),
    **_refused(
        *("json_schema", "regex", "ebnf", "lora_path", "session_params", "custom_params", "custom_logit_processor"),
        *("bootstrap_host", "bootstrap_port", "bootstrap_room", "routed_dp_rank"),
        response_format={"type": "text"},
        return_hidden_states=False,
        return_routed_experts=False,
        return_cached_tokens_details=False,
    ),
}

COMPLETION = Api(
    name="/v1/completions",
    unknown="refused",
    required=("prompt",),
    rules={
        **_OPENAI,
        **_honoured(prompt=PROMPTS, echo=BOOLEAN, logprobs=COUNT),
        **_refused(best_of=1, suffix="", use_beam_search=False),
    },
)

CHAT = Api(
    name="/v1/chat/completions",
    unknown="refused",
    required=("messages",),
    rules={
        **_OPENAI,
        **_honoured(
            messages=MESSAGES,
            max_completion_tokens=INTEGER,
            logprobs=BOOLEAN,
            top_logprobs=COUNT,
            continue_final_message=BOOLEAN,
            chat_template_kwargs=OBJECT,
        ),
        **_no_effect(
            *("store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity"),
            *("parallel_tool_calls", "separate_reasoning", "stream_reasoning", "reasoning_effort", "reasoning"),
        ),
        **_refused(
            *("function_call", "input_ids", "audio", "prediction", "web_search_options"),
            tools=[],
            functions=[],
            modalities=["text"],
            return_prompt_token_ids=False,
            return_meta_info=False,
        ),
        "tool_choice": Rule(treatment="refused", harmless=("none", "auto")),
    },
)

TOKENIZE = Api(
    name="/tokenize",
    unknown="ignored",
    rules={
        **_honoured(
            prompt=STRINGS,
            messages=MESSAGES,
            add_special_tokens=BOOLEAN,
            add_generation_prompt=BOOLEAN,
            continue_final_message=BOOLEAN,
            chat_template_kwargs=OBJECT,
        ),
        **_no_effect("model"),
        **_refused(tools=[]),
    },
)
DETOKENIZE = Api(
    name="/detokenize",
    unknown="ignored",
    required=("tokens",),
    rules={**_honoured(tokens=PROMPT_IDS, skip_special_tokens=BOOLEAN), **_no_effect("model")},
)
