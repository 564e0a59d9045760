"""How a model's products keep their weights: as the user says, or as suits the checkpoint and the machine."""

import logging
from dataclasses import dataclass

from hornbeam.ops.linear.contract import GROUPED_LINEAR, GroupedProduct
from hornbeam.ops.query import OpQuery
from hornbeam.quant.contract import QUANTIZATIONS

logger = logging.getLogger(__name__)

UNQUANTIZED = "unquant"
_AS_LOADED = (UNQUANTIZED, "fp8")
_SUITED = "grouped_int8"  # to weights that are integers already


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The name of a quantization, and its products; None: weights stay as they are loaded."""

    name: str
    packing: GroupedProduct | None = None


def choose_quantization(wanted: str, query: OpQuery, *, quantized: bool) -> Chosen:
    """`wanted`, or for "auto" what is fast and loses next to nothing.

    That is float32, but for weights that are integers in their file where the machine multiplies integers faster.
    On two cores with AVX-512 and VNNI that is 4 times as fast as float32 for one row and 3 times for many, and all that
    is rounded is activations.

    Args:
        wanted: a name of --quantization.
        query: what products must serve.
        quantized: the checkpoint's weights are integers with a scale for each group.

    Raises:
        ConfigError: the wanted one cannot serve here.
    """
    if wanted == "auto":
        wanted, why = _suited(query, quantized=quantized)
        logger.info("quantization = %s (%s)", wanted, why)
    if wanted in _AS_LOADED:
        return Chosen(name=wanted)
    return Chosen(name=wanted, packing=QUANTIZATIONS.choose(query, wanted).value.create(query))


def _suited(query: OpQuery, *, quantized: bool) -> tuple[str, str]:
    """A name and the reason for it."""
    if not quantized:
        return UNQUANTIZED, "the checkpoint's weights are floats"
    product: GroupedProduct = GROUPED_LINEAR.load("native")
    if reason := product.supports(query):
        return UNQUANTIZED, f"integer products: {reason}"
    return _SUITED, "the checkpoint's weights are integers, which this processor multiplies faster; --dtype for floats"
