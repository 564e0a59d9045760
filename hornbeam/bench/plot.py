"""Draws the latencies of a serving benchmark. Matplotlib is optional, and imported only here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hornbeam.core.errors import ConfigError


def plot_serving(result: Mapping[str, Any], path: Path) -> None:
    """Draw the shares of time to first token and between tokens, and the tokens per second over time, into a PNG.

    Args:
        result: with the details of each request.
        path: of the PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f"--plot needs matplotlib ({error}): pip install 'hornbeam[bench]'") from error
    figure = Figure(figsize=(12, 4), layout="constrained")
    first, gaps, rate = figure.subplots(1, 3)
    figure.suptitle(f"{result['model']}: {result['completed']} requests, {result['output_throughput']:.0f} tok/s out")
    _draw_shares(first, [1000 * value for value in result["ttfts"]], "time to first token (ms)")
    _draw_shares(gaps, [1000 * gap for request in result["itls"] for gap in request], "between tokens (ms)")
    times = []
    for start, ttft, request_gaps in zip(result["start_times"], result["ttfts"], result["itls"], strict=True):
        now = start + ttft
        times.append(now)
        for gap in request_gaps:
            now += gap
            times.append(now)
    seconds = int(max(times, default=0)) + 1
    counts = [0] * seconds
    for moment in times:
        counts[int(moment)] += 1
    rate.stairs(counts, fill=True)
    rate.set_xlabel("seconds")
    rate.set_ylabel("tokens per second")
    figure.savefig(path, dpi=120)


def _draw_shares(axes: Any, values: list[float], label: str) -> None:
    axes.ecdf(values or [0.0])
    axes.set_xlabel(label)
    axes.set_ylabel("share of them")
    axes.grid(visible=True, alpha=0.3)
