"""Every flag, once: name, type, help. The command line and `Engine(**kwargs)` share the table.

Names, aliases and meanings follow SGLang's where the feature is the same, so that scripts keep working.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hornbeam.config.absent import ABSENT, dashed, refuse_absent
from hornbeam.core.errors import ConfigError

GROUPS = {  # in the order in which help shows them
    "model": "Which model is served, and how it is read.",
    "server": "The HTTP side.",
    "memory": "The key-value cache and its prefixes.",
    "scheduling": "Which requests run, and how many at once.",
    "device": "Where and by which kernels.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One user-settable value. `default` is for people: "auto" means that `resolve` decides and says why."""

    name: str  # as a Python keyword: page_size is --page-size
    group: str
    help: str
    type: type = str
    default: Any = None
    choices: tuple[Any, ...] = ()
    aliases: tuple[str, ...] = ()
    many: bool = False  # takes several values


FLAGS: tuple[Flag, ...] = (
    Flag(
        name="model_path",
        group="model",
        aliases=("model",),
        help="Folder with config.json and weights, a GGUF file, or a hub id. Default: a small chat model.",
    ),
    Flag(
        name="load_format",
        group="model",
        default="auto",
        choices=("auto", "safetensors", "pt", "gguf", "dummy"),
        help="How weights are read; pt: PyTorch's *.bin files; dummy draws random ones from config.json alone.",
    ),
    Flag(
        name="model_impl",
        group="model",
        default="auto",
        choices=("auto", "hornbeam", "transformers"),
        help="Whose modules run the model; auto: transformers' for those that Hornbeam does not implement.",
    ),
    Flag(name="revision", group="model", help="Branch, tag or commit on the hub. Default: the main branch."),
    Flag(name="tokenizer_path", group="model", help="As --model-path, if the tokenizer lies elsewhere."),
    Flag(
        name="json_model_override_args",
        group="model",
        help="JSON object whose entries replace those of the model's config.json.",
    ),
    Flag(
        name="trust_remote_code",
        group="model",
        type=bool,
        default=False,
        help="Run the modeling code that a checkpoint brings, by transformers' modules, where no family serves it.",
    ),
    Flag(
        name="dtype",
        group="model",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16", "float", "half"),
        help="Of weights and activations. auto: float32 on CPUs, the checkpoint's own on GPUs.",
    ),
    Flag(
        name="quantization",
        group="model",
        default="auto",
        choices=("auto", "unquant", "fp8", "grouped_int8"),
        help="Of products. fp8: eight-bit floats in blocks, rounded as they are loaded (a model that has such weights "
        "needs no flag). grouped_int8, on CPUs: weights of four or eight bits and activations of eight, in groups of "
        "32. auto: that for weights which are integers in their file, where it is fast and --dtype is not set.",
    ),
    Flag(name="context_length", group="model", type=int, help="Tokens of prompt and output together, at most."),
    Flag(
        name="skip_tokenizer_init",
        group="model",
        type=bool,
        default=False,
        help="Token ids in, token ids out: load no tokenizer.",
    ),
    Flag(
        name="chat_template",
        group="model",
        help="File with a Jinja chat template (or JSON that holds one), in place of the model's own.",
    ),
    Flag(name="hf_chat_template_name", group="model", help="Which of the model's own chat templates to use."),
    Flag(
        name="sampling_defaults",
        group="server",
        default="model",
        choices=("model", "openai"),
        help="Where chat completions take what requests leave out: the model's generation_config.json, or the API.",
    ),
    Flag(name="random_seed", group="model", type=int, default=0, help="Of dummy weights and unseeded sampling."),
    Flag(name="host", group="server", default="127.0.0.1", help="Address to listen on."),
    Flag(name="port", group="server", type=int, default=30000, help="Port to listen on; 0 takes a free one."),
    Flag(name="api_key", group="server", help="Bearer key that requests must carry."),
    Flag(name="admin_api_key", group="server", help="Bearer key for admin requests such as /flush_cache."),
    Flag(name="served_model_name", group="server", help="Name in /v1/models. Default: the model path."),
    Flag(
        name="log_level",
        group="server",
        default="info",
        choices=("debug", "info", "warning", "error"),
        help="Least severe message to log.",
    ),
    Flag(name="stream_interval", group="server", type=int, default=1, help="Tokens between two stream chunks."),
    Flag(
        name="incremental_streaming_output",
        group="server",
        aliases=("stream_output",),
        type=bool,
        default=False,
        help="Streams of /generate carry only what is new, not all so far.",
    ),
    Flag(
        name="enable_metrics",
        group="server",
        type=bool,
        default=False,
        help="Serve metrics for Prometheus at /metrics.",
    ),
    Flag(name="page_size", group="memory", type=int, help="Tokens per page of the key-value cache."),
    Flag(name="max_total_tokens", group="memory", type=int, help="Size of the key-value cache in tokens."),
    Flag(
        name="mem_fraction_static",
        group="memory",
        type=float,
        help="Share of the device's memory for weights and key-value cache.",
    ),
    Flag(
        name="swa_full_tokens_ratio",
        group="memory",
        type=float,
        help="Tokens kept by layers with a sliding window, per token kept by the others. Default: what they can use.",
    ),
    Flag(name="disable_radix_cache", group="memory", type=bool, default=False, help="Do not reuse prefixes."),
    Flag(
        name="radix_eviction_policy",
        group="memory",
        default="lru",
        choices=("lru", "lfu", "slru", "priority"),
        help="Which unused prefix goes first: least recently or least often used, used once, of least priority.",
    ),
    Flag(name="max_running_requests", group="scheduling", type=int, help="Requests that run at once."),
    Flag(name="max_queued_requests", group="scheduling", type=int, help="Waiting requests before 503 is answered."),
    Flag(
        name="chunked_prefill_size",
        group="scheduling",
        type=int,
        help="Prompt tokens per step; -1: as many as the context is long.",
    ),
    Flag(
        name="max_prefill_tokens",
        group="scheduling",
        type=int,
        default=16384,
        help="A step that has so many prompt tokens begins no further prompt.",
    ),
    Flag(
        name="schedule_policy",
        group="scheduling",
        default="fcfs",
        choices=("fcfs", "lpm", "dfs-weight", "lof", "routing-key", "random"),
        help="Who is next: first come, longest cached prefix, heaviest branch of the cache, longest output, the "
        "routing key that most running requests have, chance.",
    ),
    Flag(
        name="schedule_conservativeness",
        group="scheduling",
        type=float,
        default=1.0,
        help="Scales the room kept for tokens to come; more means fewer retractions and smaller batches.",
    ),
    Flag(
        name="enable_priority_scheduling",
        group="scheduling",
        type=bool,
        default=False,
        help="Requests with a higher priority go first, whatever the policy.",
    ),
    Flag(
        name="schedule_low_priority_values_first",
        group="scheduling",
        type=bool,
        default=False,
        help="The smaller number is the higher priority.",
    ),
    Flag(
        name="default_priority_value",
        group="scheduling",
        type=int,
        default=0,
        help="Priority of requests that bring none.",
    ),
    Flag(
        name="abort_on_priority_when_disabled",
        group="scheduling",
        type=bool,
        default=False,
        help="Refuse requests with a priority if priorities do not count, rather than ignore it.",
    ),
    Flag(
        name="priority_scheduling_preemption_threshold",
        group="scheduling",
        type=int,
        default=10,
        help="A running request gives way to a waiting one whose priority is higher by so much.",
    ),
    Flag(
        name="disable_priority_preemption",
        group="scheduling",
        type=bool,
        default=False,
        help="A running request gives way to nobody.",
    ),
    Flag(
        name="watchdog_timeout",
        group="scheduling",
        type=float,
        default=300.0,
        help="Seconds after which an engine that is stuck in a step is ended, with its threads' stacks in the log.",
    ),
    Flag(
        name="record_schedule",
        group="scheduling",
        help="File that takes every request, step and result, prompts included, as JSON lines, for hornbeam bench "
        "replay and simulate.",
    ),
    Flag(
        name="disable_overlap_schedule",
        group="scheduling",
        type=bool,
        default=False,
        help="Wait for each step before the next is planned.",
    ),
    Flag(
        name="disable_mixed_chunk",
        group="scheduling",
        type=bool,
        default=False,
        help="Give prompts steps of their own, in which running requests wait.",
    ),
    Flag(name="device", group="device", default="auto", choices=("auto", "cpu", "cuda"), help="Where the model runs."),
    Flag(
        name="attention_backend",
        group="device",
        default="auto",
        help="triton, flashinfer, native, cpu or reference; auto: the first one that serves the model here.",
    ),
    Flag(name="decode_attention_backend", group="device", help="The same, for decode steps only."),
    Flag(name="prefill_attention_backend", group="device", help="The same, for prompts only."),
    Flag(
        name="disable_cascade_attention",
        group="device",
        type=bool,
        default=False,
        help="Read a prefix that running requests share once for each of them.",
    ),
    Flag(
        name="disable_fused_kernels",
        group="device",
        type=bool,
        default=False,
        help="Norms, activations, rotations and products by plain torch.",
    ),
    Flag(
        name="disable_cuda_graph",
        group="device",
        type=bool,
        default=False,
        help="Launch all kernels one by one.",
    ),
    Flag(
        name="disable_decode_cuda_graph",
        group="device",
        type=bool,
        default=False,
        help="Launch the kernels of decode steps one by one.",
    ),
    Flag(
        name="disable_prefill_cuda_graph",
        group="device",
        type=bool,
        default=False,
        help="Launch the kernels of small steps with prompts one by one.",
    ),
    Flag(
        name="disable_cuda_graph_padding",
        group="device",
        type=bool,
        default=False,
        help="Replay CUDA graphs for steps of exactly their size alone.",
    ),
    Flag(
        name="cuda_graph_bs",
        group="device",
        aliases=("cuda_graph_bs_decode",),
        type=int,
        many=True,
        help="Decode batch sizes to capture as CUDA graphs.",
    ),
    Flag(
        name="cuda_graph_max_bs",
        group="device",
        aliases=("cuda_graph_max_bs_decode",),
        type=int,
        help="Largest decode batch captured as a CUDA graph.",
    ),
    Flag(
        name="enable_torch_compile",
        group="device",
        type=bool,
        default=False,
        help="Have torch compile what is plain torch in captured decode steps. Makes the start longer.",
    ),
    Flag(
        name="torch_compile_max_bs",
        group="device",
        type=int,
        default=32,
        help="Largest decode batch that is compiled.",
    ),
)

