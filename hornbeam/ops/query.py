"""What an op's backends are asked before one is chosen."""

from dataclasses import dataclass

from hornbeam.core.family import LatentSizes, MixtureShape


@dataclass(frozen=True, slots=True, kw_only=True)
class OpQuery:
    """The machine and the shapes that a backend must serve."""

    device: str  # "cpu", "cuda"
    dtype: str  # of activations
    num_heads: int  # query heads of this rank
    num_kv_heads: int
    head_dim: int
    page_size: int
    window: int | None = None  # a query sees only the last `window` tokens
    soft_cap: float | None = None  # of attention scores
    sinks: bool = False  # attention has a score per head that leads to no key
    latent: LatentSizes | None = None  # latent attention; None: keys and values are cached
    hidden_size: int = 0  # of what goes from layer to layer; 0: whatever
    fp8: bool = False  # weights of products are eight-bit floats, see `ops.linear.contract.Fp8Weight`
    vocab_size: int = 64  # of what ids are chosen from
    mixture: MixtureShape | None = None  # experts of this rank; None: the model is dense
