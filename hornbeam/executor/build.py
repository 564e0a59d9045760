"""Makes an executor: model and weights on the device, kernels chosen, the cache pool sized by measurement, graphs."""

import dataclasses
import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hornbeam.cache.pool import CachePool, page_bytes
from hornbeam.cache.sizes import PageShares
from hornbeam.comm.grid import Grid
from hornbeam.config.components import EngineOptions, ExecutorOptions, ModelOptions
from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.errors import ConfigError, FamilyUnavailable, HornbeamError
from hornbeam.core.family import ModelConfig, ModelFamily
from hornbeam.core.fp8 import Fp8Format
from hornbeam.core.plan import Chunk, StepPlan
from hornbeam.executor.executor import Executor
from hornbeam.executor.graphs import DecodeGraphs
from hornbeam.executor.mixed_graphs import MixedGraphs
from hornbeam.executor.runner import NUM_LANES, Runner
from hornbeam.executor.state import SlotState
from hornbeam.layers.context import BuildContext
from hornbeam.layers.derived import refresh_derived
from hornbeam.layers.linear import Head, Linear
from hornbeam.ops.ahead import WithheldLaunches
from hornbeam.ops.attention.contract import AttentionShape, GroupAttention
from hornbeam.ops.kernels import Kernels, choose_kernels
from hornbeam.ops.linear.contract import GroupedProduct
from hornbeam.ops.query import OpQuery
from hornbeam.platforms.contract import Platform
from hornbeam.quant.choice import choose_quantization
from hornbeam.sampling.sampler import Sampler
from hornbeam.weights.checkpoint import Checkpoint
from hornbeam.weights.dummy import draw_dummy
from hornbeam.weights.fp8 import keep_listed_plain
from hornbeam.weights.load import load_weights

logger = logging.getLogger(__name__)

_HOST_SHARE = 0.9  # of a step's time: if launching takes less of it, the step waits for the device
_MOST_SEARCHED = 512  # rows of steps with prompts: the library chooses well for more, but for those of whole chunks
_REHEARSED = (1, 2, 16, 64)  # batch sizes that together launch all kernels of decode steps, with the largest one
_REHEARSED_FP8 = (24, 32, 56, 112, 120)  # and these those of products whose weights are eight-bit floats
_SHORT_PROMPT = 64  # tokens: some products of so few are others than those of many
_PAGE_TABLE_UNIT = 16  # what the width of page tables is a multiple of: ops are probed, so compiled, with such a one
_NO_MEMORY = "can't allocate memory"  # how torch says so for CPUs, where the type of the error does not tell


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltExecutor:
    """An executor, and what others must know of it."""

    executor: Executor
    specs: tuple[CacheSpec, ...]
    num_pages: tuple[int, ...]  # per cache group, the padding page included
    quantization: str  # of its products, by the name of the flag's choice


def build_executor(
    family: ModelFamily, config: ModelConfig, checkpoint: Checkpoint, options: EngineOptions, platform: Platform
) -> BuiltExecutor:
    """Load the model and make it ready for steps.

    Raises:
        ConfigError: weights that do not fit the model, or no room for a cache.
    """
    stored, config = config.fp8, _as_wanted(config, options.model)
    specs = family.cache_specs(config)
    wanted = options.executor
    query = _query(config, specs, options, platform)
    attention_backends = wanted.decode_attention_backend, wanted.prefill_attention_backend
    kernels = choose_kernels(query, *attention_backends, fused=wanted.fused_kernels, traced=wanted.compile_up_to > 0)
    name = "fp8" if config.fp8 is not None else options.model.quantization
    quantization = choose_quantization(name, query, quantized=checkpoint.quantized)
    started = time.perf_counter()
    with _told(platform, "the weights", "use a smaller model or more memory"), platform.tagged("weights"):
        model = platform.submit(
            lambda: _value(_load(family, config, stored, checkpoint, options, kernels, quantization.packing, platform))
        ).result()
    logger.info("weights are on %s after %.1f s", platform.facts().device, time.perf_counter() - started)

    # One page is enough to run the largest step on; its activations then stay in the allocator, so free means free.
    # Where there are no graphs, nothing is compiled, and memory is not the allocator's.
    num_slots, page_size = options.scheduler.max_running_requests, options.cache.page_size
    advice = "lower --chunked-prefill-size or --max-running-requests"
    with _told(platform, "the largest step", advice), platform.tagged("steps"):
        executor, runner, state = _make_executor(model, config, specs, kernels, options, platform)
        executor.use_pool(CachePool(specs, (1,) * len(specs), page_size, platform.device))
        if _records(kernels) and wanted.graph_batch_sizes and not wanted.compile_up_to:
            _rehearse(runner, platform, state, wanted.graph_batch_sizes, fp8=config.fp8 is not None)
        _warm_up(executor, num_slots, _largest_chunk(options) if platform.facts().graphs else 1)
    num_pages = _num_pages(specs, options, platform)
    flag = "--mem-fraction-static" if options.cache.max_total_tokens is None else "--max-total-tokens"
    with _told(platform, "the key-value cache", f"lower {flag}"), platform.tagged("kv"):
        executor.use_pool(CachePool(specs, num_pages, page_size, platform.device))
    advice = f"lower {flag} or --cuda-graph-max-bs, or set --disable-cuda-graph"
    with _told(platform, "the graphs", advice), platform.tagged("graphs"):
        _capture(executor, runner, platform, state, kernels, options.executor, options.model.context_len)
    return BuiltExecutor(executor=executor, specs=specs, num_pages=num_pages, quantization=quantization.name)


