"""Models of each kind on a GPU: the CPU's tokens in float32, its logprobs nearly in bfloat16, whatever is installed."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_checkpoints import KINDS, greedy_tokens, save_random
from harness import EVERYTHING, BuiltEngine, as_tensor, make_engine
from torch import Tensor

from hornbeam.core.plan import Chunk, PageGrant, SlotStart, StepPlan
from hornbeam.core.request import SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("default"),  # what other packages warn of on import is their business
]

TEXT = (
    "The quick brown fox jumps over the lazy dog. In the beginning there was a machine that read one word after "
    "another, and for each it said what it expected next; most of the time it was wrong, and learned."
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_random(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> dict[str, list[list[int]]]:
    """What the CPU says in float32."""
    return {kind: greedy_tokens(path, device="cpu", dtype="float32") for kind, path in checkpoints.items()}


@pytest.mark.parametrize("kind", ["mixture", "latent"])
def test_float32_equals_the_cpu(checkpoints, expected, kind: str) -> None:
    assert greedy_tokens(checkpoints[kind], dtype="float32") == expected[kind]


SCRIPT = """
import json, logging, sys
from pathlib import Path

absent, folders, dtype = json.loads(sys.argv[1])
sys.modules.update(dict.fromkeys(absent))  # importing them fails
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logger = logging.getLogger("hornbeam.ops.kernels")
logger.addHandler(handler)
logger.setLevel("INFO")
from gpu_checkpoints import greedy_tokens

found = {}
for kind, folder in folders.items():
    lines.clear()
    found[kind] = greedy_tokens(Path(folder), device="cuda", dtype=dtype), list(lines)
print(json.dumps(found))
"""


def without(
    absent: list[str], checkpoints: dict[str, Path], dtype: str
) -> dict[str, tuple[list[list[int]], list[str]]]:
    """Tokens and the lines on kernels of each kind of model, where these packages are not installed."""
    arguments = json.dumps([absent, {kind: str(path) for kind, path in checkpoints.items()}, dtype])
    paths = os.pathsep.join(path for path in (str(Path(__file__).parent), *sys.path) if path)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def chosen(lines: list[str]) -> dict[str, tuple[str, str]]:
    """Who does each op, and why: of each op one line says it."""
    found = dict(re.fullmatch(r"(\w+) = (.+)", line, re.DOTALL).groups() for line in lines)
    assert len(found) == len(lines), lines
    return {op: tuple(who.split(" ", 1)) for op, who in found.items()}


_OPS = {"activation", "layout", "linear", "norm", "qkv", "sample"}
_MIXTURE_OPS = {"experts", "routing"}
OPS = {
    "dense": _OPS | {"decode_attention", "prefill_attention"},
    "mixture": _OPS | _MIXTURE_OPS | {"decode_attention", "prefill_attention"},
    "latent": _OPS | _MIXTURE_OPS | {"latent_attention", "single_latent_attention", "latent_rows"},
}


def test_without_flashinfer_triton_serves(checkpoints: dict[str, Path]) -> None:
    found = without(["flashinfer"], checkpoints, "bfloat16")
    for kind, ops in OPS.items():
        backends = chosen(found[kind][1])
        assert {op: backend for op, (backend, _) in backends.items()} == dict.fromkeys(ops, "triton")
        _, why = backends["latent_attention" if kind == "latent" else "prefill_attention"]
        assert "flashinfer skipped: ModuleNotFoundError" in why


def test_without_triton_torch_serves(checkpoints: dict[str, Path], expected: dict[str, list[list[int]]]) -> None:
    found = without(["flashinfer", "triton"], checkpoints, "float32")
    for kind, ops in OPS.items():
        tokens, lines = found[kind]
        assert tokens == expected[kind], kind
        backends = chosen(lines)
        assert {op: backend for op, (backend, _) in backends.items()} == dict.fromkeys(ops, "reference")
        assert all("triton skipped: ModuleNotFoundError" in why for _, why in backends.values())


# Nats, between the distributions after each token of a text: after the median one, and what nine in ten stay below.
# Where two experts score nearly alike, rounding decides which one it is, and then nothing is alike. These are random
# models, wilder than trained ones.
MEDIAN_DIVERGENCE, LARGE_DIVERGENCE = 0.01, 0.05
SAME_TOKEN = 0.85  # share of the tokens after which both find the same one likeliest


@pytest.mark.parametrize("backend", ["flashinfer", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_says_nearly_the_same_of_a_text(checkpoints, exact, kind: str, backend: str) -> None:
    if backend == "flashinfer":
        pytest.importorskip("flashinfer")
    flags = {"device": "cuda", "dtype": "bfloat16", "attention_backend": backend, "max_total_tokens": 4096}
    engine = make_engine(checkpoints[kind], **flags)
    for row in (*logprobs_of_text(engine, 1), *logprobs_of_text(engine, 3)):
        divergences = torch.nn.functional.kl_div(row, exact[kind], reduction="none", log_target=True).sum(-1)
        assert divergences.median() < MEDIAN_DIVERGENCE
        assert divergences.quantile(0.9) < LARGE_DIVERGENCE
        assert (row.argmax(-1) == exact[kind].argmax(-1)).float().mean() > SAME_TOKEN


@pytest.fixture(scope="module")
def exact(checkpoints: dict[str, Path]) -> dict[str, Tensor]:
    """What the CPU says of the text in float32."""
    return {
        kind: logprobs_of_text(make_engine(path, dtype="float32", max_total_tokens=4096), 1)[0]
        for kind, path in checkpoints.items()
    }


def logprobs_of_text(engine: BuiltEngine, num_rows: int) -> Tensor:
    """[rows, T, V] after each of the text's last tokens: its first half is a prompt, in two chunks, and then decode
    steps of several rows alike are made to choose the text."""
    ids, slots = list(TEXT.encode()), range(num_rows)
    half = len(ids) // 2
    each = (engine.num_pages[0] - 1) // 8  # pages: those of 512 tokens
    found: list[list[Tensor]] = [[] for _ in slots]
    for step, end in enumerate((half - 5, half, *range(half + 1, len(ids)))):
        forced = SamplingParams(temperature=0, logit_bias=((ids[end], 1000.0),))
        begin = (0, half - 5)[step] if step < 2 else end - 1
        start = partial(SlotStart, num_cached=begin, sampling=forced, seed=0, logprobs=EVERYTHING)
        pages = [tuple(range(1 + each * slot, 1 + each * (slot + 1))) for slot in slots] if step == 0 else []
        chunk = tuple(ids[begin:end]) if step < 2 else ()
        plan = StepPlan(
            step_id=step,
            starts=tuple(start(slot=slot) for slot in slots),
            grants=tuple(PageGrant(slot=slot, group=0, first=0, page_ids=mine) for slot, mine in enumerate(pages)),
            chunks=tuple(Chunk(slot=slot, start=begin, token_ids=chunk, samples=step == 1) for slot in slots if chunk),
            decode=() if chunk else tuple(slots),
            decode_lens=() if chunk else (end,) * num_rows,
        )
        for slot, (entry,) in enumerate(engine.executor.launch(plan).result().logprobs):
            found[slot].append(as_tensor(dict(entry.top)))
    return torch.stack([torch.stack(rows) for rows in found])
