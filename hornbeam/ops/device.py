"""What backends written for one kind of device answer when asked about another."""

from hornbeam.ops.query import OpQuery


def needs_cuda(query: OpQuery) -> str | None:
    """None on a CUDA device, else the reason for `supports`."""
    return None if query.device == "cuda" else "needs a CUDA device"


def needs_cpu(query: OpQuery) -> str | None:
    """None on a CPU, else the reason for `supports`."""
    return None if query.device == "cpu" else "needs a CPU"