def _make_executor(
    model: Any,
    config: ModelConfig,
    specs: tuple[CacheSpec, ...],
    kernels: Kernels,
    options: EngineOptions,
    platform: Platform,
) -> tuple[Executor, Runner, SlotState]:
    """Without a cache yet."""
    num_slots, page_size = options.scheduler.max_running_requests, options.cache.page_size
    max_pages = -(-options.model.context_len // (page_size * _PAGE_TABLE_UNIT)) * _PAGE_TABLE_UNIT
    sampler = Sampler(num_slots, config.vocab_size, kernels.sample, platform.device)
    parts = sampler, kernels.layout, platform.device, options.executor.graph_batch_sizes
    state = SlotState(num_slots, len(specs), max_pages, page_size, *parts)
    shapes = [_shape(config, spec, page_size, max_pages, platform) for spec in specs]
    attention = [[_attention(kernels, shape, num_slots) for shape in shapes] for _ in range(NUM_LANES)]
    shares = kernels.decode_attention.least_shared if options.executor.cascade else None
    least_shared = [shares if spec.window is None and config.attention_soft_cap is None else None for spec in specs]
    runner = Runner(model, config.num_layers, state, attention, least_shared)
    return Executor(runner=runner, platform=platform, state=state, sampler=sampler), runner, state


def _as_wanted(config: ModelConfig, options: ModelOptions) -> ModelConfig:
    """The config with the number formats that the user asks for."""
    if config.fp8 is not None and options.quantization not in ("auto", "unquant", "fp8"):
        raise ConfigError(f"the model's weights are eight-bit floats: drop --quantization {options.quantization}")
    fp8 = Fp8Format() if config.fp8 is None and options.quantization == "fp8" else config.fp8
    return dataclasses.replace(config, dtype=options.dtype, fp8=fp8)


def _warm_up(executor: Executor, padding_slot: int, num_tokens: int) -> None:
    """Run a prompt of `num_tokens`, a short one and a decode step on the padding slot: kernels get compiled, memory
    taken."""
    for step_id, length in enumerate((num_tokens, min(num_tokens, _SHORT_PROMPT))):
        prompt = Chunk(slot=padding_slot, start=0, token_ids=(0,) * length, samples=True)
        executor.launch(StepPlan(step_id=step_id, chunks=(prompt,))).result()
    executor.launch(StepPlan(step_id=2, decode=(padding_slot,), decode_lens=(1,))).result()


def _records(kernels: Kernels) -> bool:
    """Whether decode steps can be recorded as graphs."""
    attends = kernels.decode_attention.captures and kernels.single_attention.captures
    return attends and (kernels.experts is None or kernels.experts.captures)


def _rehearse(runner: Runner, platform: Platform, state: SlotState, batch_sizes: tuple[int, ...], *, fp8: bool) -> None:
    """Compile what decode steps launch, side by side: recorded for some sizes, but without these launches."""
    wanted = (*_REHEARSED, *(_REHEARSED_FP8 if fp8 else ()), batch_sizes[-1])
    sizes = tuple(size for size in batch_sizes if size in wanted)
    launches = WithheldLaunches(platform.device)

    def capture(run: Callable[[], Tensor], *, known: bool = False) -> Callable[[], Tensor]:
        if not known:
            launches.rehearse(run)
        return run

    @torch.inference_mode()
    def rehearse() -> Callable[[], None]:
        DecodeGraphs(runner, capture, state, sizes, pads=True, compile_up_to=0)
        return lambda: None

    started = time.perf_counter()
    try:
        platform.submit(rehearse).result()
    except Exception as error:  # something sets itself up at first use, which cannot be recorded: nothing is lost
        logger.warning("decode steps cannot be rehearsed (%s): their kernels are compiled one by one", error)
    launches.compile()
    logger.info("compiled kernels of decode steps in %.1f s", time.perf_counter() - started)


def _capture(
    executor: Executor,
    runner: Runner,
    platform: Platform,
    state: SlotState,
    kernels: Kernels,
    options: ExecutorOptions,
    context_len: int,
) -> None:
    """Record as graphs, over the present pool, what the options ask for and the kernels let be recorded."""
    decodes, pads = _records(kernels), options.graph_padding
    mixes = decodes and kernels.prefill_attention.captures_prefill
    token_counts = _launch_bound(executor, state.num_slots, context_len, options.graph_token_counts) if mixes else ()

    @torch.inference_mode()
    def record() -> Callable[[], None]:
        decode = mixed = None
        if decodes and options.graph_batch_sizes:
            started, sizes = time.perf_counter(), options.graph_batch_sizes
            compile_up_to = options.compile_up_to
            decode = DecodeGraphs(runner, platform.capture, state, sizes, pads=pads, compile_up_to=compile_up_to)
            seconds = time.perf_counter() - started
            logger.info("captured decode graphs for batch sizes %s in %.1f s", list(sizes), seconds)
        if token_counts:
            mixed = MixedGraphs(runner, platform, state, token_counts, pads=pads)
        return lambda: executor.use_graphs(decode, mixed)

    platform.submit(record).result()


def _launch_bound(
    executor: Executor, num_slots: int, context_len: int, token_counts: tuple[int, ...]
) -> tuple[int, ...]:
    """Of ascending `token_counts` those that steps can have, and that keep the host busy for longer than the device."""
    token_counts = tuple(number for number in token_counts if number <= num_slots * context_len)

    def waits_for_device(num_tokens: int) -> bool:
        lens = [min(context_len, num_tokens - first) for first in range(0, num_tokens, context_len)]
        prompts = tuple(Chunk(slot=num_slots, start=0, token_ids=(0,) * length, samples=True) for length in lens)
        for step_id in range(2):  # the first one compiles and loads what is new
            started = time.perf_counter()
            step = executor.launch(StepPlan(step_id=step_id, chunks=prompts))
            launched = time.perf_counter() - started
            step.result()
        return launched < _HOST_SHARE * (time.perf_counter() - started)

    return token_counts[: bisect_left(token_counts, True, key=waits_for_device)]


@contextmanager
def _told(platform: Platform, what: str, advice: str) -> Iterator[None]:
    """Out of memory is the user's to solve: with the numbers, and the flags that help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and _NO_MEMORY not in str(error):
            raise
        free, total = platform.free_memory()
        raise ConfigError(
            f"{platform.facts().device} has no memory left for {what}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB "
            f"are free; {advice}, or end what else uses the device ({str(error).partition('.')[0]})"
        ) from error


def _value(value: Any) -> Any:
    return lambda: value


def _query(config: ModelConfig, specs: tuple[CacheSpec, ...], options: EngineOptions, platform: Platform) -> OpQuery:
    return OpQuery(
        device=platform.device.type,
        dtype=config.dtype,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=options.cache.page_size,
        window=next((spec.window for spec in specs if spec.window is not None), None),
        soft_cap=config.attention_soft_cap,
        sinks=config.attention_sinks,
        latent=config.latent,
        fp8=config.fp8 is not None,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        mixture=config.mixture,
    )


def _shape(config: ModelConfig, spec: CacheSpec, page_size: int, max_pages: int, platform: Platform) -> AttentionShape:
    return AttentionShape(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=page_size,
        max_pages=max_pages,
        scale=config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale,
        window=spec.window,
        soft_cap=config.attention_soft_cap,
        latent=config.latent,
        dtype=getattr(torch, config.dtype),
        device=platform.device,
    )


def _attention(kernels: Kernels, shape: AttentionShape, max_rows: int) -> GroupAttention:
    backends = kernels.decode_attention, kernels.prefill_attention, kernels.single_attention
    made = {id(backend): backend.create(shape, max_rows) for backend in backends}
    decode, prefill, single = (made[id(backend)] for backend in backends)
    return GroupAttention(single=single, decode=decode, prefill=prefill)


def _load(
    family: ModelFamily,
    config: ModelConfig,
    stored: Fp8Format | None,
    checkpoint: Checkpoint,
    options: EngineOptions,
    kernels: Kernels,
    packing: GroupedProduct | None,
    platform: Platform,
) -> Any:
    context = BuildContext(
        grid=Grid(),
        kernels=kernels,
        dtype=getattr(torch, config.dtype),
        device=platform.device,
        context_len=options.model.context_len,
        fp8=config.fp8,
        packing=packing,
    )
    load = getattr(family, "load", None)
    dummy = checkpoint.format == "dummy"
    try:
        model = family.build(config, context) if dummy or load is None else load(config, context, checkpoint)
    except (HornbeamError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # its spec could be imported, but its model is broken
        if _NO_MEMORY in str(error):
            raise
        raise FamilyUnavailable(family.name, error) from error
    if stored is not None:
        keep_listed_plain(model, family.weight_map(config), stored, context.dtype)
    if dummy:
        draw_dummy(model, options.model.seed)
    elif load is None:
        aliases = getattr(family, "aliases", {})
        load_weights(model, checkpoint, family.weight_map(config), _unread(family, config), aliases, stored)
    if (packing or config.fp8) is not None and not any(isinstance(module, Linear) for module in model.modules()):
        raise ConfigError("the products of this model are not Hornbeam's, and cannot be rounded: drop --quantization")
    refresh_derived(model)
    _prepare_products(model, options.executor, _largest_chunk(options))
    return model.eval()


def _prepare_products(model: torch.nn.Module, options: ExecutorOptions, chunk_size: int) -> None:
    """Let products find out how they are done best: those of layers for all kinds of steps, the head's for decode."""
    batch_sizes = options.graph_batch_sizes
    token_counts = (number for number in options.graph_token_counts if number <= _MOST_SEARCHED)
    sizes = tuple(dict.fromkeys((*batch_sizes, *token_counts, chunk_size)))
    for kind, num_rows in ((Linear, sizes), (Head, batch_sizes)):
        modules = [module for module in model.modules() if isinstance(module, kind)]
        weights = [weight for module in modules if (weight := module.plain_weight) is not None]
        if weights and num_rows:
            modules[0].product.prepare(weights, num_rows)


def _largest_chunk(options: EngineOptions) -> int:
    return min(options.scheduler.chunked_prefill_size, options.model.context_len)


def _unread(family: ModelFamily, config: ModelConfig) -> tuple[str, ...]:
    unread = getattr(family, "unread", None)
    return () if unread is None else tuple(unread(config))


def _num_pages(specs: tuple[CacheSpec, ...], options: EngineOptions, platform: Platform) -> tuple[int, ...]:
    """Pages of each group, the padding page included."""
    page_size, num_slots = options.cache.page_size, options.scheduler.max_running_requests
    shares = PageShares(
        specs=specs,
        page_bytes=tuple(page_bytes(spec, page_size) for spec in specs),
        page_size=page_size,
        num_slots=num_slots,
        chunk_size=options.scheduler.chunked_prefill_size,
        ratio=options.cache.window_ratio,
    )
    if options.cache.max_total_tokens is not None:
        count = -(-options.cache.max_total_tokens // page_size)
        why = "--max-total-tokens"
    else:
        free, total = platform.free_memory()
        budget = free - int((1 - options.cache.memory_fraction) * total)
        count = min(shares.that_fit(budget), num_slots * -(-options.model.context_len // page_size))
        why = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB were free, fraction {options.cache.memory_fraction}"
    pages = shares.pages(count)
    windows = "".join(
        f", of which layers with a window of {spec.window} keep {number * page_size}"
        for spec, number in zip(specs, pages, strict=True)
        if number < count
    )
    size = shares.num_bytes(count) / 2**30
    logger.info("key-value cache = %d tokens%s, %.2f GiB (%s)", count * page_size, windows, size, why)
    return tuple(number + 1 for number in pages)
