"""From what the user set, the family prefers and the machine can do, to frozen options; every value with its reason.

Precedence: the user's flag, then the family's preference, then the platform's, then the flag's own default.
"""

import logging
from collections.abc import Mapping
from typing import Any

from hornbeam.config.components import (
    CacheOptions,
    EngineOptions,
    ExecutorOptions,
    LoopOptions,
    ModelOptions,
    Reason,
    SchedulerOptions,
    ServeOptions,
)
from hornbeam.config.environment import Environment, read_environment
from hornbeam.config.flags import FLAGS
from hornbeam.core.errors import ConfigError
from hornbeam.core.family import ModelConfig
from hornbeam.core.platform import PlatformFacts

logger = logging.getLogger(__name__)

_DTYPES = {"float": "float32", "half": "float16"}
_DEFAULTS = {flag.name: flag.default for flag in FLAGS}
_DEFAULT_GAP = _DEFAULTS["priority_scheduling_preemption_threshold"]
GRAPH_MAX_BATCH_SIZE = 256
# The executor takes those at which steps with prompts are launch-bound.
_SMALL_COUNTS = (*range(32, 193, 32), *range(256, 513, 64))
GRAPH_TOKEN_COUNTS = (*_SMALL_COUNTS, *range(640, 1025, 128), *range(1280, 2049, 256), *range(2560, 3073, 512))


class _Resolver:
    """Answers each question once and remembers why."""

    def __init__(self, sources: tuple[tuple[str, Mapping[str, Any]], ...]) -> None:
        self._sources = sources
        self.reasons: dict[str, Reason] = {}

    def pick(self, name: str, derived: Any = None, why: str = "") -> Any:
        """The first source's value for flag `name`; if none has one, `derived` because of `why`, else the default."""
        for source, values in self._sources:
            if values.get(name) not in (None, "auto"):
                return self.note(name, values[name], source)
        if derived is not None:
            return self.note(name, derived, why)
        return self.note(name, _DEFAULTS[name], "default")

    def note(self, name: str, value: Any, why: str) -> Any:
        self.reasons[name] = Reason(value=value, why=why)
        return value

    def tell(self) -> None:
        for name, reason in self.reasons.items():
            logger.info("%s = %s (%s)", name, reason.value, reason.why)


def resolve_engine(
    user: Mapping[str, Any],
    family_name: str,
    family_defaults: Mapping[str, Any],
    model: ModelConfig,
    platform: PlatformFacts,
) -> EngineOptions:
    """The engine's options. `user` comes from `check_flags`.

    Raises:
        ConfigError: a value that cannot work with this model or machine.
    """
    resolver = _Resolver((("flag", user), (f"family {family_name} prefers it", family_defaults)))
    pick, why = resolver.pick, f"suits {platform.device}"
    context_len = pick("context_length", model.context_len, "the model's own")
    if context_len > model.context_len:
        raise ConfigError(f"--context-length {context_len} exceeds the model's {model.context_len} positions")
    chunk = pick("chunked_prefill_size", platform.chunked_prefill_size, why)
    max_running = _positive(resolver, "max_running_requests", platform.max_running_requests, why)
    environment = read_environment()
    options = EngineOptions(
        model=ModelOptions(
            path=user.get("model_path"),
            load_format=pick("load_format", "auto", "by the files that are there"),
            dtype=_dtype(resolver, model, platform),
            quantization=_quantization(resolver, user),
            context_len=context_len,
            seed=pick("random_seed"),
        ),
        cache=CacheOptions(
            page_size=_positive(resolver, "page_size", platform.page_size, why),
            max_total_tokens=_max_total_tokens(resolver),
            memory_fraction=_memory_fraction(resolver, platform),
            radix=not pick("disable_radix_cache"),
            eviction_policy=pick("radix_eviction_policy"),
            window_ratio=_window_ratio(resolver),
        ),
        scheduler=SchedulerOptions(
            max_running_requests=max_running,
            max_queued_requests=pick("max_queued_requests"),
            chunked_prefill_size=chunk if chunk > 0 else context_len,
            seed=resolver.reasons["random_seed"].value,
            policy=pick("schedule_policy"),
            conservativeness=_conservativeness(resolver),
            priorities=pick("enable_priority_scheduling"),
            low_priority_first=pick("schedule_low_priority_values_first"),
            max_prefill_tokens=_positive(resolver, "max_prefill_tokens", _DEFAULTS["max_prefill_tokens"], "default"),
            mixes=not pick("disable_mixed_chunk"),
            preemption_gap=_preemption_gap(resolver),
            waiting_timeout=environment.waiting_timeout,
            running_timeout=environment.running_timeout,
        ),
        executor=_executor_options(resolver, platform, max_running),
        loop=_loop_options(resolver, environment),
        reasons=resolver.reasons,
    )
    for name in ("default_priority_value", "abort_on_priority_when_disabled"):
        pick(name)  # the server's business: it finds them among the engine's facts
    resolver.tell()
    return options


