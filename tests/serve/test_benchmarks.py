"""Load generators, against a server over the fake engine; results as people and scripts read them."""

import json

import fake_engine
import pytest

from hornbeam.bench import serving
from hornbeam.bench.cli import main
from hornbeam.bench.client import Record
from hornbeam.bench.latencies import figures, most_at_once

pytestmark = pytest.mark.pure
LINES = ("Successful requests:", "Request throughput (req/s):", "Mean TTFT (ms):", "P99 TPOT (ms):", "Median ITL (ms):")


@pytest.fixture
def conversations(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "load_tokenizer", lambda path: fake_engine.make_tokenizer())
    monkeypatch.setattr(serving, "local_path", lambda path, *_, **__: path)
    path = tmp_path / "talks.jsonl"
    turns = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "defgh"}]
    path.write_text(f"{json.dumps({'messages': turns})}\n" * 4)
    return ["--dataset-name", "custom", "--dataset-path", str(path), "--disable-tqdm"]


@pytest.mark.parametrize("flags", [["--backend", "hornbeam"], ["--backend", "openai-chat"], ["--disable-stream"]])
def test_serving(server, conversations, flags, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    rest = ["--num-prompts", "3", "--max-concurrency", "2", "--flush-cache", "--output-file", str(out), *flags]
    assert main(["serving", "--base-url", server.url, *conversations, *rest]) == 0
    text = capsys.readouterr().out
    assert all(line in text for line in LINES)
    (result,) = map(json.loads, out.read_text().splitlines())
    assert (result["completed"], result["total_output_tokens"], result["total_input_tokens"]) == (3, 15, 9)
    assert result["max_concurrent_requests"] <= 2


def test_serving_by_a_rate_and_with_ids(server, conversations, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.png"
    flags = ["--num-prompts", "4", "--request-rate", "100", "--seed", "3", "--plot", str(plot)]
    assert main(["serving", "--base-url", server.url, *conversations, *flags]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_failures_are_told(server, conversations, capsys):
    flags = ["--num-prompts", "2", "--warmup-requests", "0", "--extra-request-body", '{"sampling_params": 3}']
    assert main(["serving", "--base-url", server.url, *conversations, *flags]) == 1
    assert "failed: 400: " in capsys.readouterr().out
    assert main(["serving", "--base-url", "http://127.0.0.1:1"]) == 1
    assert "is the server running?" in capsys.readouterr().err


def test_one_batch_on_a_server(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hornbeam.bench.one_batch._body", body_of_letters)
    out = tmp_path / "out.jsonl"
    flags = ["--batch-size", "1", "3", "--input-len", "4", "--output-len", "5", "--result-filename", str(out)]
    assert main(["one-batch-server", "--base-url", server.url, *flags]) == 0
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert [result["batch_size"] for result in results] == [1, 3]
    assert all(0 < result["prefill_latency"] < result["latency"] for result in results)


def body_of_letters(shape, vocab_size):
    """The fake engine fails on some ids."""
    prompts = [[ord("a")] * shape.input_len] * shape.batch_size
    sampling = {"temperature": 0.0, "max_new_tokens": shape.output_len, "ignore_eos": True}
    return {"input_ids": prompts, "sampling_params": sampling, "stream": True}


def test_figures():
    records = [
        Record(num_input=10, num_output=3, started=0.0, first_token=1.0, finished=3.0, gaps=[1.0, 1.0]),
        Record(num_input=20, num_output=1, started=2.0, first_token=4.0, finished=4.0),
        Record(num_input=5, error="503"),
    ]
    result = figures(records, 4.0)
    assert (result["completed"], result["failed"], result["total_input_tokens"]) == (2, 1, 30)
    assert (result["mean_ttft_ms"], result["mean_tpot_ms"], result["p99_itl_ms"]) == (1500.0, 1000.0, 1000.0)
    assert (result["request_throughput"], result["total_throughput"], result["concurrency"]) == (0.5, 8.5, 1.25)
    assert most_at_once(records) == 2


def test_tokens_that_come_together_share_a_gap():
    record = Record(num_input=1)
    record.note(1.0, 0.0, 1)
    record.note(2.0, 1.0, 4)
    assert record.gaps == [0.25] * 4
