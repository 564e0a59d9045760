"""Health, auth, disconnects, aborts, error shapes: what operators meet."""

import asyncio
import threading
import time

import fake_engine
import httpx
import pytest
from serve_helpers import eventually

from hornbeam.config.resolve import resolve_serve
from hornbeam.core.errors import ConfigError
from hornbeam.engine.transport import ThreadEngine
from hornbeam.serve.serving import Serving

pytestmark = pytest.mark.pure

LONG = {"text": "a", "sampling_params": {"max_new_tokens": 190, "ignore_eos": True}}


def test_health(server):
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/health_generate").status_code == 200


def test_info(server):
    info = server.http.get("/server_info").json()
    assert (info["context_len"], info["max_total_num_tokens"], info["version"]) == (200, 2000, "0.1.0")
    assert info["internal_states"][0]["num_running"] == 0
    assert server.http.get("/get_server_info").json()["port"] == 30000
    model = server.http.get("/model_info").json()
    assert (model["model_path"], model["architectures"], model["is_generation"]) == ("fake", ["Fake"], True)
    assert server.http.get("/get_model_info").json() == model


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("GET", "/generate", 405)])
def test_unknown_paths_and_methods(server, method, path, status):
    error = server.http.request(method, path).json()
    assert (error["object"], error["code"], error["error"]["code"]) == ("error", status, status)
    assert path in error["message"]


@pytest.mark.parametrize("kind", ["stream", "whole", "queued"])
def test_a_disconnect_frees_the_slot(start, kind):
    server = start(random_seed=30, max_running_requests=1)
    other = threading.Thread(target=lambda: server.http.post("/generate", json=LONG))
    if kind == "queued":
        other.start()
        eventually(lambda: server.num_running() == 1)
    before = server.num_running()
    with httpx.Client(base_url=server.url) as client:
        if kind == "stream":
            with client.stream("POST", "/generate", json={**LONG, "stream": True}) as response:
                lines = response.iter_lines()  # kept: when it goes, it closes the response
                next(lines)
                assert server.num_running() == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/generate", json=LONG, timeout=0.2)
    eventually(lambda: server.num_running() == before, timeout=1)
    assert server.serving.frontend.num_in_flight == before
    server.http.post("/abort_request", json={"abort_all": True})
    if kind == "queued":
        other.join(5)


def test_a_batch_is_freed_as_a_whole(start):
    server = start(random_seed=30)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/generate", json={**LONG, "text": ["a", "b", "c"]}, timeout=0.2)
    eventually(lambda: server.num_running() == 0, timeout=3)


def test_duplicate_rid_in_flight(start):
    server = start(random_seed=30)
    thread = threading.Thread(target=lambda: server.http.post("/generate", json={**LONG, "rid": "one"}))
    thread.start()
    eventually(lambda: server.num_running() == 1)
    response = server.http.post("/generate", json={"text": "a", "rid": "one"})
    assert (response.status_code, response.json()["param"]) == (400, "rid")
    server.http.post("/abort_request", json={"rid": "one"})
    thread.join(5)
    assert server.http.post("/generate", json={"text": "y", "rid": "one"}).json()["text"] == "z"


def test_abort_is_exact_and_gives_what_there_is(start):
    server = start(random_seed=30)
    answers = {}

    def ask(rid: str) -> None:
        answers[rid] = server.http.post("/generate", json={**LONG, "rid": rid})

    threads = [threading.Thread(target=ask, args=(rid,)) for rid in ("req-1", "req-10")]
    for thread in threads:
        thread.start()
    eventually(lambda: server.state()["num_running"] == 2 and server.state()["total_generated_tokens"] > 8)
    assert server.http.post("/abort_request", json={"rid": "unknown"}).status_code == 200
    assert server.http.post("/abort_request", json={"rid": "req-1"}).status_code == 200
    threads[0].join(5)
    answer = answers["req-1"].json()
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert answer["text"].startswith("bc")
    assert "req-10" not in answers
    assert server.http.post("/abort_request", json={"abort_all": True, "rid": None}).status_code == 200
    threads[1].join(5)
    assert answers["req-10"].status_code == 200
    assert server.http.post("/abort_request", json={}).status_code == 400