def _dtype(resolver: _Resolver, model: ModelConfig, platform: PlatformFacts) -> str:
    why = f"suits {platform.device}" if platform.dtype else "the checkpoint's own"
    dtype: str = resolver.pick("dtype", platform.dtype or model.dtype, why)
    return _DTYPES.get(dtype, dtype)


def _quantization(resolver: _Resolver, user: Mapping[str, Any]) -> str:
    """What is left to "auto" is chosen when the checkpoint is read."""
    exact = user.get("dtype") not in (None, "auto")
    derived = ("unquant", "--dtype says how to compute") if exact else ("auto", "as the checkpoint and the machine are")
    quantization: str = resolver.pick("quantization", *derived)
    return quantization


def _executor_options(resolver: _Resolver, platform: PlatformFacts, max_running: int) -> ExecutorOptions:
    pick = resolver.pick
    attention = pick("attention_backend", "auto", "the first that supports the model here")
    return ExecutorOptions(
        device=resolver.note("device", platform.name, f"suits {platform.device}"),
        decode_attention_backend=pick("decode_attention_backend", attention, "--attention-backend"),
        prefill_attention_backend=pick("prefill_attention_backend", attention, "--attention-backend"),
        fused_kernels=not pick("disable_fused_kernels"),
        cascade=not pick("disable_cascade_attention"),
        graph_batch_sizes=_graph_batch_sizes(resolver, platform, max_running),
        graph_token_counts=_graph_token_counts(resolver, platform),
        graph_padding=not pick("disable_cuda_graph_padding"),
        compile_up_to=_compile_up_to(resolver, platform),
    )


def _positive(resolver: _Resolver, name: str, derived: int, why: str) -> int:
    value: int = resolver.pick(name, derived, why)
    if value < 1:
        raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    return value


def _max_total_tokens(resolver: _Resolver) -> int | None:
    value: int | None = resolver.pick("max_total_tokens")
    if value is not None and value < 1:
        raise ConfigError(f"--max-total-tokens must be at least 1, not {value}")
    return value


def _memory_fraction(resolver: _Resolver, platform: PlatformFacts) -> float:
    value: float = resolver.pick("mem_fraction_static", platform.memory_fraction, f"suits {platform.device}")
    if not 0 < value <= 1:
        raise ConfigError(f"--mem-fraction-static must be above 0 and at most 1, not {value}")
    return value


def _conservativeness(resolver: _Resolver) -> float:
    value: float = resolver.pick("schedule_conservativeness")
    if not 0 <= value < float("inf"):
        raise ConfigError(f"--schedule-conservativeness must be at least 0 and finite, not {value}")
    return value


