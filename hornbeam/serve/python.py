"""`hornbeam.Engine`: a model in this process, without HTTP.

The engine runs on a thread, the frontend in an event loop on another, so the calls work inside and outside of the
caller's own event loop.
"""

import asyncio
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Literal, NoReturn, TypeVar

from hornbeam.config.flags import check_flags
from hornbeam.config.resolve import resolve_serve
from hornbeam.core.errors import BadRequest, EngineDead
from hornbeam.engine.build import build_engine
from hornbeam.engine.parts import Built
from hornbeam.engine.stream import Stream
from hornbeam.engine.transport import ThreadEngine
from hornbeam.models.index import DEFAULT_MODEL_NAME
from hornbeam.serve.admin import read_profile_options
from hornbeam.serve.generate import Answers, parse_generate
from hornbeam.serve.serving import Serving, engine_flags, with_model
from hornbeam.serve.tables import PAUSE

T = TypeVar("T")

CLOSE_SECONDS = 30.0
_END = object()  # of a stream


class Engine:
    """Generates text with a model in this process. Safe to share among threads.

    Args:
        server_args: as the flags of `hornbeam serve`, with underscores: `model_path=...`, `max_total_tokens=...`.

    Raises:
        ConfigError: a flag, the model or the machine cannot work.
        EngineDead: the engine failed otherwise.
    """

    def __init__(self, **server_args: Any) -> None:
        self._open(build_engine, check_flags(server_args))

    def _open(self, build: Callable[[Mapping[str, Any]], Built], user: Mapping[str, Any]) -> None:
        options = resolve_serve(user, DEFAULT_MODEL_NAME)
        user = with_model(user)
        flags = engine_flags(user)
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="hornbeam-frontend", daemon=True)
        thread.start()
        self._serving = Serving(ThreadEngine(lambda: build(flags)), options, user)
        self._shutdown = weakref.finalize(self, _shut_down, self._serving, self._loop, thread)
        try:
            self._call(self._serving.start())
        except BaseException:
            self.shutdown()
            raise

    def generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        return_logprob: bool | list[bool] = False,
        logprob_start_len: int | list[int] | None = None,
        top_logprobs_num: int | list[int] | None = None,
        token_ids_logprob: list[int] | list[list[int]] | None = None,
        stream: bool = False,
        rid: str | list[str] | None = None,
        priority: int | list[int] | None = None,
    ) -> Any:
        """Generate for one prompt or a batch; arguments and results are those of POST /generate.

        Returns:
            A dict with "text", "output_ids" and "meta_info"; for a batch a list of them; with `stream` an iterator of
            such dicts, each with all there is so far (or what is new, with `incremental_streaming_output`).

        Raises:
            BadRequest: an argument is wrong; `field` names it.
            Overloaded, EngineDead: it cannot be served, now or any more.
        """
        body = {
            "text": prompt,
            "input_ids": input_ids,
            "sampling_params": sampling_params,
            "return_logprob": return_logprob,
            "logprob_start_len": logprob_start_len,
            "top_logprobs_num": top_logprobs_num,
            "token_ids_logprob": token_ids_logprob,
            "stream": stream,
            "rid": rid,
            "priority": priority,
        }
        return self._iterate(self._chunks(body)) if stream else self._call(self._whole(body))

    async def async_generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        return_logprob: bool | list[bool] = False,
        logprob_start_len: int | list[int] | None = None,
        top_logprobs_num: int | list[int] | None = None,
        token_ids_logprob: list[int] | list[list[int]] | None = None,
        stream: bool = False,
        rid: str | list[str] | None = None,
        priority: int | list[int] | None = None,
    ) -> Any:
        """`generate` for callers with an event loop. Cancelling ends the generation; a stream is an async iterator."""
        body = {
            "text": prompt,
            "input_ids": input_ids,
            "sampling_params": sampling_params,
            "return_logprob": return_logprob,
            "logprob_start_len": logprob_start_len,
            "top_logprobs_num": top_logprobs_num,
            "token_ids_logprob": token_ids_logprob,
            "stream": stream,
            "rid": rid,
            "priority": priority,
        }
        if stream:
            return self._async_iterate(self._chunks(body))
        return await asyncio.wrap_future(self._begin(self._whole(body)))

    def flush_cache(self) -> bool:
        """Drop the prefix cache. False if requests are running."""
        return self._call(self._serving.frontend.commands.flush())

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        """End the request with this very id, or all; their callers get what there is. Unknown ids are ignored."""

        async def abort() -> None:
            frontend = self._serving.frontend
            frontend.abort_all() if abort_all else frontend.abort(rid)

        self._call(abort())

    def pause_generation(self, mode: Literal["abort", "retract", "in_place"] = "abort") -> None:
        """Run nothing until `continue_generation`; `mode` says what becomes of the running requests.

        Raises:
            BadRequest: an unknown mode.
        """
        fields = PAUSE.read({"mode": mode})
        self._call(self._serving.frontend.commands.pause(fields["mode"]))

    def continue_generation(self) -> None:
        """Go on after `pause_generation`."""
        self._call(self._serving.frontend.commands.resume())

    def start_profile(self, **options: Any) -> dict[str, Any]:
        """Record steps with torch's profiler; `options` are the fields of /start_profile.

        Returns:
            "file", the trace, where `num_steps` was given: they are done then. Else `stop_profile` ends it.

        Raises:
            BadRequest: an option is wrong, or a profile is being recorded already.
        """
        return self._call(self._serving.frontend.commands.start_profile(read_profile_options(options)))

    def stop_profile(self) -> dict[str, Any]:
        """End the profile; "file" is the trace. Raises BadRequest if there is none."""
        return self._call(self._serving.frontend.commands.stop_profile())

    def encode(self, prompt: Any = None, **options: Any) -> NoReturn:
        """Refused: embedding models are not supported yet. Raises BadRequest."""
        raise BadRequest("this model generates text: embeddings are not supported yet", "prompt")

    async def async_encode(self, prompt: Any = None, **options: Any) -> NoReturn:
        """Refused, as `encode`. Raises BadRequest."""
        self.encode(prompt, **options)

    def get_server_info(self) -> dict[str, Any]:
        """Options, facts and the scheduler's numbers, as /server_info has them."""
        return self._call(self._serving.info())

    def shutdown(self) -> None:
        """End the engine, aborting what runs. Returns when it has ended; does nothing the second time."""
        self._shutdown()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    # In the event loop of the frontend.

    async def _submit(self, body: Mapping[str, Any]) -> tuple[Stream, Answers]:
        options, frontend = self._serving.options, self._serving.frontend
        call = parse_generate(body, options.stream_interval)
        stream = await frontend.submit(call.requests)
        return stream, Answers(call, stream, options.incremental_streaming, frontend.tokenizer)

    async def _whole(self, body: Mapping[str, Any]) -> Any:
        stream, answers = await self._submit(body)
        try:
            return await answers.whole()
        finally:
            stream.close()

    async def _chunks(self, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        stream, answers = await self._submit(body)
        try:
            async for chunk in answers.chunks():
                yield chunk
        finally:
            stream.close()

    # Between the caller's thread and that event loop.

    def _begin(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        if self._loop.is_closed():
            work.close()
            raise EngineDead("this Engine was shut down")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        future = self._begin(work)
        try:
            return future.result()
        except BaseException:  # Ctrl-C, too, must not leave the work running
            future.cancel()
            raise

    def _iterate(self, chunks: AsyncGenerator[T, None]) -> Iterator[T]:
        try:
            while (chunk := self._call(_next(chunks))) is not _END:
                yield chunk
        finally:
            self._call(chunks.aclose())

    async def _async_iterate(self, chunks: AsyncGenerator[T, None]) -> AsyncIterator[T]:
        try:
            while (chunk := await asyncio.wrap_future(self._begin(_next(chunks)))) is not _END:
                yield chunk
        finally:
            await asyncio.wrap_future(self._begin(chunks.aclose()))


async def _next(chunks: AsyncIterator[Any]) -> Any:
    return await anext(chunks, _END)


def _shut_down(serving: Serving, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """Runs at `shutdown`, when the Engine is forgotten, or at the interpreter's exit."""
    closing = serving.frontend.close(drain=False, timeout=CLOSE_SECONDS)
    asyncio.run_coroutine_threadsafe(closing, loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
