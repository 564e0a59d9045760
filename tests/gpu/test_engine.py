"""The whole engine on a GPU: the same greedy tokens with and without graphs, overlap and FlashInfer."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("default"),  # what other packages warn of on import is their business
]

PROMPTS = [[1, 17, 23, 5, 99], [7] * 40, list(range(3, 200)), [250, 3]]
PARAMS = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
FLAGS = {"max_total_tokens": 4096, "max_running_requests": 8, "skip_tokenizer_init": True}


def tokens(path, **flags) -> list[list[int]]:
    """Two rounds: the second one finds the prompts in the prefix cache, which changes no token in float32."""
    from hornbeam import Engine

    with Engine(model_path=str(path), **{**FLAGS, **flags}) as engine:
        rounds = [engine.generate(input_ids=PROMPTS, sampling_params=PARAMS) for _ in range(2)]
    assert sum(answer["meta_info"]["cached_tokens"] for answer in rounds[1]) > 0
    first, second = ([answer["output_ids"] for answer in answers] for answers in rounds)
    assert first == second or flags["dtype"] != "float32"
    return first


@pytest.fixture(scope="module")
def reference(tiny_checkpoint) -> list[list[int]]:
    """What the CPU says in float32."""
    return tokens(tiny_checkpoint, device="cpu", dtype="float32")


# Head size 8 leaves Triton no matrix unit to use, so that this checkpoint runs on the reference's attention.
def test_float32_equals_the_cpu(tiny_checkpoint, reference):
    assert tokens(tiny_checkpoint, device="cuda", dtype="float32") == reference


WAYS = [
    {},
    {"disable_cuda_graph": True},
    {"disable_decode_cuda_graph": True},
    {"disable_prefill_cuda_graph": True},
    {"disable_cuda_graph_padding": True, "cuda_graph_bs": [1, 3]},
    {"disable_overlap_schedule": True},
    {"max_running_requests": 3},
]


@pytest.mark.parametrize("flags", WAYS, ids=str)
def test_graphs_padding_and_overlap_change_no_token(wide_checkpoint, wide_reference, flags):
    assert tokens(wide_checkpoint, dtype="float32", attention_backend="triton", **flags) == wide_reference


SHARED = [[*(list(range(5, 255)) * 2)[:330], i, 2 * i, 3] for i in range(1, 9)]


@pytest.mark.parametrize(
    "flags",
    [{}, {"disable_cascade_attention": True}, {"disable_cuda_graph": True}, {"disable_radix_cache": True}],
    ids=str,
)
def test_reading_shared_prefixes_once_changes_no_token(wide_checkpoint, monkeypatch, flags):
    from hornbeam import Engine
    from hornbeam.ops.attention.cascade import Cascade
    from hornbeam.ops.attention.triton import TritonAttentionBackend

    def generate(**flags) -> list[list[int]]:
        with Engine(model_path=str(wide_checkpoint), dtype="float32", **{**FLAGS, **flags}) as engine:
            answers = engine.generate(input_ids=SHARED, sampling_params=PARAMS)
        return [answer["output_ids"] for answer in answers]

    plan, num_shared = Cascade.plan, []
    monkeypatch.setattr(TritonAttentionBackend, "least_shared", 256)
    monkeypatch.setattr(Cascade, "plan", lambda self, shared: num_shared.append(len(shared)) or plan(self, shared))
    expected = generate(device="cpu")
    assert generate(attention_backend="triton", **flags) == expected
    assert any(num_shared) == (not flags or "disable_cuda_graph" in flags)


def test_compiled_steps_change_no_token(wide_checkpoint, wide_reference):
    flags = {"enable_torch_compile": True, "torch_compile_max_bs": 4, "attention_backend": "triton"}
    assert tokens(wide_checkpoint, dtype="float32", **flags) == wide_reference


def test_chunked_prefill_changes_no_token(wide_checkpoint, wide_reference):
    flags = {"chunked_prefill_size": 32, "dtype": "float32", "attention_backend": "triton"}
    assert tokens(wide_checkpoint, **flags) == wide_reference


def test_bfloat16_with_flashinfer_with_and_without_graphs(wide_checkpoint):
    pytest.importorskip("flashinfer")
    flags = {"dtype": "bfloat16", "attention_backend": "flashinfer"}
    assert tokens(wide_checkpoint, **flags) == tokens(wide_checkpoint, disable_cuda_graph=True, **flags)


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory):
    """Random weights with heads of 64, which every backend takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wide_reference(wide_checkpoint) -> list[list[int]]:
    """What the CPU says in float32."""
    return tokens(wide_checkpoint, device="cpu", dtype="float32")