_BY_NAME = {name: flag for flag in FLAGS for name in (flag.name, *flag.aliases)}


def check_flags(values: Mapping[str, Any]) -> dict[str, Any]:
    """The user's values by canonical name, None dropped.

    Raises:
        ConfigError: an unknown name, a wrong type or a value that is not among the choices.
    """
    checked: dict[str, Any] = {}
    for name, value in values.items():
        flag = _BY_NAME.get(name)
        if value is None:
            continue
        if flag is None and name in ABSENT:
            refuse_absent(name, value)
            continue
        if flag is None:
            raise ConfigError(f"unknown option {name!r}{nearest(name, _BY_NAME)}; docs/flags.md lists all")
        accepted: tuple[type, ...] = (int, float) if flag.type is float else (flag.type,)
        items = value if flag.many and isinstance(value, (list, tuple)) else (value,)
        for item in items:
            if not isinstance(item, accepted) or (isinstance(item, bool) and flag.type is not bool):
                raise ConfigError(f"{name} takes {flag.type.__name__}, not {item!r}")
            if flag.choices and item not in flag.choices:
                raise ConfigError(f"{name} must be one of {', '.join(map(str, flag.choices))}, not {item!r}")
        checked[flag.name] = tuple(items) if flag.many else value
    return checked


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint for whoever mistyped: the flag that looks most like `name`, or nothing."""
    found = difflib.get_close_matches(name, names, n=1)
    return f" (is {dashed(found[0])} meant?)" if found else ""
