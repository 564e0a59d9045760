"""The loop with the real scheduler, through a link that records."""

import dataclasses
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from queue import Empty, SimpleQueue

import fake_engine
import pytest

from hornbeam.config.components import LoopOptions
from hornbeam.core.errors import ConfigError
from hornbeam.core.request import Finish, Request, RequestOutput, SamplingParams
from hornbeam.engine import envelope
from hornbeam.engine.loop import run_engine
from hornbeam.engine.parts import Built

pytestmark = pytest.mark.pure


class RecordingLink:
    def __init__(self) -> None:
        self.commands: SimpleQueue = SimpleQueue()
        self.events: SimpleQueue = SimpleQueue()

    def receive(self, timeout):
        received = []
        try:
            received.append(self.commands.get(timeout != 0, timeout))
            while True:
                received.append(self.commands.get_nowait())
        except Empty:
            return received

    def send(self, event) -> None:
        self.events.put(event)


class RunningEngine:
    def __init__(self, **flags) -> None:
        self.built: Built = fake_engine.build(flags)
        self.link = RecordingLink()
        self.thread = threading.Thread(target=run_engine, args=(lambda: self.built, self.link), daemon=True)
        self.thread.start()
        assert self.event() == self.built.ready

    def send(self, *commands) -> None:
        for command in commands:
            self.link.commands.put(command)

    def event(self, timeout: float = 5):
        return self.link.events.get(timeout=timeout)

    def outputs(self, *rids: str) -> dict[str, tuple[str, RequestOutput]]:
        """Text and last output of each request, read until all have ended."""
        texts, last = dict.fromkeys(rids, ""), {}
        while last.keys() != set(rids):
            event = self.event()
            if isinstance(event, envelope.StepOutputs):
                for output in event.outputs:
                    texts[output.rid] += "".join(map(chr, output.token_ids))
                    if output.finish is not None:
                        last[output.rid] = output
        return {rid: (texts[rid], last[rid]) for rid in rids}

    def stop(self, drain: bool = False) -> None:
        self.send(envelope.Shutdown(drain=drain))
        self.thread.join(5)
        assert not self.thread.is_alive()


def request(rid: str, prompt: str, max_new_tokens: int | None = 3, **fields) -> Request:
    sampling = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)
    return Request(rid=rid, prompt_ids=tuple(map(ord, prompt)), sampling=sampling, **fields)


@pytest.fixture(params=[False, True], ids=["overlap", "no_overlap"])
def engine(request) -> Iterator[RunningEngine]:
    engine = RunningEngine(disable_overlap_schedule=request.param, random_seed=2)
    yield engine
    engine.stop()


def test_requests_of_one_message_run_in_one_batch(engine):
    engine.send(envelope.Submit((request("1", "abc"), request("2", "x", 2))))
    outputs = engine.outputs("1", "2")
    assert outputs["1"] == ("def", outputs["1"][1])
    assert outputs["2"][0] == "yz"
    assert outputs["1"][1].finish == Finish(type="length", length=3)
    assert engine.built.executor.num_launched == 3


def test_a_failing_step_ends_its_requests_alone(engine):
    bad = Request(rid="bad", prompt_ids=(fake_engine.FAIL,), sampling=SamplingParams(max_new_tokens=3))
    engine.send(envelope.Submit((bad, request("beside", "a"))))
    outputs = engine.outputs("bad", "beside")
    assert outputs["beside"][1].finish.status == 500
    assert outputs["bad"][1].finish.status == 500
    assert "the device hiccuped" in outputs["bad"][1].finish.message
    engine.send(envelope.Submit((request("next", "a"),)))
    assert engine.outputs("next")["next"][0] == "bcd"


def test_a_failing_launch_ends_its_requests_alone(engine):
    engine.built.executor.fail_launch = True
    engine.send(envelope.Submit((request("bad", "a"),)))
    assert engine.outputs("bad")["bad"][1].finish.status == 500
    engine.send(envelope.Submit((request("next", "a"),)))
    assert engine.outputs("next")["next"][0] == "bcd"


def test_a_device_that_fails_again_and_again_ends_the_engine(engine):
    for rid in ("1", "2", "3"):
        bad = Request(rid=rid, prompt_ids=(fake_engine.FAIL,), sampling=SamplingParams(max_new_tokens=1))
        engine.send(envelope.Submit((bad,)))
        assert engine.outputs(rid)[rid][1].finish.status == 500
    failed = engine.event()
    assert isinstance(failed, envelope.Failed)
    assert "3 steps in a row failed" in failed.message
    engine.thread.join(5)
    assert not engine.thread.is_alive()


def test_refusals_carry_a_status(engine):
    engine.send(envelope.Submit((request("1", "a" * 500), request("2", "a", 1))))
    outputs = engine.outputs("1", "2")
    assert (outputs["1"][1].finish.status, outputs["2"][1].finish.type) == (400, "length")
    assert "500 tokens" in outputs["1"][1].finish.message


def test_flush_right_after_a_result_succeeds(engine):
    for _ in range(5):
        engine.send(envelope.Submit((request("1", "abcdefgh", None),)), envelope.Abort("1"))
        engine.outputs("1")
        engine.send(envelope.Flush(7))
        assert engine.event() == envelope.Reply(id=7, ok=True)


def test_flush_is_refused_while_requests_run(engine):
    engine.send(envelope.Submit((request("1", "a", None),)), envelope.Flush(7), envelope.Abort("1"))
    events = [engine.event(), engine.event()]
    assert envelope.Reply(id=7, ok=False) in events


