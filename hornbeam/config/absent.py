"""Flags that SGLang knows and Hornbeam does not have yet: what each one asks for, and which flag comes nearest.

A value that asks for nothing new (`--tp-size 1`) is accepted, so that existing scripts run; any other is refused by
name. A flag that comes to exist moves to `flags.FLAGS`.
"""

from dataclasses import dataclass
from typing import Any

from hornbeam.core.errors import ConfigError

ALWAYS = "always"  # as a neutral value: whatever is asked for is so anyway


@dataclass(frozen=True, slots=True, kw_only=True)
class Absent:
    """`reason` says what does not exist; `nearest` are flags that do, comma-separated, or empty."""

    reason: str
    nearest: str
    neutral: Any  # the value that asks for nothing


_TABLE: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (
        "it is so in any case",
        "",
        {
            "enable_mixed_chunk": ALWAYS,
            "sleep_on_idle": ALWAYS,
            "skip_server_warmup": ALWAYS,
            "disable_custom_all_reduce": ALWAYS,
            "batch_notify_size": ALWAYS,
            "scheduler_recv_interval": ALWAYS,
        },
    ),
    (
        "a server uses one device; run one server per device",
        "device",
        {
            "tp_size": 1,
            "pp_size": 1,
            "dp_size": 1,
            "ep_size": 1,
            "attn_cp_size": 1,
            "enable_prefill_cp": False,
            "cp_strategy": None,
            "load_balance_method": "auto",
            "enable_dp_attention": False,
            "enable_dp_lm_head": False,
            "moe_dense_tp_size": None,
            "nnodes": 1,
            "node_rank": 0,
            "dist_init_addr": None,
            "nccl_port": None,
            "dist_timeout": None,
            "use_ray": False,
            "enable_symm_mem": False,
            "flashinfer_allreduce_fusion_backend": None,
            "base_gpu_id": 0,
            "gpu_id_step": 1,
        },
    ),
    (
        "there is one tokenizer and one detokenizer, inside the server process",
        "tokenizer_path",
        {"tokenizer_mode": "auto", "tokenizer_worker_num": 1, "detokenizer_worker_num": 1},
    ),
    ("loaders take no further settings", "load_format", {"model_loader_extra_config": "{}"}),
    ("downloads go where HORNBEAM_CACHE_DIR and HF_HOME say", "model_path", {"download_dir": None}),
    (
        "models generate text from text only",
        "model_path",
        {
            "is_embedding": False,
            "enable_multimodal": None,
            "mm_attention_backend": None,
            "limit_mm_data_per_request": None,
            "encoder_only": False,
            "language_only": False,
            "dllm_algorithm": None,
        },
    ),
    (
        "put a reverse proxy in front for TLS, HTTP/2 and prefixes",
        "host, port",
        {
            "fastapi_root_path": "",
            "ssl_keyfile": None,
            "ssl_certfile": None,
            "enable_ssl_refresh": False,
            "enable_http2": False,
            "grpc_mode": False,
        },
    ),
    ("weights have no version", "revision", {"weight_version": "default"}),
    ("there are no templates of completions", "chat_template", {"completion_template": None}),
    (
        "reasoning and tool calls are not parsed yet",
        "chat_template",
        {
            "reasoning_parser": None,
            "tool_call_parser": None,
            "enable_strict_thinking": False,
            "strip_thinking_cache": False,
            "tool_server": None,
        },
    ),
    (
        "there is no structured output yet",
        "chat_template",
        {"grammar_backend": None, "constrained_json_disable_any_whitespace": False},
    ),
    ("requests bring their own sampling parameters", "", {"preferred_sampling_params": None}),
    ("prompts that are too long are refused", "context_length", {"allow_auto_truncate": False}),
    ("kernels are compiled and graphs captured before the server is ready", "", {"warmups": None}),
    ("there are no sessions; shared prefixes are found by themselves", "", {"enable_streaming_session": False}),
    ("usage is told where a request asks for it", "", {"stream_response_default_include_usage": False}),
    (
        "weights run in the formats that docs/formats.md lists, with the kernels that are chosen for them",
        "dtype",
        {
            "kv_cache_dtype": "auto",
            "quantization_param_path": None,
            "enable_fp32_lm_head": False,
            "modelopt_quant": None,
            "torchao_config": "",
            "fp8_gemm_runner_backend": "auto",
            "fp4_gemm_runner_backend": "auto",
        },
    ),
    (
        "steps are planned one by one, within one budget of tokens",
        "chunked_prefill_size",
        {
            "enable_dynamic_chunking": False,
            "prefill_max_requests": None,
            "num_continuous_decode_steps": 1,
            "enable_prefill_delayer": False,
            "enable_two_batch_overlap": False,
            "enable_single_batch_overlap": False,
            "enable_pdmux": False,
        },
    ),
    (
        "there is one prefix cache",
        "disable_radix_cache, radix_eviction_policy",
        {"radix_cache_backend": None, "disable_hybrid_swa_memory": False},
    ),
    (
        "caches have no tiers in host memory or on disk yet",
        "mem_fraction_static, max_total_tokens",
        {
            "enable_hierarchical_cache": False,
            "hicache_ratio": 2.0,
            "hicache_size": 0,
            "hicache_write_policy": "write_through",
            "hicache_io_backend": "kernel",
            "hicache_mem_layout": "page_first",
            "hicache_storage_backend": None,
            "hicache_storage_prefetch_policy": "timeout",
            "hicache_storage_backend_extra_config": None,
            "enable_lmcache": False,
            "enable_hisparse": False,
            "hisparse_config": None,
            "kv_events_config": None,
        },
    ),
    (
        "weights stay on the device",
        "mem_fraction_static",
        {
            "cpu_offload_gb": 0,
            "kt_weight_path": None,
            "kt_method": "AMXINT4",
            "kt_num_gpu_experts": None,
            "kt_cpuinfer": None,
            "enable_memory_saver": False,
            "enable_weights_cpu_backup": False,
        },
    ),
    ("a stuck engine is told by /health", "", {"soft_watchdog_timeout": None}),
    (
        "kernels of this kind are not chosen by flag",
        "attention_backend",
        {
            "sampling_backend": None,
            "moe_runner_backend": "auto",
            "moe_a2a_backend": "none",
            "deepep_mode": "auto",
            "enable_deterministic_inference": False,
            "rl_on_policy_target": None,
        },
    ),
    (
        "graphs have no further settings",
        "cuda_graph_bs, cuda_graph_max_bs, disable_cuda_graph, disable_prefill_cuda_graph",
        {"cuda_graph_config": None, "cuda_graph_backend_prefill": "full"},
    ),
    (
        "there are no adapters yet; merge one into the weights",
        "model_path",
        {
            "enable_lora": None,
            "lora_paths": None,
            "max_lora_rank": None,
            "lora_target_modules": None,
            "max_loras_per_batch": 8,
            "max_loaded_loras": None,
            "lora_eviction_policy": "lru",
            "lora_backend": "csgmv",
            "lora_drain_wait_threshold": 0.0,
            "enable_lora_overlap_loading": None,
            "lora_strict_loading": False,
        },
    ),
    (
        "there is no speculative decoding yet",
        "",
        {
            "speculative_algorithm": None,
            "speculative_draft_model_path": None,
            "speculative_num_steps": None,
            "speculative_eagle_topk": None,
            "speculative_num_draft_tokens": None,
            "speculative_accept_threshold_single": 1.0,
            "speculative_accept_threshold_acc": 1.0,
            "speculative_use_rejection_sampling": False,
            "speculative_token_map": None,
            "speculative_attention_mode": "prefill",
            "speculative_adaptive": False,
            "speculative_ngram_max_trie_depth": 18,
        },
    ),
    (
        "experts are not spread over devices yet",
        "device",
        {
            "ep_num_redundant_experts": 0,
            "ep_dispatch_algorithm": None,
            "init_expert_location": "trivial",
            "enable_eplb": False,
            "eplb_algorithm": "auto",
            "eplb_rebalance_num_iterations": 1000,
            "expert_distribution_recorder_mode": None,
        },
    ),
    (
        "prompts and outputs are computed by one server",
        "chunked_prefill_size",
        {
            "disaggregation_mode": "null",
            "disaggregation_transfer_backend": "mooncake",
            "disaggregation_bootstrap_port": 8998,
            "disaggregation_ib_device": None,
            "num_reserved_decode_tokens": 512,
            "disaggregation_decode_enable_radix_cache": False,
        },
    ),
    (
        "this is not observed yet",
        "log_level",
        {
            "log_requests": False,
            "log_requests_level": 2,
            "log_requests_format": "text",
            "enable_metrics_for_all_schedulers": False,
            "decode_log_interval": 40,
            "bucket_time_to_first_token": None,
            "enable_trace": False,
            "otlp_traces_endpoint": "localhost:4317",
            "export_metrics_to_file": False,
            "enable_request_time_stats_logging": False,
            "crash_dump_folder": None,
        },
    ),
    (
        "answers hold text, ids and log probabilities only, and no code comes with requests",
        "",
        {
            "enable_custom_logit_processor": False,
            "enable_return_hidden_states": False,
            "enable_return_routed_experts": False,
            "enable_mis": False,
        },
    ),
    (
        "weights come from files and the hub",
        "model_path, load_format",
        {
            "remote_instance_weight_loader_backend": "nccl",
            "checkpoint_engine_wait_weights_before_ready": False,
        },
    ),
)
ABSENT: dict[str, Absent] = {
    name: Absent(reason=reason, nearest=nearest, neutral=neutral)
    for reason, nearest, flags in _TABLE
    for name, neutral in flags.items()
}


def refuse_absent(name: str, value: Any) -> None:
    """Nothing, if `value` asks for nothing new.

    Raises:
        ConfigError: it asks for something that does not exist; the message says what does.
    """
    absent = ABSENT[name]
    if absent.neutral == ALWAYS or str(value) == str(absent.neutral):
        return
    message = f"{dashed(name)} {value} is not supported: {absent.reason}"
    if absent.nearest:
        message += f". Nearest: {', '.join(dashed(flag) for flag in absent.nearest.split(', '))}"
    raise ConfigError(message)


def dashed(name: str) -> str:
    """As on the command line."""
    return f"--{name.replace('_', '-')}"
