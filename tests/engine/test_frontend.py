"""The frontend over a handle that the test plays."""

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine

import fake_engine
import pytest

from hornbeam.core.errors import BadRequest, EngineDead, HornbeamError, Overloaded
from hornbeam.core.request import Finish, RequestOutput, SamplingParams
from hornbeam.engine import envelope
from hornbeam.engine.frontend import LONG_TEXT, Frontend, known_ids
from hornbeam.engine.stream import GenerationRequest
from hornbeam.text.session import TextOptions

pytestmark = pytest.mark.pure

READY = envelope.Ready(100_000, fake_engine.VOCAB, 1000, 8, {})


class PlayedEngine:
    def __init__(self) -> None:
        self.commands: list[envelope.Command] = []

    async def start(self, on_event, on_end) -> None:
        self.tell, self.end = on_event, on_end

    def send(self, command) -> None:
        self.commands.append(command)

    async def close(self, timeout) -> None:
        pass

    def generate(self, text: str, finish=None, num_generated: int | None = None) -> None:
        """News of the request submitted last."""
        submit = [command for command in self.commands if isinstance(command, envelope.Submit)][-1]
        output = RequestOutput(
            rid=submit.requests[0].rid,
            token_ids=tuple(map(ord, text)),
            finish=finish,
            num_generated=len(text) if num_generated is None else num_generated,
        )
        self.tell(envelope.StepOutputs((output,)))


def run(test: Callable[[PlayedEngine, Frontend], Coroutine]) -> None:
    async def main() -> None:
        engine = PlayedEngine()
        frontend = Frontend(engine)
        await frontend.start()
        engine.tell(READY)
        await frontend.open(fake_engine.make_tokenizer())
        await test(engine, frontend)

    asyncio.run(main())


def test_stop_string_cuts_the_engines_truth_and_late_news_are_ignored():
    async def test(engine, frontend):
        request = GenerationRequest(text="x", text_options=TextOptions(stop=("cd",)), rid="r", stream_interval=1)
        stream = await frontend.submit([request])
        key = engine.commands[-1].requests[0].rid
        engine.generate("ab")
        deltas = [await anext(stream)]
        engine.generate("cdef", num_generated=6)
        engine.generate("g", num_generated=7)
        deltas += [delta async for delta in stream]
        assert [delta.text for delta in deltas] == ["ab", ""]
        assert (deltas[-1].token_ids, deltas[-1].num_generated) == ((ord("c"), ord("d")), 4)
        assert engine.commands[-1] == envelope.Abort(key, keep_tokens=4)
        again = await frontend.submit([request])
        assert engine.commands[-1].requests[0].rid != key, "late news of the first must not reach the second"
        again.close()

    run(test)


def test_what_a_slow_reader_has_missed_is_one_delta():
    async def test(engine, frontend):
        stream = await frontend.submit([GenerationRequest(text="x", stream_interval=1)])
        engine.generate("a")
        engine.generate("b", num_generated=2)
        delta = await anext(stream)
        assert (delta.text, delta.num_generated, delta.finish) == ("ab", 2, None)
        engine.generate("c", num_generated=3)
        engine.generate("d", Finish(type="length", length=4), num_generated=4)
        (delta,) = [delta async for delta in stream]
        assert (delta.text, delta.token_ids, delta.num_generated) == ("cd", (99, 100), 4)

    run(test)


def test_only_who_reads_along_or_stops_at_a_string_hears_of_each_step():
    async def test(engine, frontend):
        whole = GenerationRequest(text="x")
        await frontend.submit([whole])
        await frontend.submit([dataclasses.replace(whole, stream_interval=1)])
        await frontend.submit([dataclasses.replace(whole, text_options=TextOptions(stop=("a",)))])
        told = [request.told_each_step for command in engine.commands for request in command.requests]
        assert told == [False, True, True]

    run(test)


def test_the_tokenizers_own_end_is_told_to_the_engine():
    async def test(engine, frontend):
        await frontend.submit([GenerationRequest(text="x", sampling=SamplingParams(stop_token_ids=(5,)))])
        assert set(engine.commands[-1].requests[0].sampling.stop_token_ids) == {5, fake_engine.EOS}
        await frontend.submit([GenerationRequest(text="x", sampling=SamplingParams(ignore_eos=True))])
        assert engine.commands[-1].requests[0].sampling.stop_token_ids == ()

    run(test)


def test_death_fails_those_in_flight_and_those_being_tokenized():
    async def test(engine, frontend):
        stream = await frontend.submit([GenerationRequest(text="x")])
        info = asyncio.create_task(frontend.commands.info())
        late = asyncio.create_task(frontend.submit([GenerationRequest(text="x" * LONG_TEXT)]))
        await asyncio.sleep(0)
        engine.end("the engine process was killed")
        for waiting in (anext(stream), info, late):
            with pytest.raises(EngineDead, match="was killed"):
                await waiting
        assert frontend.num_in_flight == 0

    run(test)


def test_a_fault_in_one_requests_text_fails_it_alone(monkeypatch, caplog):
    async def test(engine, frontend):
        good = await frontend.submit([GenerationRequest(text="x", stream_interval=1)])
        bad = await frontend.submit([GenerationRequest(text="x", stream_interval=1)])
        monkeypatch.setattr(bad.requests[0].session, "feed", lambda *args, **kwargs: 1 / 0)
        engine.generate("a")
        with pytest.raises(HornbeamError, match="ZeroDivisionError"):
            await anext(bad)
        assert isinstance(engine.commands[-1], envelope.Abort)
        assert frontend.num_in_flight == 1
        good.close()
        assert frontend.num_in_flight == 0

    run(test)


def test_all_or_none_of_a_batch():
    async def test(engine, frontend):
        for ids in ((), (-1,), (fake_engine.VOCAB,)):
            with pytest.raises(BadRequest) as error:
                await frontend.submit([GenerationRequest(text="x"), GenerationRequest(token_ids=ids)])
            assert error.value.field == "input_ids"
        assert engine.commands == []
        assert frontend.num_in_flight == 0

    run(test)


def test_known_ids_are_integers_of_the_vocabulary():
    ids = known_ids([0, fake_engine.VOCAB - 1], "x", fake_engine.VOCAB)
    assert ids == (0, fake_engine.VOCAB - 1)
    assert known_ids(ids, "x", fake_engine.VOCAB) == ids
    assert known_ids([], "x", fake_engine.VOCAB) == ()
    for bad in (-1, fake_engine.VOCAB, 2**64, -(2**64), True, 1.0, float("nan"), "1", None, [1], (), {}):
        with pytest.raises(BadRequest, match="x must hold token ids, integers of") as error:
            known_ids([1, bad], "x", fake_engine.VOCAB)
        assert error.value.field == "x"


def test_before_it_is_ready_and_while_it_ends():
    async def main() -> None:
        engine = PlayedEngine()
        frontend = Frontend(engine)
        with pytest.raises(Overloaded, match="still starting"):
            frontend.check_health()
        await frontend.start()
        engine.tell(READY)
        with pytest.raises(Overloaded, match="still starting"):
            await frontend.submit([GenerationRequest(text="x")])
        await frontend.open(None)
        frontend.check_health()
        closing = asyncio.create_task(frontend.close(drain=True, timeout=1))
        await closing
        with pytest.raises(EngineDead, match="shutting down"):
            frontend.check_health()

    asyncio.run(main())
