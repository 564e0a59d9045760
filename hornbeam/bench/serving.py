"""`hornbeam bench serving`: sends requests to a running server, as fast as asked, and reports throughput and latencies.

Open loop: requests come by a Poisson process (`--request-rate`), whatever the server does. Closed loop: so many are
under way at once (`--max-concurrency`), and the next is sent when one ends.
"""

import argparse
import asyncio
import dataclasses
import json
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from hornbeam.bench.client import BACKENDS, Call, Record, open_session, send
from hornbeam.bench.datasets import Sample, add_dataset_flags, draw_samples
from hornbeam.bench.latencies import figures, report
from hornbeam.bench.report import append_json, show
from hornbeam.core.errors import ConfigError, HornbeamError
from hornbeam.text.loading import load_tokenizer
from hornbeam.text.tokenizer import Tokenizer
from hornbeam.weights.hub import local_path

if TYPE_CHECKING:
    import aiohttp

WARM_UP_TOKENS = 32
_TOLD_FLAGS = (
    *("backend", "dataset_name", "request_rate", "max_concurrency", "sharegpt_output_len", "random_input_len"),
    *("random_output_len", "random_range_ratio", "num_prompts", "seed", "tag"),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server, and what it says about its model."""

    base_url: str
    model: str
    vocab_size: int
    tokenizer: Tokenizer | None


def main(argv: Sequence[str]) -> int:
    """`hornbeam bench serving`.

    Raises:
        HornbeamError: a flag is wrong, the server cannot be reached, or a warm-up request fails.
    """
    values = _parser().parse_args(argv)
    if values.request_rate <= 0 or (values.max_concurrency or 1) < 1:
        raise ConfigError("--request-rate must be above 0, --max-concurrency at least 1")
    result = asyncio.run(_run(values))
    append_json(values.output_file, [result])
    if values.plot is not None:
        from hornbeam.bench.plot import plot_serving

        plot_serving(result, values.plot)
    return 1 if result["failed"] else 0


async def _run(values: argparse.Namespace) -> dict[str, Any]:
    base_url = (values.base_url or f"http://{values.host}:{values.port}").rstrip("/")
    async with open_session(headers_of(values.header)) as session:
        target = await find_target(session, base_url, values.model, values.tokenizer, values.tokenize_prompt)
        samples = draw_samples(values, target.tokenizer, target.vocab_size)
        call = _call(values, target)
        for sample in (samples[:1] * values.warmup_requests)[: values.warmup_requests]:
            short = dataclasses.replace(sample, num_output=min(WARM_UP_TOKENS, sample.num_output))
            if error := (await send(session, call, short)).error:
                raise HornbeamError(f"a warm-up request failed: {error}")
        if values.flush_cache:
            await ask(session, f"{base_url}/flush_cache", post=True)
        if values.profile:
            await ask(session, f"{base_url}/start_profile", post=True)
        started = time.perf_counter()
        records = await send_all(session, call, samples, values.request_rate, values.max_concurrency, values)
        seconds = time.perf_counter() - started
        if values.profile:
            await ask(session, f"{base_url}/stop_profile", post=True)
    result = figures(records, seconds)
    show(report(values.backend, values.request_rate, values.max_concurrency, result))
    for error in sorted({record.error for record in records if record.error})[:5]:
        show(f"failed: {error}")
    told = {name: getattr(values, name) for name in _TOLD_FLAGS} | {"model": target.model}
    told["request_rate"] = "inf" if math.isinf(values.request_rate) else values.request_rate
    return told | result | (_details(records) if values.output_details or values.plot else {})


async def send_all(
    session: "aiohttp.ClientSession",
    call: Call,
    samples: Sequence[Sample],
    rate: float,
    max_concurrency: int | None,
    values: argparse.Namespace,
) -> list[Record]:
    """Send each sample once, in order: at `rate` per second, but never more than `max_concurrency` at once."""
    from tqdm import tqdm

    gate: Any = asyncio.Semaphore(max_concurrency) if max_concurrency else nullcontext()
    with tqdm(total=len(samples), disable=values.disable_tqdm) as progress:

        async def send_one(sample: Sample) -> Record:
            async with gate:
                record = await send(session, call, sample)
            progress.update()
            return record

        tasks = [asyncio.create_task(send_one(sample)) async for sample in arrivals(samples, rate, Random(values.seed))]
        return await asyncio.gather(*tasks)


async def arrivals(samples: Sequence[Sample], rate: float, draw: Random) -> AsyncIterator[Sample]:
    """The samples, when they are due: a Poisson process. Being late with one does not delay the next."""
    started, due = time.perf_counter(), 0.0
    for sample in samples:
        delay = started + due - time.perf_counter()
        if delay > 0:
            await asyncio.sleep(delay)
        yield sample
        due += draw.expovariate(rate) if math.isfinite(rate) else 0.0


async def find_target(
    session: "aiohttp.ClientSession", base_url: str, model: str | None, tokenizer_path: str | None, ids_only: bool
) -> Target:
    """Ask the server what it serves. With `ids_only` no tokenizer is loaded, if the server tells its vocabulary's size.

    Raises:
        ConfigError: the server cannot be reached, or its tokenizer is not found here.
    """
    models = await ask(session, f"{base_url}/v1/models")
    facts = await ask(session, f"{base_url}/get_server_info", optional=True)
    name = model or models["data"][0]["id"]
    if ids_only and "vocab_size" in facts:
        return Target(base_url=base_url, model=name, vocab_size=facts["vocab_size"], tokenizer=None)
    path = tokenizer_path or facts.get("tokenizer_path") or facts.get("model_path") or name
    if tokenizer_path is None:
        path = (await ask(session, f"{base_url}/get_model_info", optional=True)).get("tokenizer_path", path)
    try:
        tokenizer = load_tokenizer(local_path(path, None, "dummy"))
    except ConfigError as error:
        raise ConfigError(f"{error}; name the tokenizer's folder by --tokenizer, or send --tokenize-prompt") from error
    return Target(base_url=base_url, model=name, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer)


async def ask(session: "aiohttp.ClientSession", url: str, optional: bool = False, post: bool = False) -> dict[str, Any]:
    """A route's JSON, or {} if it answers something else, or (`optional`) not at all.

    Raises:
        ConfigError: the server cannot be reached, or refuses.
    """
    import aiohttp

    try:
        async with session.request("POST" if post else "GET", url) as response:
            text = await response.text()
    except aiohttp.ClientError as error:
        raise ConfigError(f"{url} cannot be reached ({error}); is the server running?") from error
    if response.status != 200 and not optional:
        raise ConfigError(f"{url} answers {response.status}: {text[:300]}")
    try:
        answer = json.loads(text)
    except ValueError:
        return {}
    return answer if response.status == 200 and isinstance(answer, dict) else {}


def headers_of(pairs: Sequence[str]) -> dict[str, str]:
    """Of "name=value" or "name: value". Raises ConfigError for anything else."""
    headers = {}
    for pair in pairs:
        separator = min((s for s in ("=", ":") if s in pair), key=pair.index, default="")
        if not separator:
            raise ConfigError(f"--header takes NAME=VALUE, not {pair!r}")
        name, _, value = pair.partition(separator)
        headers[name.strip()] = value.strip()
    return headers


def _call(values: argparse.Namespace, target: Target) -> Call:
    try:
        extra = json.loads(values.extra_request_body or "{}")
    except ValueError as error:
        raise ConfigError(f"--extra-request-body is not JSON: {error}") from error
    return Call(
        backend=values.backend,
        base_url=target.base_url,
        model=values.served_model_name or target.model,
        stream=not values.disable_stream,
        ignore_eos=not values.disable_ignore_eos,
        send_ids=values.tokenize_prompt,
        return_logprob=values.return_logprob,
        extra=extra,
    )


def _details(records: Sequence[Record]) -> dict[str, Any]:
    start = min(record.started for record in records)
    return {
        "input_lens": [record.num_input for record in records],
        "output_lens": [record.num_output for record in records],
        "start_times": [record.started - start for record in records],
        "ttfts": [max(0.0, record.first_token - record.started) for record in records],
        "itls": [record.gaps for record in records],
        "generated_texts": [record.text for record in records],
        "errors": [record.error for record in records],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hornbeam bench serving", description=__doc__.partition("\n")[0])
    server = parser.add_argument_group("server")
    server.add_argument(
        "--backend", choices=BACKENDS, default="hornbeam", metavar="NAME", help=f"API: {', '.join(BACKENDS)}."
    )
    server.add_argument("--base-url", metavar="URL", help="In place of --host and --port.")
    server.add_argument("--host", default="127.0.0.1", help="Default: %(default)s.")
    server.add_argument("--port", type=int, default=30000, help="Default: %(default)s.")
    server.add_argument("--model", metavar="NAME", help="Default: what the server serves.")
    server.add_argument("--served-model-name", metavar="NAME", help="What requests call the model.")
    server.add_argument("--tokenizer", metavar="PATH", help="Default: the server's.")
    server.add_argument("--header", nargs="+", default=[], metavar="NAME=VALUE", help="Sent with each request.")
    add_dataset_flags(parser, "random")
    load = parser.add_argument_group("load")
    load.add_argument(
        "--request-rate", type=float, default=math.inf, metavar="X", help="Per second. Default: all at once."
    )
    load.add_argument("--max-concurrency", type=int, metavar="N", help="Requests under way at once, at most.")
    load.add_argument(
        "--warmup-requests", type=int, default=1, metavar="N", help="Before the clock starts. Default: 1."
    )
    load.add_argument("--flush-cache", action="store_true", help="Empty the server's prefix cache after the warm-up.")
    load.add_argument("--profile", action="store_true", help="Have the server profile itself meanwhile.")
    body = parser.add_argument_group("what requests ask for")
    for name, what in _SWITCHES.items():
        body.add_argument(f"--{name}", action="store_true", help=what)
    body.add_argument("--extra-request-body", metavar="JSON", help="Merged into each body.")
    output = parser.add_argument_group("output")
    output.add_argument("--output-file", type=Path, metavar="FILE", help="Append a JSON line to it.")
    output.add_argument("--output-details", action="store_true", help="The JSON line also tells of each request.")
    output.add_argument("--plot", type=Path, metavar="FILE", help="Draw the latencies as a PNG (needs matplotlib).")
    output.add_argument("--tag", help="Told in the JSON line.")
    output.add_argument("--disable-tqdm", action="store_true", help="Show no progress.")
    return parser


_SWITCHES = {
    "disable-stream": "Whole answers instead of streams.",
    "disable-ignore-eos": "Answers may end before their length.",
    "tokenize-prompt": "Send token ids instead of text.",
    "return-logprob": "Ask for log probabilities.",
}
