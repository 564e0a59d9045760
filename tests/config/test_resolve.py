"""Options: who wins, why, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from hornbeam.cache.pages import EVICTION_ORDERS
from hornbeam.config.components import EngineOptions
from hornbeam.config.environment import read_environment
from hornbeam.config.flags import FLAGS, check_flags
from hornbeam.config.resolve import resolve_engine, resolve_serve
from hornbeam.core.errors import ConfigError
from hornbeam.core.family import ModelConfig
from hornbeam.core.platform import PlatformFacts

pytestmark = pytest.mark.pure

MODEL = ModelConfig(
    architecture="Some",
    num_layers=2,
    hidden_size=8,
    vocab_size=16,
    context_len=4096,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    dtype="bfloat16",
)
CPU = PlatformFacts(
    name="cpu",
    device="CPU",
    dtype="float32",
    page_size=16,
    chunked_prefill_size=512,
    max_running_requests=64,
    memory_fraction=0.4,
    graphs=False,
)
GPU = PlatformFacts(
    name="cuda",
    device="GPU",
    dtype=None,
    page_size=16,
    chunked_prefill_size=8192,
    max_running_requests=256,
    memory_fraction=0.88,
    graphs=True,
)


def resolve(platform: PlatformFacts = CPU, family: dict[str, Any] | None = None, **user: Any) -> EngineOptions:
    return resolve_engine(check_flags(user), "fam", family or {}, MODEL, platform)


def test_every_value_has_a_reason() -> None:
    options = resolve()
    assert options.reasons["dtype"].value == "float32"
    assert options.reasons["dtype"].why == "suits CPU"
    assert resolve(GPU).reasons["dtype"].value == "bfloat16"
    assert resolve(GPU).reasons["dtype"].why == "the checkpoint's own"
    assert options.reasons["disable_radix_cache"].why == "default"


def test_the_user_wins_over_the_family_and_the_family_over_the_platform() -> None:
    assert resolve(family={"page_size": 64}).cache.page_size == 64
    assert "family fam" in resolve(family={"page_size": 64}).reasons["page_size"].why
    options = resolve(family={"page_size": 64}, page_size=1)
    assert options.cache.page_size == 1
    assert options.reasons["page_size"].why == "flag"


def test_auto_means_not_set() -> None:
    assert resolve(dtype="auto").model.dtype == "float32"
    assert resolve(dtype="half").model.dtype == "float16"


def test_chunked_prefill_off_takes_whole_prompts() -> None:
    assert resolve(chunked_prefill_size=-1).scheduler.chunked_prefill_size == 4096


def test_eviction_policies_are_those_of_the_tree() -> None:
    policies = next(flag for flag in FLAGS if flag.name == "radix_eviction_policy").choices
    assert set(policies) == set(EVICTION_ORDERS)
    assert resolve().cache.eviction_policy == "lru"
    assert resolve(radix_eviction_policy="slru").cache.eviction_policy == "slru"


def test_graph_sizes() -> None:
    assert resolve(CPU).executor.graph_batch_sizes == ()
    assert resolve(GPU, disable_cuda_graph=True).executor.graph_batch_sizes == ()
    assert resolve(GPU).executor.graph_batch_sizes[-1] == 256
    assert resolve(GPU, cuda_graph_bs=[4, 1], cuda_graph_max_bs=6).executor.graph_batch_sizes == (1, 4, 6)
    assert resolve(GPU, max_running_requests=10).executor.graph_batch_sizes == (1, 2, 4, 8, 10)
    assert resolve(GPU, max_running_requests=10).reasons["cuda_graph_max_bs"].value == 256
    large = resolve(GPU, cuda_graph_max_bs=512, max_running_requests=400).executor.graph_batch_sizes
    assert large[-4:] == (320, 352, 384, 400)


@pytest.mark.parametrize("user", [{"cuda_graph_bs": [0, 4]}, {"cuda_graph_max_bs": 0}])
def test_graphs_of_nothing_are_refused(user: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--cuda-graph-bs and --cuda-graph-max-bs must be at least 1"):
        resolve(GPU, **user)


def test_compiling_needs_graphs() -> None:
    assert resolve(GPU).executor.compile_up_to == 0
    assert resolve(GPU, enable_torch_compile=True).executor.compile_up_to == 32
    assert resolve(GPU, enable_torch_compile=True, torch_compile_max_bs=4).executor.compile_up_to == 4
    for platform, user in ((CPU, {}), (GPU, {"disable_cuda_graph": True}), (GPU, {"disable_decode_cuda_graph": True})):
        with pytest.raises(ConfigError, match="--enable-torch-compile compiles the decode steps that are recorded"):
            resolve(platform, enable_torch_compile=True, **user)


def test_which_steps_have_graphs() -> None:
    assert resolve(GPU).executor.graph_token_counts[-1] == 3072
    assert resolve(CPU).executor.graph_token_counts == ()
    assert resolve(GPU, disable_cuda_graph=True).executor.graph_token_counts == ()
    without_decode = resolve(GPU, disable_decode_cuda_graph=True).executor
    assert without_decode.graph_batch_sizes == ()
    assert without_decode.graph_token_counts
    without_prefill = resolve(GPU, disable_prefill_cuda_graph=True).executor
    assert without_prefill.graph_batch_sizes
    assert without_prefill.graph_token_counts == ()
    assert resolve(GPU).executor.graph_padding
    assert not resolve(GPU, disable_cuda_graph_padding=True).executor.graph_padding


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ({"context_length": 5000}, "exceeds the model's 4096"),
        ({"page_size": 0}, "--page-size must be at least 1"),
        ({"max_total_tokens": 0}, "--max-total-tokens must be at least 1"),
        ({"mem_fraction_static": 1.5}, "--mem-fraction-static must be above 0 and at most 1"),
        ({"max_running_requests": 0}, "--max-running-requests must be at least 1"),
        ({"nonsense": 1}, "unknown option 'nonsense'"),
        ({"port": "80"}, "port takes int"),
        ({"port": True}, "port takes int"),
        ({"schedule_conservativeness": -1.0}, "--schedule-conservativeness must be at least 0"),
        (
            {"priority_scheduling_preemption_threshold": 0},
            "--priority-scheduling-preemption-threshold must be at least",
        ),
        ({"schedule_policy": "priority"}, "schedule_policy must be one of"),
        ({"dtype": "int3"}, "dtype must be one of"),
    ],
)
def test_what_cannot_work_is_refused(user: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(**user)


def test_aliases_have_one_canonical_name() -> None:
    assert check_flags({"model": "x", "stream_output": True}) == {
        "model_path": "x",
        "incremental_streaming_output": True,
    }
    names = [name for flag in FLAGS for name in (flag.name, *flag.aliases)]
    assert len(names) == len(set(names))


def test_serve_options() -> None:
    options = resolve_serve(check_flags({"port": 0}), "Default-Model")
    assert options.host == "127.0.0.1"
    assert options.served_model_name == "Default-Model"
    assert resolve_serve(check_flags({"model_path": "m"}), "d").served_model_name == "m"
    with pytest.raises(ConfigError, match=r"0\.\.65535"):
        resolve_serve(check_flags({"port": 70000}), "d")


def test_environment() -> None:
    assert read_environment({"HORNBEAM_CACHE_DIR": "/a"}).cache_dir == Path("/a")
    assert read_environment({"XDG_CACHE_HOME": "/x"}).cache_dir == Path("/x/hornbeam")
    disabled = read_environment({"HORNBEAM_DISABLED_MODEL_ARCHS": "A, B,"}).disabled_architectures
    assert disabled == {"A", "B"}
    environment = read_environment({"HORNBEAM_REQ_WAITING_TIMEOUT": "2.5", "HORNBEAM_REQ_RUNNING_TIMEOUT": "-1"})
    assert (environment.waiting_timeout, environment.running_timeout) == (2.5, None)
    with pytest.raises(ConfigError, match="HORNBEAM_REQ_RUNNING_TIMEOUT takes seconds"):
        read_environment({"HORNBEAM_REQ_RUNNING_TIMEOUT": "soon"})


def test_the_share_of_windowed_layers() -> None:
    assert resolve().cache.window_ratio is None
    assert resolve(swa_full_tokens_ratio=0.5).cache.window_ratio == 0.5
    for ratio in (0.0, 1.5):
        with pytest.raises(ConfigError, match="--swa-full-tokens-ratio must be above 0"):
            resolve(swa_full_tokens_ratio=ratio)
