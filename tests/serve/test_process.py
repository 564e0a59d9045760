"""The server as an operator runs it: two processes, signals, exit codes. The engine's model is the fake one."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fake_engine
import httpx
import pytest
from serve_helpers import eventually

pytestmark = pytest.mark.pure

ROOT = Path(__file__).parents[2]
LONG = {"text": "a", "sampling_params": {"max_new_tokens": 100, "ignore_eos": True}}
RUN = """
import json, sys
from hornbeam.serve.server import run_server
run_server(json.loads(sys.argv[1]), "fake_engine:build")
heavy = {"torch", "transformers"} & sys.modules.keys()
assert not heavy, heavy
"""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    """A folder as far as the server process reads it."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text("{}")
    fake_engine.make_tokenizer()._backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<eos>", "chat_template": fake_engine.CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


class Process:
    def __init__(self, model_path: Path, **flags) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        user = {"model_path": str(model_path), "load_format": "dummy", "port": port, **flags}
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, json.dumps(user)],
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20)
        self.log: list[str] = []
        self.ready = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        assert self.ready.wait(20), self.log

    def _read(self) -> None:
        for line in self.process.stderr:
            self.log.append(line)
            if "The server is ready at http://127.0.0.1:" in line:
                self.ready.set()

    def engine_pid(self) -> int:
        pid = self.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())

    def stop(self) -> None:
        self.http.close()
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stderr.close()


@pytest.fixture
def start(model_path) -> Iterator:
    processes = []

    def start_one(**flags) -> Process:
        processes.append(Process(model_path, **flags))
        return processes[-1]

    yield start_one
    for process in processes:
        process.stop()


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def ask_in_background(server: Process, body: dict, answers: list) -> threading.Thread:
    def ask() -> None:
        try:
            answers.append(server.http.post("/generate", json=body))
        except httpx.HTTPError as error:
            answers.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.2)
    return thread


def test_text_through_both_processes_then_a_drained_end(start):
    server = start(random_seed=10, api_key=None)
    assert server.http.post("/generate", json={"text": "x"}).json()["text"] == "yz"
    stop = {"max_new_tokens": 50, "stop": "fg"}
    assert server.http.post("/generate", json={"text": "a", "sampling_params": stop}).json()["text"] == "bcde"
    answers: list = []
    thread = ask_in_background(server, LONG, answers)
    server.process.send_signal(signal.SIGTERM)
    thread.join(10)
    assert answers[0].json()["meta_info"]["completion_tokens"] == 100
    assert server.process.wait(5) == 0, server.log
    assert not any("Traceback" in line for line in server.log)


def test_a_second_signal_ends_at_once(start):
    server = start(random_seed=100)
    engine = server.engine_pid()
    answers: list = []
    thread = ask_in_background(server, LONG, answers)
    server.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert server.process.poll() is None
    server.process.send_signal(signal.SIGINT)
    server.process.wait(3)
    thread.join(5)
    eventually(lambda: not is_alive(engine))


def test_the_engines_death_is_told_at_once(start):
    server = start(random_seed=10)
    answers: list = []
    thread = ask_in_background(server, LONG, answers)
    died = time.monotonic()
    os.kill(server.engine_pid(), signal.SIGKILL)
    thread.join(5)
    assert time.monotonic() - died < 3
    assert answers[0].status_code == 503
    assert "killed by signal 9" in answers[0].json()["error"]["message"]
    assert server.http.get("/health").status_code == 503
    assert server.http.post("/generate", json=LONG).status_code == 503
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(5) == 0


def test_a_dead_server_leaves_no_orphan(start):
    server = start()
    engine = server.engine_pid()
    assert is_alive(engine)
    server.process.kill()
    eventually(lambda: not is_alive(engine))


def test_a_failure_to_build_is_one_line(model_path):
    run = RUN.replace("fake_engine:build", "fake_engine:refuse").replace("run_server(", "main(")
    run = run.replace("import run_server", "import run_server\nfrom serve_helpers import exit_like_cli as main")
    user = {"model_path": str(model_path), "load_format": "dummy", "port": 0}
    done = subprocess.run(
        [sys.executable, "-c", run, json.dumps(user)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 1
    assert "hornbeam serve: error: --page-size is no good" in done.stderr
    assert "Traceback" not in done.stderr


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "hornbeam.launch_server", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=20,
    )


def test_a_taken_port_is_one_line(model_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = command("--model-path", str(model_path), "--port", port)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


def test_a_bad_flag_is_one_line(tmp_path):
    done = command("--stream-interval", "0")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "--stream-interval must be at least 1" in done.stderr


def test_help_is_quick_and_lists_every_flag():
    started = time.monotonic()
    done = command("--help")
    assert time.monotonic() - started < 2  # 0.1 s on a quiet machine
    assert done.returncode == 0
    assert "--max-total-tokens" in done.stdout
