"""The backends chosen for one model on one machine, as one value that layers are built with."""

import logging
from dataclasses import dataclass
from typing import TypeVar

from hornbeam.core.registry import Registry
from hornbeam.ops.activation.contract import ACTIVATION, Activation
from hornbeam.ops.attention.contract import ATTENTION, AttentionBackend
from hornbeam.ops.cache_write.contract import CACHE_WRITE, CacheWrite
from hornbeam.ops.linear.contract import LINEAR, LinearProduct
from hornbeam.ops.norm.contract import NORM, Norm
from hornbeam.ops.query import OpQuery
from hornbeam.ops.rope.contract import ROPE, Rope
from hornbeam.ops.sample.contract import SAMPLE, Sample

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """One backend per op."""

    activation: Activation
    attention: AttentionBackend
    cache_write: CacheWrite
    linear: LinearProduct
    norm: Norm
    rope: Rope
    sample: Sample


def choose_kernels(query: OpQuery, attention: str = "auto") -> Kernels:
    """The first backend of each op that supports `query`; `attention` may name one.

    Raises:
        ConfigError: the named attention backend cannot serve; the message says why.
    """
    return Kernels(
        activation=_choose(ACTIVATION, query),
        attention=_choose(ATTENTION, query, attention),
        cache_write=_choose(CACHE_WRITE, query),
        linear=_choose(LINEAR, query),
        norm=_choose(NORM, query),
        rope=_choose(ROPE, query),
        sample=_choose(SAMPLE, query),
    )


def _choose(registry: Registry[OpQuery, T], query: OpQuery, wanted: str = "auto") -> T:
    choice = registry.choose(query, wanted)
    logger.info("%s = %s (%s)", registry.name, choice.name, choice.reason)
    return choice.value
