"""A broken backend is skipped with its reason, and the reference answers."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import Sequence, as_tensor, make_engine

from hornbeam.core.errors import ConfigError
from hornbeam.core.family import LatentSizes, MixtureShape
from hornbeam.core.registry import Registry
from hornbeam.ops.activation.contract import ACTIVATION
from hornbeam.ops.attention.contract import DECODE_ATTENTION, PREFILL_ATTENTION
from hornbeam.ops.kernels import choose_kernels
from hornbeam.ops.layout.contract import LAYOUT
from hornbeam.ops.linear.contract import FP8_LINEAR, LINEAR
from hornbeam.ops.mla.contract import LATENT_ATTENTION, LATENT_ROWS, SINGLE_LATENT_ATTENTION
from hornbeam.ops.moe.contract import EXPERTS, ROUTING
from hornbeam.ops.norm.contract import NORM
from hornbeam.ops.probes import Probes
from hornbeam.ops.qkv.contract import QKV
from hornbeam.ops.query import OpQuery
from hornbeam.ops.sample.contract import SAMPLE
from hornbeam.ops.sample.reference import ReferenceSample

pytestmark = pytest.mark.cpu

ATTENTION = (DECODE_ATTENTION, PREFILL_ATTENTION)
LATENT = (LATENT_ATTENTION, SINGLE_LATENT_ATTENTION, LATENT_ROWS)
REGISTRIES = (ACTIVATION, *ATTENTION, EXPERTS, LAYOUT, *LATENT, FP8_LINEAR, LINEAR, NORM, QKV, ROUTING, SAMPLE)
QUERY = OpQuery(
    device="cpu",
    dtype="float32",
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    page_size=16,
    hidden_size=16,
    mixture=MixtureShape(num_experts=4, top_k=2, intermediate_size=8),
)
LATENT_QUERY = dataclasses.replace(
    QUERY, num_kv_heads=1, latent=LatentSizes(rank=6, rope_dim=2, nope_dim=4, value_dim=5)
)
BROKEN = {
    "raises-on-import": ("raise OSError('no such driver')", "OSError: no such driver"),
    "is-not-installed": ("import nonexistent_library", "No module named 'nonexistent_library'"),
    "lacks-its-attribute": ("", "has no attribute 'BACKEND'"),
    "raises-in-supports": (
        "class Backend:\n    def supports(self, query):\n        return query.no_such_field\nBACKEND = Backend()",
        "no_such_field",
    ),
    "refuses": (
        "class Backend:\n    def supports(self, query):\n        return 'needs a newer device'\nBACKEND = Backend()",
        "needs a newer device",
    ),
    "lies-in-supports": (
        (
            "class Backend:\n"
            "    captures = captures_prefill = True\n"
            "    least_shared = None\n"
            "    def supports(self, query):\n        return None\n"
            "    def __getattr__(self, name):\n        raise RuntimeError('no kernel image for this device')\n"
            "BACKEND = Backend()"
        ),
        "no kernel image for this device",
    ),
}


@pytest.fixture(params=BROKEN)
def reason(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Puts a broken backend before all others of every op; the reason that should be told."""
    source, reason = BROKEN[request.param]
    module = f"broken_{request.param.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "entries", {"broken": f"{module}:BACKEND", **registry.entries})
    return reason


def probe_name(registry: Registry) -> str:
    return registry.name.removeprefix("single_")


def test_what_is_optional_is_not_imported_before_it_is_tried() -> None:
    code = "import sys; sys.modules.update(triton=None, flashinfer=None); import hornbeam.executor.build"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.name)
def test_it_is_skipped_with_its_reason(registry: Registry, reason: str) -> None:
    query = LATENT_QUERY if registry in LATENT else QUERY
    choice = registry.choose(query, probe=getattr(Probes(query), probe_name(registry)))
    assert choice.name != "broken"
    assert choice.skipped[0][0] == "broken"
    assert reason in choice.skipped[0][1]
    assert reason in choice.reason


def test_the_model_runs_as_before(reason: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = make_engine(tiny_checkpoint).executor
    monkeypatch.undo()
    intact = make_engine(tiny_checkpoint).executor
    rows = [Sequence(executor, slot=0, first_page=1, num_pages=2).prefill([1, 2, 3]) for executor in (broken, intact)]
    assert as_tensor(rows[0]).equal(as_tensor(rows[1]))


def test_asked_for_by_name_it_is_refused_with_its_reason(reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_kernels(QUERY, decode_attention="broken")
    assert reason in str(caught.value)


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.name)
def test_every_backend_for_a_cpu_keeps_its_word(registry: Registry) -> None:
    query = LATENT_QUERY if registry in LATENT else QUERY
    probe = getattr(Probes(query), probe_name(registry))
    kept = []
    for name in registry.names():
        try:
            backend = registry.load(name)
        except ImportError:
            continue  # an optional library
        if backend.supports(query) is None:
            probe(backend)
            kept.append(name)
    assert "reference" in kept


def test_ids_are_chosen_from_plain_logits_and_from_penalised_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else kernels for the latter would be compiled in service."""
    real, uses = ReferenceSample.sample, set()

    def sample(self, logits, *rest):
        uses.add((logits.dtype, rest[-1] is not None))
        return real(self, logits, *rest)

    monkeypatch.setattr(ReferenceSample, "sample", sample)
    Probes(dataclasses.replace(QUERY, dtype="bfloat16")).sample(ReferenceSample())
    assert uses == {(dtype, filtered) for dtype in (torch.bfloat16, torch.float32) for filtered in (False, True)}
