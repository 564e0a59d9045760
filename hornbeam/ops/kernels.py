"""The backends chosen for one model on one machine, as one value that layers are built with."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import torch

from hornbeam.core.registry import Registry
from hornbeam.ops.activation.contract import ACTIVATION, Activation
from hornbeam.ops.ahead import identify_compiler, side_by_side
from hornbeam.ops.attention.contract import DECODE_ATTENTION, PREFILL_ATTENTION, AttentionBackend
from hornbeam.ops.layout.contract import LAYOUT, Layout
from hornbeam.ops.linear.contract import FP8_LINEAR, LINEAR, Fp8Product, LinearProduct
from hornbeam.ops.mla.contract import LATENT_ATTENTION, LATENT_ROWS, SINGLE_LATENT_ATTENTION, LatentRows
from hornbeam.ops.moe.contract import EXPERTS, ROUTING, ExpertsBackend, Routing
from hornbeam.ops.norm.contract import NORM, Norm
from hornbeam.ops.probes import Probes
from hornbeam.ops.qkv.contract import QKV, Qkv
from hornbeam.ops.query import OpQuery
from hornbeam.ops.sample.contract import SAMPLE, Sample

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """One backend per op."""

    activation: Activation
    decode_attention: AttentionBackend
    experts: ExpertsBackend | None  # of mixtures; None: the model is dense
    fp8_linear: Fp8Product | None  # of weights that are eight-bit floats; None: there are none
    latent_rows: LatentRows | None  # of latent attention; None: the model has another
    layout: Layout
    linear: LinearProduct
    norm: Norm
    prefill_attention: AttentionBackend
    qkv: Qkv
    routing: Routing | None  # of mixtures; None: the model is dense
    sample: Sample
    single_attention: AttentionBackend


def choose_kernels(
    query: OpQuery,
    decode_attention: str = "auto",
    prefill_attention: str = "auto",
    *,
    fused: bool = True,
    traced: bool = False,
) -> Kernels:
    """The first backend of each op that supports `query` and passes its probe; those of attention may be named.

    fused: False for plain torch where backends differ in how much one kernel does. traced: plain torch is what torch's
    compiler sees of norms and activations, which it fuses by itself.

    Raises:
        ConfigError: the named attention backend cannot serve; the message says why.
    """
    probes, latent = Probes(query), query.latent is not None
    plain = "auto" if fused else "reference"
    chosen = _choose_traced if traced else _choose
    jobs: dict[str, Callable[[], Any]] = {  # those that take longest come first
        "experts": partial(_choose, EXPERTS, query, probes.experts) if query.mixture else _nothing,
        **_attention_jobs(query, probes, decode_attention, prefill_attention),
        "latent_rows": partial(_choose, LATENT_ROWS, query, probes.latent_rows) if latent else _nothing,
        "fp8_linear": partial(_choose, FP8_LINEAR, query, probes.fp8_linear, plain) if query.fp8 else _nothing,
        "sample": partial(_choose, SAMPLE, query, probes.sample),
        "qkv": partial(_choose, QKV, query, probes.qkv, plain),
        "linear": partial(_choose, LINEAR, query, probes.linear, plain),
        "norm": partial(chosen, NORM, query, probes.norm, plain),
        "activation": partial(chosen, ACTIVATION, query, probes.activation, plain),
        "layout": partial(_choose, LAYOUT, query, probes.layout),
        "routing": partial(_choose, ROUTING, query, probes.routing) if query.mixture else _nothing,
    }
    if query.device == "cuda":
        _import_library(LATENT_ATTENTION if latent else PREFILL_ATTENTION, prefill_attention)
    found = dict(zip(jobs, side_by_side(list(jobs.values()), torch.device(query.device)), strict=True))
    decode = found["decode_attention"]
    return Kernels(**{"prefill_attention": decode, "single_attention": decode} | found)


def _import_library(registry: Registry[OpQuery, Any], wanted: str) -> None:
    """What takes longest to be imported, while Triton hashes itself: beside compilers it would take four times that."""
    with ThreadPoolExecutor(1) as pool, suppress(Exception):  # whoever chooses meets with the same
        pool.submit(identify_compiler)
        registry.load(registry.names()[0] if wanted == "auto" else wanted)


def _nothing() -> None:
    """For an op that the model does not have."""


def _attention_jobs(query: OpQuery, probes: Probes, decode: str, prefill: str) -> dict[str, Callable[[], Any]]:
    """By fields of `Kernels`; without those whose backend is that of decode."""
    if query.latent is None:
        return {
            "decode_attention": partial(_choose, DECODE_ATTENTION, query, probes.decode_attention, decode),
            "prefill_attention": partial(_choose, PREFILL_ATTENTION, query, probes.prefill_attention, prefill),
        }
    probe = probes.latent_attention
    single = partial(_choose, SINGLE_LATENT_ATTENTION, query, partial(probe, prefill=False), decode)
    jobs: dict[str, Callable[[], Any]] = {
        "decode_attention": partial(_choose, LATENT_ATTENTION, query, probe, decode),
        "single_attention": single,
    }
    if prefill != decode:
        jobs["prefill_attention"] = partial(_choose, LATENT_ATTENTION, query, probe, prefill)
    return jobs


def _choose(registry: Registry[OpQuery, T], query: OpQuery, probe: Callable[[T], None], wanted: str = "auto") -> T:
    choice = registry.choose(query, wanted, probe)
    logger.info("%s = %s (%s)", registry.name, choice.name, choice.reason)
    return choice.value


def _choose_traced(registry: Registry[OpQuery, T], query: OpQuery, probe: Callable[[T], None], wanted: str) -> T:
    return cast(T, _Traced(_choose(registry, query, probe, wanted), registry.load("reference")))


class _Traced:
    """A backend that is plain torch as long as torch's compiler looks."""

    def __init__(self, backend: Any, plain: Any) -> None:
        self._backend = backend
        self._plain = plain

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain if torch.compiler.is_compiling() else self._backend, name)
