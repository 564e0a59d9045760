"""The smaller routes, and the API's document."""

import threading

import pytest
from serve_helpers import eventually

pytestmark = pytest.mark.pure


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_tokenize_and_detokenize(server, prefix):
    def post(path, **body):
        response = server.http.post(f"{prefix}/{path}", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    assert post("tokenize", prompt="abc") == {"tokens": [97, 98, 99], "count": 3, "max_model_len": 200}
    assert post("tokenize", prompt=["a", "bc"])["count"] == [1, 2]
    assert post("tokenize", messages=[{"role": "user", "content": "hi"}])["tokens"] == [104, 105]
    assert post("detokenize", tokens=[97, 98, 256])["text"] == "ab"
    assert post("detokenize", tokens=[97, 256], skip_special_tokens=False)["text"] == "a<eos>"
    assert post("detokenize", tokens=[[97], [98, 99]])["text"] == ["a", "bc"]
    assert post("detokenize", tokens=[])["text"] == ""


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [2**40]}, "tokens"),
        ("/detokenize", {"tokens": [1, "a"]}, "tokens"),
        ("/v1/loads?include=everything", None, "include"),
        ("/v1/loads?format=xml", None, "format"),
        ("/v1/loads?dp_rank=1", None, "dp_rank"),
    ],
)
def test_bad_input_names_the_field(server, path, body, field):
    response = server.http.post(path, json=body) if body is not None else server.http.get(path)
    assert (response.status_code, response.json()["param"]) == (400, field)


def test_loads(start):
    server = start(random_seed=30)
    long = {"text": "a", "sampling_params": {"max_new_tokens": 190, "ignore_eos": True}}
    thread = threading.Thread(target=lambda: server.http.post("/generate", json=long))
    thread.start()
    eventually(lambda: server.http.get("/get_load").json()[0]["num_reqs"] == 1)
    (load,) = server.http.get("/v1/loads").json()["loads"]
    assert (load["num_running_reqs"], load["num_waiting_reqs"], load["max_total_num_tokens"]) == (1, 0, 2000)
    assert 0 < load["token_usage"] < 1
    assert load["queues"]["waiting"] == 0
    assert load["lora"] is None
    assert "memory" not in server.http.get("/v1/loads?include=core,queues").json()["loads"][0]
    assert "num_running_reqs" not in server.http.get("/v1/loads?include=queues").json()["loads"][0]
    assert 'sglang:num_running_reqs{dp_rank="0"} 1\n' in server.http.get("/v1/loads?format=prometheus").text
    server.http.post("/abort_request", json={"abort_all": True})
    thread.join(5)


def test_a_body_has_a_limit(server, monkeypatch):
    monkeypatch.setattr("hornbeam.serve.answers.MAX_BODY_BYTES", 1000)
    response = server.http.post("/generate", json={"text": "a" * 2000})
    assert (response.status_code, response.json()["error"]["type"]) == (413, "RequestTooLargeError")
    assert server.http.post("/generate", json={"text": "y"}).status_code == 200


def test_bodies_that_may_be_missing(server):
    assert server.http.post("/pause_generation").status_code == 200
    assert server.http.post("/continue_generation").status_code == 200
    assert server.http.post("/abort_request").status_code == 400


def test_the_document_has_every_route_and_field(server):
    document = server.http.get("/openapi.json").json()
    paths = document["paths"]
    served = {path.replace(":path}", "}") for path in server.paths}
    assert set(paths) == served
    chat = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert chat["required"] == ["messages"]
    assert {"messages", "temperature", "stream_options", "tools"} <= set(chat["properties"])
    assert chat["additionalProperties"] is False
    generate = paths["/generate"]["post"]
    sampling = generate["requestBody"]["content"]["application/json"]["schema"]["properties"]["sampling_params"]
    assert "top_k" in sampling["anyOf"][0]["anyOf"][0]["properties"]
    assert set(generate["responses"]) == {"200", "400", "401", "413", "500", "503"}
    assert "404" in paths["/v1/models/{model}"]["get"]["responses"]
    assert paths["/flush_cache"]["get"]["parameters"][0]["name"] == "timeout"
    assert server.http.get("/docs").status_code == 200


