"""From the records of requests to the figures of a serving benchmark, and the report that people and scripts know."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from hornbeam.bench.client import Record

_WIDTH = 50
_LATENCIES = (  # key, title, name in its lines, percentiles beside mean and median
    ("e2e_latency", "End-to-End Latency", "E2E Latency", (90, 99)),
    ("ttft", "Time to First Token", "TTFT", (99,)),
    ("tpot", "Time per Output Token (excl. 1st token)", "TPOT", (99,)),
    ("itl", "Inter-Token Latency", "ITL", (95, 99)),
)


def figures(records: Sequence[Record], seconds: float) -> dict[str, Any]:
    """Counts, rates per second, and latencies in ms; of the requests that succeeded."""
    done = [record for record in records if not record.error]
    num_input, num_output = sum(r.num_input for r in done), sum(r.num_output for r in done)
    latencies = {
        "e2e_latency": [r.finished - r.started for r in done],
        "ttft": [r.first_token - r.started for r in done if r.first_token],
        "tpot": [(r.finished - r.first_token) / (r.num_output - 1) for r in done if r.num_output > 1],
        "itl": [gap for r in done for gap in r.gaps],
    }
    result: dict[str, Any] = {
        "duration": seconds,
        "completed": len(done),
        "failed": len(records) - len(done),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(done) / seconds,
        "input_throughput": num_input / seconds,
        "output_throughput": num_output / seconds,
        "total_throughput": (num_input + num_output) / seconds,
        "concurrency": sum(latencies["e2e_latency"]) / seconds,
        "max_concurrent_requests": most_at_once(done),
    }
    for key, _, _, percentiles in _LATENCIES:
        result |= _spread(key, [value * 1000 for value in latencies[key]], percentiles)
    return result


def _spread(key: str, values: Sequence[float], percentiles: Sequence[int]) -> dict[str, float]:
    values = sorted(values) or [0.0]
    result = {
        f"mean_{key}_ms": statistics.fmean(values),
        f"median_{key}_ms": statistics.median(values),
        f"std_{key}_ms": statistics.pstdev(values),
        f"max_{key}_ms": values[-1],
    }
    return result | {f"p{q}_{key}_ms": values[min(len(values) - 1, len(values) * q // 100)] for q in percentiles}


def most_at_once(records: Sequence[Record]) -> int:
    """Requests under way at the same time."""
    changes = sorted([(r.started, 1) for r in records] + [(r.finished, -1) for r in records])
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def report(backend: str, rate: float, max_concurrency: int | None, result: dict[str, Any]) -> str:
    """The report; scripts read its lines."""
    lines = [
        f"\n{' Serving Benchmark Result ':=^{_WIDTH}}",
        _line("Backend:", backend),
        _line("Traffic request rate:", rate),
        _line("Max request concurrency:", max_concurrency or "not set"),
        _line("Successful requests:", result["completed"]),
        *([_line("Failed requests:", result["failed"])] if result["failed"] else []),
        _line("Benchmark duration (s):", result["duration"]),
        _line("Total input tokens:", result["total_input_tokens"]),
        _line("Total generated tokens:", result["total_output_tokens"]),
        _line("Request throughput (req/s):", result["request_throughput"]),
        _line("Input token throughput (tok/s):", result["input_throughput"]),
        _line("Output token throughput (tok/s):", result["output_throughput"]),
        _line("Total token throughput (tok/s):", result["total_throughput"]),
        _line("Peak concurrent requests:", result["max_concurrent_requests"]),
        _line("Concurrency:", result["concurrency"]),
    ]
    for key, title, name, percentiles in _LATENCIES:
        lines.append(f"{title:-^{_WIDTH}}")
        lines.append(_line(f"Mean {name} (ms):", result[f"mean_{key}_ms"]))
        lines.append(_line(f"Median {name} (ms):", result[f"median_{key}_ms"]))
        lines += [_line(f"P{q} {name} (ms):", result[f"p{q}_{key}_ms"]) for q in percentiles]
        if key == "itl":
            lines.append(_line(f"Max {name} (ms):", result[f"max_{key}_ms"]))
    return "\n".join([*lines, "=" * _WIDTH])


def _line(name: str, value: object) -> str:
    return f"{name:<40} {f'{value:<10.2f}' if isinstance(value, float) and value != math.inf else value!s:<10}"
