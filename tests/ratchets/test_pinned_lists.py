"""What users, other processes and other folders can see. To add to a list, add to it here, in the same commit."""

import dataclasses
import importlib

import pytest
from source_tree import ROOT

import hornbeam
from hornbeam.config.absent import ABSENT
from hornbeam.config.environment import VARIABLES
from hornbeam.config.flags import FLAGS, GROUPS
from hornbeam.config.flags_page import flags_page

FLAG_NAMES = """
    abort_on_priority_when_disabled admin_api_key api_key attention_backend chat_template chunked_prefill_size
    context_length cuda_graph_bs cuda_graph_max_bs decode_attention_backend default_priority_value device
    disable_cascade_attention disable_cuda_graph disable_cuda_graph_padding disable_decode_cuda_graph
    disable_fused_kernels disable_mixed_chunk disable_overlap_schedule disable_prefill_cuda_graph
    disable_priority_preemption
    disable_radix_cache dtype enable_metrics enable_priority_scheduling enable_torch_compile hf_chat_template_name host
    incremental_streaming_output json_model_override_args load_format log_level max_prefill_tokens max_queued_requests
    max_running_requests max_total_tokens mem_fraction_static model_impl model_path page_size port
    prefill_attention_backend priority_scheduling_preemption_threshold quantization radix_eviction_policy random_seed
    record_schedule revision sampling_defaults schedule_conservativeness schedule_low_priority_values_first
    schedule_policy served_model_name skip_tokenizer_init stream_interval swa_full_tokens_ratio tokenizer_path
    torch_compile_max_bs trust_remote_code watchdog_timeout
"""
ENVIRONMENT_VARIABLES = """
    HORNBEAM_CACHE_DIR HORNBEAM_DISABLED_MODEL_ARCHS HORNBEAM_REQ_RUNNING_TIMEOUT HORNBEAM_REQ_WAITING_TIMEOUT
    HORNBEAM_STALE_LOCK_AGE_MINUTES HORNBEAM_STRICT_CHECKS
"""
PUBLIC_NAMES = "Engine __version__"

FIELDS = {
    "hornbeam.core.plan:StepPlan": """
        chunks collect decode decode_lens drafts grants idle padded_tokens page_moves shared starts step_id
        weight_version
    """,
    "hornbeam.core.plan:SharedPrefix": "num_tokens rows",
    "hornbeam.core.plan:StepResult": "error input_logprobs logprobs step_id token_ids",
    "hornbeam.core.plan:Chunk": "embed_spans first_scored samples scored_ids slot start token_ids",
    "hornbeam.core.plan:SlotStart": """
        adapter_slot banned_ids banned_until generated_ids logprobs num_cached prompt_ids sampling seed slot
    """,
    "hornbeam.core.plan:PageGrant": "first group page_ids slot",
    "hornbeam.core.cache_spec:CacheSpec": """
        dtype kind layers reuse_granularity row_shapes sharding snapshot tokens_per_row window
    """,
    "hornbeam.core.request:Request": """
        adapter logprobs namespace priority prompt_ids rid routing_key sampling streamed told_each_step
    """,
    "hornbeam.core.request:SamplingParams": """
        frequency_penalty ignore_eos logit_bias max_new_tokens min_new_tokens min_p presence_penalty
        repetition_penalty seed stop_token_ids temperature top_k top_p
    """,
}
TORCH_FIELDS = {
    "hornbeam.layers.forward:Forward": """
        adapters caches collect_layers groups input_embeds num_decode padding prefills_all wanted
    """,
    "hornbeam.layers.forward:GroupForward": "decode prefill rows",
}


def fields_of(target: str) -> list[str]:
    module, _, name = target.partition(":")
    return sorted(field.name for field in dataclasses.fields(getattr(importlib.import_module(module), name)))


@pytest.mark.pure
def test_flags() -> None:
    assert sorted(flag.name for flag in FLAGS) == FLAG_NAMES.split()


@pytest.mark.pure
def test_a_flag_exists_or_does_not() -> None:
    names = {name for flag in FLAGS for name in (flag.name, *flag.aliases)}
    assert sorted(names.intersection(ABSENT)) == [], "take these, which exist now, out of config/absent.py"
    nearest = {name for absent in ABSENT.values() for name in absent.nearest.split(", ") if name}
    assert nearest <= names
    assert {flag.group for flag in FLAGS} == GROUPS.keys()


@pytest.mark.pure
def test_the_page_of_flags_is_current() -> None:
    assert (ROOT / "docs/flags.md").read_text("utf-8") == flags_page(), "run: make docs"


@pytest.mark.pure
def test_environment_variables() -> None:
    assert sorted(VARIABLES) == ENVIRONMENT_VARIABLES.split()


@pytest.mark.pure
def test_public_names() -> None:
    assert sorted(hornbeam.__all__) == PUBLIC_NAMES.split()
    for name in hornbeam.__all__:
        assert getattr(hornbeam, name) is not None
    with pytest.raises(AttributeError):
        _ = hornbeam.SomethingElse


@pytest.mark.pure
@pytest.mark.parametrize("target", FIELDS)
def test_fields_of_contracts(target: str) -> None:
    assert fields_of(target) == FIELDS[target].split()


@pytest.mark.cpu
@pytest.mark.parametrize("target", TORCH_FIELDS)
def test_fields_of_forward(target: str) -> None:
    assert fields_of(target) == TORCH_FIELDS[target].split()