def test_idle_loop_checks_the_books_once_and_sleeps(engine, monkeypatch):
    calls = []
    monkeypatch.setattr(engine.built.scheduler, "check", lambda: calls.append(1))
    monkeypatch.setattr("hornbeam.engine.loop.IDLE_SECONDS", 0.01)
    engine.send(envelope.Info(1))
    assert engine.event().payload["num_running"] == 0
    time.sleep(0.2)
    assert calls == [1]


def test_a_leak_is_logged_and_the_loop_goes_on(engine, monkeypatch, caplog):
    def leak() -> None:
        raise AssertionError("page 5 is nobody's")

    monkeypatch.setattr(engine.built.scheduler, "check", leak)
    monkeypatch.setattr("hornbeam.engine.loop.IDLE_SECONDS", 0.01)
    engine.send(envelope.Info(1))
    engine.event()
    time.sleep(0.1)
    assert "page 5 is nobody's" in caplog.text
    engine.send(envelope.Submit((request("1", "a"),)))
    assert engine.outputs("1")["1"][0] == "bcd"


def test_a_strict_engine_ends_at_a_leak(monkeypatch):
    monkeypatch.setattr("hornbeam.engine.loop.IDLE_SECONDS", 0.01)
    built = fake_engine.build({})
    built.scheduler._memory._free_slots.pop()
    link = RecordingLink()
    assert not run_engine(lambda: dataclasses.replace(built, options=LoopOptions(strict_checks=True)), link)
    assert link.events.get() == built.ready
    assert "slots are lost" in link.events.get().message


def test_a_step_that_never_ends_ends_the_engine():
    engine = RunningEngine(random_seed=60_000, watchdog_timeout=0.1)
    engine.send(envelope.Submit((request("1", "a", 1),)))
    failed = engine.event()
    assert isinstance(failed, envelope.Failed)
    assert "step 0 has not ended within 0.1 s (--watchdog-timeout)" in failed.message


def test_a_loop_that_does_not_come_back_ends_its_process_and_says_where_it_stood(tmp_path):
    script = (
        "import sys, time; from hornbeam.engine.remote import SocketLink\n"
        "link = SocketLink(sys.argv[1], 0.2); link.receive(0)\n"
        "time.sleep(30)"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=20)
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
    assert "line 3 in <module>" in ended.stderr


def test_commands_do_not_wait_for_a_long_step(monkeypatch):
    engine = RunningEngine(random_seed=500)
    monkeypatch.setattr("hornbeam.engine.loop.PULSE_INTERVAL", 0.1)
    engine.send(envelope.Submit((request("1", "a", 1),)))
    time.sleep(0.05)
    started = time.monotonic()
    engine.send(envelope.Info(1), envelope.Abort("1"))
    assert engine.event().payload["num_running"] == 1
    assert engine.event().outputs[0].finish == Finish(type="abort", message="Aborted")
    assert time.monotonic() - started < 0.4
    assert engine.event() == envelope.Pulse()
    engine.stop()


def test_what_the_start_has_made_is_not_searched_for_garbage():
    engine = RunningEngine()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    engine.stop()
    assert gc.get_freeze_count() == 0


def test_a_slow_launch_counts_for_the_step_that_is_launched(monkeypatch):
    engine = RunningEngine(random_seed=1)
    launch, apply, seconds = engine.built.executor.launch, engine.built.scheduler.apply, {}

    def launch_slowly(plan):
        step = launch(plan)
        time.sleep(0.2 if plan.step_id == 5 else 0)
        return step

    def note(result, taken):
        seconds[result.step_id] = taken
        apply(result, taken)

    monkeypatch.setattr(engine.built.executor, "launch", launch_slowly)
    monkeypatch.setattr(engine.built.scheduler, "apply", note)
    engine.send(envelope.Submit((request("1", "a", 10),)))
    engine.outputs("1")
    assert max(seconds, key=seconds.__getitem__) == 5
    assert seconds.pop(5) >= 0.2
    assert max(seconds.values()) < 0.2
    engine.stop()


def test_stop_string_abort_cuts_the_truth_without_an_output(engine):
    engine.send(envelope.Submit((request("1", "abcd", None),)))
    engine.event()
    engine.send(envelope.Abort("1", keep_tokens=1), envelope.Info(9))
    while not isinstance(event := engine.event(), envelope.Reply):
        assert all(output.finish is None for output in event.outputs)
    assert event.payload["num_running"] == 0


def test_draining_shutdown_finishes_what_runs_and_refuses_what_comes():
    engine = RunningEngine(random_seed=5)
    shutdown = envelope.Shutdown(drain=True)
    engine.send(envelope.Submit((request("1", "a", 10),)), shutdown, envelope.Submit((request("2", "a"),)))
    outputs = engine.outputs("1", "2")
    assert outputs["1"][0] == "bcdefghijk"
    assert outputs["2"][1].finish.status == 503
    engine.thread.join(5)
    assert not engine.thread.is_alive()


def test_failure_to_build_is_told(caplog):
    def wrong() -> Built:
        raise ConfigError("--page-size must be at least 1")

    def broken() -> Built:
        raise RuntimeError("no such kernel")

    link = RecordingLink()
    assert not run_engine(wrong, link)
    assert link.events.get() == envelope.Failed(message="--page-size must be at least 1", is_config=True)
    assert not run_engine(broken, link)
    assert link.events.get() == envelope.Failed(message="RuntimeError: no such kernel")
    assert "no such kernel" in caplog.text