def test_flush_waits_if_it_is_told_to(start):
    server = start(random_seed=30)
    thread = threading.Thread(target=lambda: server.http.post("/generate", json=LONG))
    thread.start()
    eventually(lambda: server.num_running() == 1)
    assert server.http.get("/flush_cache").status_code == 400
    assert server.http.post("/flush_cache", params={"timeout": "x"}).status_code == 400
    threading.Timer(0.1, lambda: server.http.post("/abort_request", json={"abort_all": True})).start()
    assert server.http.post("/flush_cache", params={"timeout": "5"}).status_code == 200
    thread.join(5)


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_refused_with_503(start, stream):
    server = start(random_seed=30, max_running_requests=1, max_queued_requests=1)
    threads = [threading.Thread(target=lambda: server.http.post("/generate", json=LONG)) for _ in range(2)]
    for thread, full in zip(threads, ("num_running", "num_waiting"), strict=True):
        thread.start()
        eventually(lambda full=full: server.state()[full] == 1)
    response = server.http.post("/generate", json={**LONG, "stream": stream})
    server.http.post("/abort_request", json={"abort_all": True})
    for thread in threads:
        thread.join(5)
    assert response.status_code == 503
    assert response.json()["code"] == 503


KEYS = {"N": "/model_info", "A": "/flush_cache"}


@pytest.mark.parametrize(
    ("flags", "level", "key", "allowed"),
    [
        ({}, "N", None, True),
        ({}, "A", None, True),
        ({"api_key": "user"}, "N", None, False),
        ({"api_key": "user"}, "N", "wrong", False),
        ({"api_key": "user"}, "N", "user", True),
        ({"api_key": "user"}, "A", "user", True),
        ({"api_key": "user"}, "A", None, False),
        ({"admin_api_key": "ädmin"}, "N", None, True),
        ({"admin_api_key": "ädmin"}, "A", None, False),
        ({"admin_api_key": "ädmin"}, "A", "ädmin", True),
        ({"api_key": "user", "admin_api_key": "ädmin"}, "A", "user", False),
        ({"api_key": "user", "admin_api_key": "ädmin"}, "A", "ädmin", True),
        ({"api_key": "user", "admin_api_key": "ädmin"}, "N", "user", True),
        ({"api_key": "user", "admin_api_key": "ädmin"}, "N", "ädmin", False),
    ],
)
def test_keys(start, flags, level, key, allowed):
    server = start(**flags)
    headers = {} if key is None else {b"Authorization": b"Bearer " + key.encode()}
    response = server.http.get(KEYS[level], headers=headers)
    assert response.status_code == (200 if allowed else 401)
    if not allowed:
        assert response.json()["error"]["code"] == 401
    assert server.http.get("/health").status_code == 200
    assert server.http.options(KEYS[level]).status_code != 401


def test_keys_are_told_to_nobody(start):
    server = start(api_key="hush", admin_api_key="secret")
    text = server.http.get("/server_info", headers={"Authorization": "Bearer hush"}).text
    assert "hush" not in text
    assert "secret" not in text


def test_other_origins_may_ask(server):
    headers = {"Origin": "http://elsewhere", "Access-Control-Request-Method": "POST"}
    assert server.http.options("/generate", headers=headers).headers["access-control-allow-origin"] == "*"


def test_engine_death_is_503_for_all(start, monkeypatch):
    server = start(random_seed=30)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(server.http.post("/generate", json=LONG)))
    thread.start()
    eventually(lambda: server.num_running() == 1)

    def die() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(server.built.scheduler, "plan", die)
    thread.join(5)
    assert answers[0].status_code == 503
    assert server.http.get("/health").status_code == 503
    assert server.http.get("/server_info").status_code == 503
    response = server.http.post("/generate", json=LONG)
    assert response.status_code == 503
    assert "a bug" in response.json()["error"]["message"]


