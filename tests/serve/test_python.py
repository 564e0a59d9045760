"""hornbeam.Engine over the fake engine."""

import asyncio
import threading
import time

import fake_engine
import pytest

import hornbeam
from hornbeam.core.errors import BadRequest, ConfigError, EngineDead
from hornbeam.serve import python

pytestmark = pytest.mark.pure

FOREVER = {"max_new_tokens": 190, "ignore_eos": True}


@pytest.fixture(autouse=True)
def _fake(monkeypatch):
    monkeypatch.setattr(python, "build_engine", fake_engine.build)


@pytest.fixture
def engine():
    with hornbeam.Engine(model_path="fake", random_seed=30) as engine:
        yield engine


def test_one_and_many(engine):
    assert engine.generate("abc", {"max_new_tokens": 2})["text"] == "de"
    assert [answer["text"] for answer in engine.generate(["a", "x"], {"max_new_tokens": 1})] == ["b", "y"]
    answer = engine.generate(input_ids=[97], sampling_params={"max_new_tokens": 1}, return_logprob=True, rid="me")
    assert answer["meta_info"]["output_token_logprobs"] == [[-0.5, 98, None]]
    assert answer["meta_info"]["id"] == "me"


def test_stream(engine):
    chunks = list(engine.generate("a", {"max_new_tokens": 3}, stream=True))
    assert [chunk["text"] for chunk in chunks] == ["b", "bc", "bcd"]
    assert [chunk["output_ids"] for chunk in chunks] == [[98], [98, 99], [98, 99, 100]]


def test_leaving_a_stream_ends_the_generation(engine):
    for _ in engine.generate("a", FOREVER, stream=True):
        break
    assert engine.flush_cache()


def test_async_inside_a_running_loop(engine):
    async def main():
        answers = await asyncio.gather(*(engine.async_generate(text, {"max_new_tokens": 2}) for text in "abc"))
        assert [answer["text"] for answer in answers] == ["bc", "cd", "de"]
        stream = await engine.async_generate("a", {"max_new_tokens": 2}, stream=True)
        assert [chunk["text"] async for chunk in stream] == ["b", "bc"]
        assert engine.generate("a", {"max_new_tokens": 1})["text"] == "b"
        task = asyncio.create_task(engine.async_generate("a", FOREVER))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0.05)

    asyncio.run(main())
    assert engine.flush_cache()


def test_many_threads(engine):
    answers = {}

    def ask(text):
        answers[text] = engine.generate(text, {"max_new_tokens": 1})["text"]

    threads = [threading.Thread(target=ask, args=(text,)) for text in "abcdefgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {text: chr(ord(text) + 1) for text in "abcdefgh"}


def test_info_and_errors(engine):
    info = engine.get_server_info()
    assert (info["context_len"], info["internal_states"][0]["num_running"]) == (200, 0)
    with pytest.raises(BadRequest, match="temprature") as caught:
        engine.generate("a", {"temprature": 1})
    assert caught.value.field == "temprature"
    with pytest.raises(BadRequest):
        list(engine.generate("", stream=True))
    with pytest.raises(ConfigError, match="unknown option 'modle'"):
        hornbeam.Engine(modle="x")


def test_after_shutdown(engine):
    num_threads = threading.active_count()
    engine.shutdown()
    engine.shutdown()
    assert threading.active_count() <= num_threads - 2
    with pytest.raises(EngineDead):
        engine.generate("a")


def test_a_failed_start_raises_the_reason_and_leaves_no_thread(monkeypatch):
    def refuse(user):
        raise ConfigError("no room for a cache")

    monkeypatch.setattr(python, "build_engine", refuse)
    before = threading.active_count()
    with pytest.raises(ConfigError, match="no room"):
        hornbeam.Engine(model_path="fake")
    time.sleep(0.05)
    assert threading.active_count() <= before


def test_abort_gives_what_there_is():
    with hornbeam.Engine(model_path="fake", random_seed=20) as engine:
        answers = []
        thread = threading.Thread(target=lambda: answers.append(engine.generate("a", FOREVER, rid="one")))
        thread.start()
        time.sleep(0.3)
        engine.abort_request("other")
        engine.abort_request("one")
        thread.join(5)
        assert answers[0]["meta_info"]["finish_reason"]["type"] == "abort"
        assert answers[0]["text"].startswith("bc")
        engine.abort_request(abort_all=True)


def test_pause_and_continue(engine):
    engine.pause_generation("in_place")
    thread = threading.Thread(target=lambda: engine.generate("a", {"max_new_tokens": 2}))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    engine.continue_generation()
    thread.join(5)
    assert not thread.is_alive()
    with pytest.raises(BadRequest, match="mode must be in_place, retract or abort"):
        engine.pause_generation("nap")


def test_what_is_not_there_is_refused(engine):
    with pytest.raises(BadRequest, match="embeddings are not supported"):
        engine.encode("a")
    with pytest.raises(BadRequest, match="no profiler"):
        engine.start_profile()
    with pytest.raises(BadRequest, match="no profile is being recorded"):
        engine.stop_profile()