def test_metrics(start):
    server = start(enable_metrics=True, api_key="hush", random_seed=2)
    auth = {"Authorization": "Bearer hush"}
    limit = {"max_new_tokens": 5, "ignore_eos": True}
    for _ in range(2):
        server.http.post("/generate", json={"text": "abcdefgh", "sampling_params": limit}, headers=auth)
    stopped = {"text": "y", "sampling_params": {**limit, "max_new_tokens": 50, "stop_regex": "."}}
    answer = server.http.post("/generate", json=stopped, headers=auth).json()
    assert answer["meta_info"]["finish_reason"]["type"] == "stop"
    lines = server.http.get("/metrics").text.splitlines()
    numbers = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
    model = '{model_name="fake"}'
    assert numbers[f"sglang:num_requests_total{model}"] == 3
    assert numbers[f"sglang:num_aborted_requests_total{model}"] == 0
    assert numbers[f"sglang:prompt_tokens_total{model}"] == 17
    assert numbers[f"sglang:cached_tokens_total{model}"] == 4
    num_generated = numbers[f"sglang:generation_tokens_total{model}"]
    assert num_generated >= 10 + answer["meta_info"]["completion_tokens"]  # and what came until the engine knew
    assert numbers[f"sglang:time_to_first_token_seconds_count{model}"] == 3
    assert numbers[f"sglang:inter_token_latency_seconds_count{model}"] == num_generated - 3
    assert numbers[f"sglang:num_running_reqs{model}"] == 0
    assert numbers[f"sglang:num_queue_reqs{model}"] == 0
    assert numbers[f"sglang:max_total_num_tokens{model}"] == 2000
    assert numbers['sglang:http_responses_total{endpoint="/generate",method="POST",status_code="200"}'] == 3
    assert "/metrics" not in set(start().paths)


class FakeProfiler:
    def __init__(self) -> None:
        self.options = []

    def start(self, options) -> None:
        if options.output_dir == "/full":
            raise OSError("no space left")
        self.options.append(options)

    def stop(self) -> str:
        return "trace.json.gz"


def test_profiles(start):
    profiler = FakeProfiler()
    server = start(random_seed=2, profiler=profiler)

    def post(path, **body):
        response = server.http.post(path, json=body)
        return response.status_code, response.json()["message"] if response.status_code != 200 else response.text

    assert start().http.post("/start_profile").json()["message"] == "this engine has no profiler"
    assert post("/stop_profile") == (400, "no profile is being recorded")
    assert post("/start_profile", output_dir="/full") == (400, "no space left")
    assert post("/start_profile", activities=["CPU"], profile_prefix="mine") == (200, "Profiling.\n")
    assert (profiler.options[0].activities, profiler.options[0].prefix) == (("CPU",), "mine")
    assert post("/start_profile") == (400, "a profile is being recorded")
    assert post("/stop_profile") == (200, "The profile is in trace.json.gz.\n")
    answers = []
    thread = threading.Thread(target=lambda: answers.append(post("/start_profile", num_steps="3")))
    thread.start()
    eventually(lambda: len(profiler.options) == 2)
    server.http.post("/generate", json={"text": "a", "sampling_params": {"max_new_tokens": 5}})
    thread.join(5)
    assert answers == [(200, "The profile is in trace.json.gz.\n")]
    assert server.http.get("/start_profile").status_code == 200
    assert server.http.get("/stop_profile").status_code == 200


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": "many"}, "num_steps"),
        ({"activities": ["RPD"]}, "activities"),
        ({"activities": []}, "activities"),
        ({"profile_prefix": "../x"}, "profile_prefix"),
        ({"start_step": 5}, "start_step"),
    ],
)
def test_bad_profile_options_name_the_field(server, body, field):
    response = server.http.post("/start_profile", json=body)
    assert (response.status_code, response.json()["param"]) == (400, field)