def test_a_silent_engine_is_unhealthy(start, monkeypatch):
    server = start(random_seed=900)
    monkeypatch.setattr("hornbeam.engine.frontend.SILENCE_LIMIT", 0.2)
    monkeypatch.setattr("hornbeam.engine.loop.PULSE_INTERVAL", 60)
    assert server.http.get("/health").status_code == 200
    thread = threading.Thread(target=lambda: server.http.post("/generate", json=LONG))
    thread.start()
    time.sleep(0.5)
    assert server.http.get("/health").status_code == 503
    server.http.post("/abort_request", json={"abort_all": True})
    thread.join(5)


def test_a_long_step_is_healthy(start, monkeypatch):
    server = start(random_seed=1000)
    monkeypatch.setattr("hornbeam.engine.frontend.SILENCE_LIMIT", 0.3)
    monkeypatch.setattr("hornbeam.engine.loop.PULSE_INTERVAL", 0.1)
    thread = threading.Thread(target=lambda: server.http.post("/generate", json=LONG))
    thread.start()
    for _ in range(8):
        started = time.monotonic()
        assert server.http.get("/health").status_code == 200
        assert time.monotonic() - started < 0.3
        time.sleep(0.1)
    server.http.post("/abort_request", json={"abort_all": True})
    thread.join(5)


def test_a_failure_after_the_first_chunk_is_an_event(start, monkeypatch):
    server = start(random_seed=5)
    with server.http.stream("POST", "/generate", json={**LONG, "stream": True}) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        server.built.executor.fail_launch = True
        rest = [line for line in lines if line]
    assert '"code":500' in rest[-2]
    assert rest[-1] == "data: [DONE]"


def test_a_missing_chat_template_file_stops_the_start():
    user = {"model_path": "fake", "chat_template": "nowhere.jinja"}

    async def run() -> None:
        serving = Serving(ThreadEngine(lambda: fake_engine.build({})), resolve_serve(user, "x"), user)
        try:
            await serving.start()
        finally:
            await serving.frontend.close(drain=False, timeout=5)

    with pytest.raises(ConfigError, match=r"--chat-template nowhere\.jinja"):
        asyncio.run(run())


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
def test_priorities_that_do_not_count_are_ignored_or_refused(start, path):
    prompt = {"text": "y"} if path == "/generate" else {"messages": [{"role": "user", "content": "y"}]}
    assert start().http.post(path, json={**prompt, "priority": 3}).status_code == 200
    strict = start(abort_on_priority_when_disabled=True)
    assert strict.http.post(path, json={**prompt, "priority": 3}).status_code == 503
    assert strict.http.post(path, json=prompt).status_code == 200
    server = start(enable_priority_scheduling=True, abort_on_priority_when_disabled=True, default_priority_value=1)
    assert server.http.post(path, json={**prompt, "priority": 3}).status_code == 200


@pytest.mark.parametrize("mode", ["in_place", "retract", "abort", None])
def test_pause_and_continue(start, mode):
    server = start(random_seed=40)
    answers = []
    body = {**LONG, "sampling_params": {"max_new_tokens": 30, "ignore_eos": True}}
    expected = server.http.post("/generate", json=body).json()["text"]
    thread = threading.Thread(target=lambda: answers.append(server.http.post("/generate", json=body).json()))
    thread.start()
    eventually(lambda: server.state()["num_running"] == 1 and server.state()["total_generated_tokens"] > 32)
    assert server.http.post("/pause_generation", json={"mode": mode} if mode else {}).json()["status"] == "ok"
    eventually(lambda: server.state()["num_running"] == (mode == "in_place"))
    generated = server.state()["total_generated_tokens"]
    late = threading.Thread(target=lambda: answers.append(server.http.post("/generate", json=body).json()))
    late.start()
    eventually(lambda: server.state()["num_waiting"] == 1 + (mode == "retract"))
    assert server.http.get("/health").status_code == 200
    assert server.state()["total_generated_tokens"] <= generated + 2, "two steps may have been under way"
    assert server.http.post("/continue_generation", json={}).json()["status"] == "ok"
    for waiting in (thread, late):
        waiting.join(10)
    texts = [answer["text"] for answer in answers]
    assert texts.count(expected) == (2 if mode in ("in_place", "retract") else 1)
    assert server.http.post("/pause_generation", json={"mode": "nap"}).status_code == 400
