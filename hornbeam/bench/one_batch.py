"""`hornbeam bench one-batch` and `one-batch-server`: batches of one shape, one at a time, on an engine or a server.

All requests of a batch start together; prefill ends with the last one's first token. Each shape runs once before it
is measured.
"""

import argparse
import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from hornbeam import Engine
from hornbeam.bench.client import events, open_session
from hornbeam.bench.report import append_json, show
from hornbeam.bench.serving import Target, ask, find_target, headers_of
from hornbeam.core.errors import ConfigError, HornbeamError
from hornbeam.engine.logs import set_up_logging
from hornbeam.serve.cli import FlagParser, checked

_FIRST_ID = 5
_ROW = "{:>6} {:>9} {:>10} {:>12} {:>12} {:>16} {:>16} {:>9}"
_TITLES = ("batch", "input len", "output len", "latency (s)", "prefill (s)", "input tok/s", "output tok/s", "ITL (ms)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A batch: requests, tokens of each prompt, tokens to generate for each."""

    batch_size: int
    input_len: int
    output_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRun:
    """Seconds of one batch."""

    prefill: float  # until every request has its first token
    total: float

    def figures(self, shape: Shape) -> dict[str, Any]:
        """Latencies in seconds, rates in tokens per second; decoding counts the tokens after the first."""
        num_input = shape.batch_size * shape.input_len
        num_output = shape.batch_size * shape.output_len
        decode, num_steps = self.total - self.prefill, shape.output_len - 1
        return {
            **asdict(shape),
            "latency": self.total,
            "prefill_latency": self.prefill,
            "prefill_throughput": num_input / self.prefill,
            "mean_decode_latency": decode / num_steps if num_steps else 0.0,
            "output_throughput": shape.batch_size * num_steps / decode if num_steps else 0.0,
            "overall_throughput": (num_input + num_output) / self.total,
        }


class Watch:
    """Takes the time of a batch's stream of chunks."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._started = time.perf_counter()
        self._prefill = 0.0
        self._counts: dict[int, int] = {}

    def note(self, chunk: dict[str, Any]) -> None:
        """A chunk of /generate has come. Raises HornbeamError if it is an error."""
        if chunk.get("error"):
            raise HornbeamError(f"the server answers: {chunk['error']}")
        index = chunk.get("index", 0)
        self._counts[index] = chunk["meta_info"]["completion_tokens"]
        if len(self._counts) == self._shape.batch_size and not self._prefill:
            self._prefill = time.perf_counter() - self._started

    def stop(self) -> BatchRun:
        """The stream has ended. Raises HornbeamError if answers are too short."""
        run = BatchRun(prefill=self._prefill, total=time.perf_counter() - self._started)
        expected = [self._shape.output_len] * self._shape.batch_size
        if sorted(self._counts.values()) != expected:
            raise HornbeamError(f"answers of {self._shape.output_len} tokens were asked for, not of {self._counts}")
        return run


def main(argv: Sequence[str]) -> int:
    """`hornbeam bench one-batch`. Raises HornbeamError if the engine cannot start, or answers wrongly."""
    parser = FlagParser("hornbeam bench one-batch", "Measures batches of one shape on an engine in this process.")
    _add_shape_flags(parser)
    parser.add_flags()
    values = parser.parse_flags(argv)
    own = argparse.Namespace(**{name: values.pop(name) for name in _SHAPE_FLAGS})
    user = {**checked(values), "skip_tokenizer_init": True}
    set_up_logging(user.get("log_level", "warning"), "bench")
    with Engine(**user) as engine:
        vocab_size = engine.get_server_info()["vocab_size"]

        def run(shape: Shape, body: dict[str, Any]) -> BatchRun:
            if not engine.flush_cache():
                raise HornbeamError("the prefix cache could not be flushed: requests are running")
            watch = Watch(shape)
            for chunk in engine.generate(**body):
                watch.note(chunk)
            return watch.stop()

        results = [_measure(shape, vocab_size, run) for shape in _shapes(own)]
    _report(own, results)
    return 0


def main_server(argv: Sequence[str]) -> int:
    """`hornbeam bench one-batch-server`. Raises HornbeamError if the server cannot be reached, or answers wrongly."""
    parser = argparse.ArgumentParser(
        prog="hornbeam bench one-batch-server", description="Measures batches of one shape on a running server."
    )
    parser.add_argument("--base-url", default="http://127.0.0.1:30000", metavar="URL", help="Default: %(default)s.")
    parser.add_argument("--model", "--model-path", metavar="NAME", help="None, or what the server serves.")
    parser.add_argument("--tokenizer", metavar="PATH", help="Default: the server's.")
    parser.add_argument("--header", nargs="+", default=[], metavar="NAME=VALUE", help="Sent with each request.")
    _add_shape_flags(parser)
    values = parser.parse_args(argv)
    _report(values, asyncio.run(_run_on_server(values)))
    return 0


async def _run_on_server(values: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    base_url = values.base_url.rstrip("/")
    async with open_session(headers_of(values.header)) as session:
        target: Target = await find_target(session, base_url, values.model, values.tokenizer, ids_only=True)

        async def chunks(body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
            async with session.post(f"{base_url}/generate", json=body) as response:
                if response.status != 200:
                    raise ConfigError(f"{base_url}/generate answers {response.status}: {await response.text()}")
                async for chunk in events(response):
                    yield chunk

        for shape in _shapes(values):
            body = _body(shape, target.vocab_size)
            for measured in (False, True):
                await ask(session, f"{base_url}/flush_cache", post=True)
                watch = Watch(shape)
                async for chunk in chunks(body):
                    watch.note(chunk)
                run = watch.stop()
                if measured:
                    results.append(run.figures(shape))
    return results


def _measure(shape: Shape, vocab_size: int, run: Callable[[Shape, dict[str, Any]], BatchRun]) -> dict[str, Any]:
    body = _body(shape, vocab_size)
    run(shape, body)
    return run(shape, body).figures(shape)


def _body(shape: Shape, vocab_size: int) -> dict[str, Any]:
    draw = Random(0)
    first = min(_FIRST_ID, vocab_size - 1)
    prompts = [[draw.randrange(first, vocab_size) for _ in range(shape.input_len)] for _ in range(shape.batch_size)]
    sampling = {"temperature": 0.0, "max_new_tokens": shape.output_len, "ignore_eos": True}
    return {"input_ids": prompts, "sampling_params": sampling, "stream": True}


_SHAPE_FLAGS = ("batch_size", "input_len", "output_len", "run_name", "result_filename")


def _add_shape_flags(parser: argparse.ArgumentParser) -> None:
    several = "Several are combined with each other. Default: %(default)s."
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1], metavar="N", help=f"Requests. {several}")
    parser.add_argument("--input-len", type=int, nargs="+", default=[1024], metavar="N", help=f"Tokens. {several}")
    parser.add_argument("--output-len", type=int, nargs="+", default=[16], metavar="N", help=f"Tokens. {several}")
    parser.add_argument("--run-name", default="default", help="Told in the JSON lines. Default: %(default)s.")
    parser.add_argument("--result-filename", type=Path, metavar="FILE", help="Append JSON lines to it.")


def _shapes(values: argparse.Namespace) -> Iterable[Shape]:
    for batch, num_input, num_output in itertools.product(values.batch_size, values.input_len, values.output_len):
        if min(batch, num_input, num_output) < 1:
            raise ConfigError("--batch-size, --input-len and --output-len must be at least 1")
        yield Shape(batch_size=batch, input_len=num_input, output_len=num_output)


def _report(values: argparse.Namespace, results: Sequence[dict[str, Any]]) -> None:
    show(_ROW.format(*_TITLES))
    for result in results:
        times = f"{result['latency']:.3f}", f"{result['prefill_latency']:.3f}"
        rates = f"{result['prefill_throughput']:.1f}", f"{result['output_throughput']:.1f}"
        gap = f"{1000 * result['mean_decode_latency']:.2f}"
        show(_ROW.format(result["batch_size"], result["input_len"], result["output_len"], *times, *rates, gap))
    append_json(values.result_filename, ({"run_name": values.run_name, **result} for result in results))
