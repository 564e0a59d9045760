"""The frozen configuration of each component. Each part of Hornbeam sees only its own."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which checkpoint, and how it is read."""

    path: str | None  # None: the embedded default
    load_format: str
    dtype: str  # "float32", "bfloat16", "float16"
    quantization: str  # how products keep their weights: "fp8", "grouped_int8", "unquant": as loaded, or "auto"
    context_len: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """The key-value pool. One of `max_total_tokens` and `memory_fraction` sizes it."""

    page_size: int
    max_total_tokens: int | None
    memory_fraction: float  # of the device's memory, weights included
    radix: bool
    eviction_policy: str = "lru"  # "lfu", "slru", "priority"
    window_ratio: float | None = None  # pages of windowed groups per page of the others; None: what they can use


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOptions:
    """Queue, admission and chunking."""

    max_running_requests: int
    max_queued_requests: int | None
    chunked_prefill_size: int  # tokens of prompts per step
    seed: int  # of the requests that bring none
    policy: str = "fcfs"  # "lpm", "dfs-weight", "lof", "routing-key", "random"
    conservativeness: float = 1.0  # scales what is kept free for tokens to come
    priorities: bool = False  # requests' priorities count
    low_priority_first: bool = False  # the smaller number is the higher priority
    waiting_timeout: float | None = None  # seconds
    running_timeout: float | None = None
    max_prefill_tokens: int = 16384  # a step that has so many prompt tokens begins no further prompt
    mixes: bool = True  # running requests go on in steps with prompts
    preemption_gap: int | None = 10  # running requests give way to those that are so much higher; None: to nobody


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorOptions:
    """The device and how steps run on it."""

    device: str  # "cpu", "cuda"
    decode_attention_backend: str
    prefill_attention_backend: str
    fused_kernels: bool  # else norms, activations, rotations and products are plain torch's
    cascade: bool  # decode reads prefixes that rows share once for all of them, where that pays
    graph_batch_sizes: tuple[int, ...]  # decode batches captured as graphs, ascending; empty: none
    graph_token_counts: tuple[int, ...]  # likewise, of steps with prompts
    graph_padding: bool  # graphs serve smaller steps, too
    compile_up_to: int  # the largest recorded decode batch that torch compiles first; 0: none


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopOptions:
    """The engine's step loop."""

    overlap: bool = True  # plan and launch a step while the one before it runs
    watchdog_timeout: float = 300.0  # seconds after which a step, or the loop itself, counts as stuck
    strict_checks: bool = False  # an error in the books ends the engine
    record: str | None = None  # file that takes what the scheduler is told and plans


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """The HTTP side, and how text is made of ids."""

    host: str
    port: int
    api_key: str | None
    admin_api_key: str | None
    served_model_name: str
    chat_template: str | None
    template_name: str | None  # of the model's own templates
    sampling_defaults: str  # "model", "openai"
    skip_tokenizer: bool  # ids in, ids out
    log_level: str
    stream_interval: int
    incremental_streaming: bool
    enable_metrics: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """A resolved value and why it is so."""

    value: Any
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What an engine process is made of, and for each value why it is so."""

    model: ModelOptions
    cache: CacheOptions
    scheduler: SchedulerOptions
    executor: ExecutorOptions
    loop: LoopOptions
    reasons: dict[str, Reason]  # flag name -> value and why