def _loop_options(resolver: _Resolver, environment: Environment) -> LoopOptions:
    watchdog_timeout: float = resolver.pick("watchdog_timeout")
    if not watchdog_timeout > 0:
        raise ConfigError(f"--watchdog-timeout must be above 0, not {watchdog_timeout}")
    return LoopOptions(
        overlap=not resolver.pick("disable_overlap_schedule"),
        watchdog_timeout=watchdog_timeout,
        strict_checks=environment.strict_checks,
        record=resolver.pick("record_schedule"),
    )


def _window_ratio(resolver: _Resolver) -> float | None:
    ratio: float | None = resolver.pick("swa_full_tokens_ratio")
    if ratio is not None and not 0 < ratio <= 1:
        raise ConfigError(f"--swa-full-tokens-ratio must be above 0 and at most 1, not {ratio}")
    return ratio


def _preemption_gap(resolver: _Resolver) -> int | None:
    gap = _positive(resolver, "priority_scheduling_preemption_threshold", _DEFAULT_GAP, "default")
    return None if resolver.pick("disable_priority_preemption") else gap


def _graph_batch_sizes(resolver: _Resolver, platform: PlatformFacts, max_running: int) -> tuple[int, ...]:
    if resolver.pick("disable_cuda_graph") or resolver.pick("disable_decode_cuda_graph") or not platform.graphs:
        return ()
    listed = resolver.pick("cuda_graph_bs")
    default = (max(listed), "the largest listed") if listed else (GRAPH_MAX_BATCH_SIZE, "default")
    most = resolver.pick("cuda_graph_max_bs", *default)
    steps = (1, 2, 4, 8, *range(16, 129, 8), *range(144, 257, 16), *range(288, most + 1, 32))
    sizes = listed or resolver.note("cuda_graph_bs", steps, "steps of 8, of 16 and of 32")
    largest = min(most, max_running)
    if min(*sizes, largest) < 1:
        raise ConfigError("--cuda-graph-bs and --cuda-graph-max-bs must be at least 1")
    return tuple(sorted({size for size in (*sizes, largest) if size <= largest}))


def _graph_token_counts(resolver: _Resolver, platform: PlatformFacts) -> tuple[int, ...]:
    disabled = resolver.pick("disable_cuda_graph") or resolver.pick("disable_prefill_cuda_graph")
    return () if disabled or not platform.graphs else GRAPH_TOKEN_COUNTS


def _compile_up_to(resolver: _Resolver, platform: PlatformFacts) -> int:
    if not resolver.pick("enable_torch_compile"):
        return 0
    if not platform.graphs or resolver.pick("disable_cuda_graph") or resolver.pick("disable_decode_cuda_graph"):
        raise ConfigError(
            "--enable-torch-compile compiles the decode steps that are recorded as graphs, and there are none here: "
            "drop it, or run on a GPU without --disable-cuda-graph"
        )
    return _positive(resolver, "torch_compile_max_bs", _DEFAULTS["torch_compile_max_bs"], "default")


def resolve_serve(user: Mapping[str, Any], default_model_name: str) -> ServeOptions:
    """The server process's options. Raises ConfigError for a value that cannot work."""
    resolver = _Resolver((("flag", user),))
    pick = resolver.pick
    if not 0 <= pick("port") < 65536:
        raise ConfigError(f"--port must be in 0..65535, not {pick('port')}")
    return ServeOptions(
        host=pick("host"),
        port=pick("port"),
        api_key=pick("api_key"),
        admin_api_key=pick("admin_api_key"),
        served_model_name=pick("served_model_name", user.get("model_path") or default_model_name, "the model path"),
        chat_template=pick("chat_template"),
        template_name=pick("hf_chat_template_name"),
        sampling_defaults=pick("sampling_defaults"),
        skip_tokenizer=pick("skip_tokenizer_init"),
        log_level=pick("log_level"),
        stream_interval=_positive(resolver, "stream_interval", 1, "default"),
        incremental_streaming=pick("incremental_streaming_output"),
        enable_metrics=pick("enable_metrics"),
    )
