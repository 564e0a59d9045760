"""The whole engine on a GPU: the same greedy tokens with and without graphs, overlap and FlashInfer."""

import sys
from typing import Any

import pytest
import torch
from gpu_checkpoints import FLAGS, KINDS, PARAMS, PROMPTS, greedy_tokens, save_random
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("default"),  # what other packages warn of on import is their business
]


@pytest.fixture(scope="module")
def reference(tiny_checkpoint) -> list[list[int]]:
    """What the CPU says in float32."""
    return greedy_tokens(tiny_checkpoint, device="cpu", dtype="float32")


# Head size 8 leaves Triton no matrix unit to use, so that this checkpoint runs on the reference's attention.
def test_float32_equals_the_cpu(tiny_checkpoint, reference):
    assert greedy_tokens(tiny_checkpoint, device="cuda", dtype="float32") == reference


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
    assert greedy_tokens(wide_checkpoint, dtype="float32", attention_backend="triton", **flags) == wide_reference


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
            num_shared.clear()  # those of the start, which tries what it will not use
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
    assert greedy_tokens(wide_checkpoint, dtype="float32", **flags) == wide_reference


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", [{}, {"disable_prefill_cuda_graph": True}], ids=str)
def test_nothing_is_compiled_in_service(tmp_path, monkeypatch, kind, flags):
    """Prompts and batches of even and odd sizes, alone and mixed, with shared prefixes: a stall for all who stream."""
    from hornbeam import Engine
    from hornbeam.ops.attention.triton import TritonAttentionBackend

    triton = pytest.importorskip("triton")
    monkeypatch.setattr(TritonAttentionBackend, "least_shared", 256)
    flags = {**FLAGS, "max_total_tokens": 16384, "context_length": 3000, "chunked_prefill_size": 1100, **flags}
    long = [i % 290 + 5 for i in range(2500)]
    compiled = []
    with Engine(model_path=str(save_random(tmp_path, kind)), dtype="bfloat16", **flags) as engine:
        monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **facts: compiled.append(name_of(facts)))
        for num_prompts in (1, 2, 3, 5, 8):
            for length in (1, 2, 7, 16, 33, 130):
                prompts = [[i + 1, *[7] * (length - 1 + i % 2)] for i in range(num_prompts)]
                engine.generate(input_ids=prompts, sampling_params={**PARAMS, "max_new_tokens": 4})
        for prompts in (SHARED, SHARED[:5], [*SHARED[:3], *PROMPTS]):
            for asked in (
                {},
                {"temperature": 0.8, "top_p": 0.9, "top_k": 20},
                {"min_p": 0.1, "frequency_penalty": 0.5},
            ):
                engine.generate(input_ids=prompts, sampling_params=PARAMS | asked)
            engine.generate(input_ids=prompts, sampling_params=PARAMS, return_logprob=True, top_logprobs_num=2)
        for num_streams in (1, 2, 7):  # beside chunks of a long prompt, then short chunks behind many keys
            for prompts in ([long], [[*long[:2400], i] for i in range(8)], [[*long, i] for i in range(40)]):
                streams = [[i + 1, 5] for i in range(num_streams)]
                engine.generate(input_ids=[*streams, *prompts], sampling_params=PARAMS)
            assert engine.flush_cache()
    assert not compiled


def test_decode_graphs_find_their_kernels_compiled(wide_checkpoint, monkeypatch):
    """They were compiled side by side before: in captures it would be one after the other."""
    from hornbeam import Engine
    from hornbeam.ops.launch import Kernel
    from hornbeam.platforms.cuda import CudaPlatform

    triton = pytest.importorskip("triton")
    for module in [module for name, module in sys.modules.items() if name.startswith("hornbeam.ops.")]:
        for kernel in vars(module).values():
            if isinstance(kernel, Kernel):  # as in a new process
                kernel._launches.clear()
                kernel._function.device_caches.clear()
    capture, compiled, late = CudaPlatform.capture, [], []

    def watched(self, run, *, known=False):
        before = len(compiled)
        replay = capture(self, run, known=known)
        late.extend(compiled[before:])
        return replay

    monkeypatch.setattr(CudaPlatform, "capture", watched)
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **facts: compiled.append(name_of(facts)))
    with Engine(model_path=str(wide_checkpoint), dtype="bfloat16", disable_prefill_cuda_graph=True, **FLAGS):
        pass
    assert compiled
    assert not late


def name_of(facts) -> str:
    """Of a kernel, with what it was compiled for."""
    return f"{facts['metadata']['name']} {facts['src'].signature} {facts['src'].attrs}"


def test_chunked_prefill_changes_no_token(wide_checkpoint, wide_reference):
    flags = {"chunked_prefill_size": 32, "dtype": "float32", "attention_backend": "triton"}
    assert greedy_tokens(wide_checkpoint, **flags) == wide_reference


def test_bfloat16_with_flashinfer_with_and_without_graphs(wide_checkpoint):
    """Recorded decode steps change no token. Recorded prompts take other kernels and other numbers of rows, so that
    where two tokens are nearly as likely another one may be chosen. But of the same texts all say the same, but for
    rounding: when they write them, and when they read them as prompts."""
    pytest.importorskip("flashinfer")
    from hornbeam import Engine

    flags = {"model_path": str(wide_checkpoint), "dtype": "bfloat16", "attention_backend": "flashinfer", **FLAGS}
    with Engine(disable_cuda_graph=True, **flags) as engine:
        texts, logprobs = written(engine)
    with Engine(disable_prefill_cuda_graph=True, **flags) as engine:
        assert written(engine)[0] == texts
    with Engine(**flags) as engine:
        for ids, expected in ((texts, logprobs), written(engine)):
            differences = (read(engine, ids) - expected).abs()
            assert differences.median() < 0.05
            assert differences.max() < 0.2


def written(engine: Any) -> tuple[list[list[int]], Tensor]:
    """The prompts and what greedy requests make of them, and the log-probabilities of what they chose [prompts, 24]."""
    answers = engine.generate(input_ids=PROMPTS, sampling_params=PARAMS, return_logprob=True)
    texts = [prompt + answer["output_ids"] for prompt, answer in zip(PROMPTS, answers, strict=True)]
    return texts, logprobs_of(answers, "output_token_logprobs")


def read(engine: Any, texts: list[list[int]]) -> Tensor:
    """The log-probabilities of each text's last tokens, when it is a prompt."""
    starts = [len(prompt) - 1 for prompt in PROMPTS]  # what stands there is not scored itself
    params = {**PARAMS, "max_new_tokens": 1}
    answers = engine.generate(input_ids=texts, sampling_params=params, return_logprob=True, logprob_start_len=starts)
    return logprobs_of(answers, "input_token_logprobs")


def logprobs_of(answers: list[dict[str, Any]], name: str) -> Tensor:
    num_tokens = PARAMS["max_new_tokens"]
    return torch.tensor([[entry[0] for entry in answer["meta_info"][name][-num_tokens:]] for answer in answers])


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory):
    """Random weights with heads of 64, which every backend takes."""
    return save_random(tmp_path_factory.mktemp("wide"), "dense")


@pytest.fixture(scope="module")
def wide_reference(wide_checkpoint) -> list[list[int]]:
    """What the CPU says in float32."""
    return greedy_tokens(wide_checkpoint, device="cpu", dtype="float32")
