"""/generate over HTTP."""

import json

import fake_engine
import pytest

pytestmark = pytest.mark.pure


def events(response) -> list:
    """The JSON of each event; the framing is checked."""
    frames = response.text.split("\n\n")
    assert frames.pop() == ""
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    assert frames.pop() == "data: [DONE]"
    return [json.loads(frame[6:]) for frame in frames]


def generate(server, *, status: int = 200, sampling: dict | None = None, **body):
    body = {"sampling_params": {"max_new_tokens": 3, **(sampling or {})}, **body}
    response = server.http.post("/generate", json=body)
    assert response.status_code == status, response.text
    return response


def test_one_prompt(server):
    answer = generate(server, text="abc", rid="mine").json()
    meta = answer.pop("meta_info")
    assert answer == {"text": "def", "output_ids": [100, 101, 102]}
    assert meta.pop("e2e_latency") > 0
    assert meta == {
        "id": "mine",
        "finish_reason": {"type": "length", "length": 3},
        "prompt_tokens": 3,
        "weight_version": "default",
        "num_retractions": 0,
        "reasoning_tokens": 0,
        "completion_tokens": 3,
        "cached_tokens": 0,
    }


def test_the_prompt_s_ids(server):
    answers = generate(server, text=["ab", "c"], return_prompt_token_ids=True).json()
    assert [answer["prompt_token_ids"] for answer in answers] == [[97, 98], [99]]


def test_put_and_input_ids(server):
    response = server.http.put("/generate", json={"input_ids": [97], "sampling_params": {"max_new_tokens": 1}})
    assert response.json()["text"] == "b"


def test_defaults(server):
    answer = server.http.post("/generate", json={"text": "y"}).json()
    assert answer["text"] == "z"
    assert answer["output_ids"] == [ord("z"), fake_engine.EOS]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": fake_engine.EOS}
    answer = server.http.post("/generate", json={"text": "y", "sampling_params": {"ignore_eos": True}}).json()
    assert answer["meta_info"]["completion_tokens"] == 128


def test_null_max_new_tokens_runs_to_the_end_of_the_context(server):
    answer = generate(server, text="aa", sampling={"max_new_tokens": None, "ignore_eos": True}).json()
    assert answer["meta_info"]["completion_tokens"] == fake_engine.CONTEXT_LEN - 2
    answer = generate(server, text="aa", sampling={"max_new_tokens": 10**6, "ignore_eos": True}).json()
    assert answer["meta_info"]["completion_tokens"] == fake_engine.CONTEXT_LEN - 2


def test_no_new_tokens_is_prefill_only(server):
    answer = generate(server, text="abc", sampling={"max_new_tokens": 0}).json()
    assert (answer["text"], answer["meta_info"]["completion_tokens"]) == ("", 0)


def test_batch_with_values_for_each(server):
    answers = generate(
        server,
        text=["a", "x"],
        sampling_params=[{"max_new_tokens": 1}, {"max_new_tokens": 5, "stop_token_ids": [ord("z")]}],
        return_logprob=[False, True],
        rid=["p", "q"],
    ).json()
    assert [answer["text"] for answer in answers] == ["b", "y"]
    assert [answer["meta_info"]["id"] for answer in answers] == ["p", "q"]
    assert "output_token_logprobs" not in answers[0]["meta_info"]
    assert answers[1]["meta_info"]["output_token_logprobs_length"] == 2
    assert answers[1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": ord("z")}


def test_answers_of_a_batch_keep_their_order_whichever_ends_first(server):
    samplings = [{"max_new_tokens": length} for length in (9, 1, 4)]
    answers = generate(server, text=["a", "k", "p"], sampling_params=samplings).json()
    assert [answer["text"] for answer in answers] == ["bcdefghij", "l", "qrst"]
    seconds = [answer["meta_info"]["e2e_latency"] for answer in answers]
    assert max(seconds) == seconds[0]  # each answer is made when its request ends


def test_batch_of_one_is_a_list_and_its_rid_stays(server):
    assert [answer["meta_info"]["id"] for answer in generate(server, text=["a"], rid="r").json()] == ["r"]
    assert [answer["meta_info"]["id"] for answer in generate(server, text=["a", "b"], rid="r").json()] == ["r_0", "r_1"]
    assert len(generate(server, input_ids=[[97], [98]]).json()) == 2


def test_logprobs(server):
    meta = generate(server, text="a", return_logprob=True, top_logprobs_num=2, return_text_in_logprobs=True).json()[
        "meta_info"
    ]
    assert meta["output_token_logprobs"] == [[-0.5, 98, "b"], [-0.5, 99, "c"], [-0.5, 100, "d"]]
    assert meta["output_top_logprobs"][0] == [[-0.5, 98, "b"], [-1.5, 99, "c"]]
    assert meta["input_token_logprobs"] == []
    meta = generate(server, text="a", return_logprob=True).json()["meta_info"]
    assert meta["output_token_logprobs"][0] == [-0.5, 98, None]
    assert "output_top_logprobs" not in meta


def test_input_logprobs(server):
    body = {"return_logprob": True, "top_logprobs_num": 1, "token_ids_logprob": [5, 7]}
    meta = generate(server, text="abcd", logprob_start_len=1, **body).json()["meta_info"]
    assert meta["input_token_logprobs"] == [[None, 98, None], [-0.5, 99, None], [-0.5, 100, None]]
    assert meta["input_top_logprobs"] == [None, [[-0.5, 99, None]], [[-0.5, 100, None]]]
    assert meta["input_token_ids_logprobs"] == [None, *[[[-5.0, 5, None], [-7.0, 7, None]]] * 2]
    assert meta["output_token_ids_logprobs"] == [[[-5.0, 5, None], [-7.0, 7, None]]] * 3
    assert generate(server, text="abcd", logprob_start_len=4, **body).json()["meta_info"]["input_token_logprobs"] == []


@pytest.mark.parametrize("stream", [False, True])
def test_scoring_a_prompt(server, stream):
    response = generate(
        server,
        text="abcd" * 20,  # more than one chunk
        return_logprob=True,
        logprob_start_len=0,
        return_text_in_logprobs=True,
        sampling={"max_new_tokens": 0},
        stream=stream,
    )
    (answer,) = events(response) if stream else [response.json()]
    assert answer["text"] == ""
    meta = answer["meta_info"]
    assert meta["completion_tokens"] == 0
    assert meta["input_token_logprobs"][0] == [None, 97, "a"]
    assert [entry[0] for entry in meta["input_token_logprobs"][1:]] == [-0.5] * 79
    assert "".join(entry[2] for entry in meta["input_token_logprobs"]) == "abcd" * 20
    assert meta["output_token_logprobs"] == []


def test_logprob_options_of_each_prompt(server):
    answers = generate(
        server,
        text=["ab", "kl"],
        return_logprob=True,
        logprob_start_len=[0, -1],
        top_logprobs_num=[0, 1],
        token_ids_logprob=[[], [9]],
    ).json()
    first, second = (answer["meta_info"] for answer in answers)
    assert len(first["input_token_logprobs"]) == 2
    assert second["input_token_logprobs"] == []
    assert "output_top_logprobs" not in first
    assert "output_token_ids_logprobs" not in first
    assert second["output_token_ids_logprobs"] == [[[-9.0, 9, None]]] * 3


def test_siblings(server):
    answers = generate(server, text=["a", "k"], sampling={"n": 2, "max_new_tokens": 1}, rid="r").json()
    assert [answer["text"] for answer in answers] == ["b", "b", "l", "l"]
    assert [answer["meta_info"]["id"] for answer in answers] == ["r_0_0", "r_0_1", "r_1_0", "r_1_1"]
    assert len(generate(server, text="a", sampling={"n": 2}).json()) == 2
    chunks = events(generate(server, text="a", sampling={"n": 3}, stream=True))
    assert {chunk["index"] for chunk in chunks} == {0, 1, 2}


def test_siblings_compute_the_prompt_once(server):
    server.http.post("/flush_cache")
    answers = generate(server, text="prompt of siblings" * 5, sampling={"n": 4}).json()
    assert [answer["meta_info"]["cached_tokens"] for answer in answers] == [0, 88, 88, 88]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_regex_cuts_text_ids_and_logprobs(server, stream):
    response = generate(
        server, text="a", stream=stream, sampling={"max_new_tokens": 50, "stop_regex": ["x+y", "[e-g]{2}h"]}
    )
    answer = events(response)[-1] if stream else response.json()
    assert answer["text"] == "bcde"
    assert answer["meta_info"]["completion_tokens"] == 7
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": "[e-g]{2}h"}


def test_stream_is_cumulative_with_a_chunk_per_token(server_with_steps):
    chunks = events(generate(server_with_steps, text="a", stream=True, return_logprob=True))
    assert [chunk["text"] for chunk in chunks] == ["b", "bc", "bcd"]
    assert [chunk["output_ids"] for chunk in chunks] == [[98], [98, 99], [98, 99, 100]]
    assert [chunk["meta_info"]["completion_tokens"] for chunk in chunks] == [1, 2, 3]
    assert [len(chunk["meta_info"]["output_token_logprobs"]) for chunk in chunks] == [1, 2, 3]
    assert [chunk["meta_info"]["finish_reason"] for chunk in chunks] == [None, None, {"type": "length", "length": 3}]
    assert "index" not in chunks[0]


def test_stream_interval(server_with_steps):
    chunks = events(
        generate(server_with_steps, text="a", stream=True, sampling={"stream_interval": 2, "max_new_tokens": 6})
    )
    assert [chunk["text"] for chunk in chunks] == ["b", "bcd", "bcdef", "bcdefg"]


def test_stream_of_a_batch_tells_whose_chunk_it_is(server_with_steps):
    chunks = events(generate(server_with_steps, text=["a", "k"], stream=True))
    for index, text in enumerate(["bcd", "lmn"]):
        assert [chunk["text"] for chunk in chunks if chunk["index"] == index] == [text[:1], text[:2], text]


def test_incremental_stream(start):
    server = start(incremental_streaming_output=True, random_seed=50)
    chunks = events(generate(server, text="a", stream=True, return_logprob=True))
    assert [chunk["text"] for chunk in chunks] == ["b", "c", "d"]
    assert [chunk["output_ids"] for chunk in chunks] == [[98], [99], [100]]
    assert [len(chunk["meta_info"]["output_token_logprobs"]) for chunk in chunks] == [1, 1, 1]
    assert [chunk["meta_info"]["output_token_logprobs_length"] for chunk in chunks] == [1, 2, 3]
    assert [chunk["meta_info"]["completion_tokens"] for chunk in chunks] == [1, 2, 3]
    assert generate(server, text="a").json()["text"] == "bcd"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_over_several_tokens(server, stream):
    response = generate(
        server, text="a", stream=stream, sampling={"max_new_tokens": 50, "stop": "efg"}, return_logprob=True
    )
    answer = events(response)[-1] if stream else response.json()
    assert answer["text"] == "bcd"
    assert "".join(map(chr, answer["output_ids"])) == "bcdefg"
    meta = answer["meta_info"]
    assert meta["finish_reason"] == {"type": "stop", "matched": "efg"}
    assert meta["completion_tokens"] == 6
    assert len(meta["output_token_logprobs"]) == 6
    if stream:
        texts = [chunk["text"] for chunk in events(response)]
        assert not any("e" in text for text in texts)


def test_stop_string_kept(server):
    answer = generate(server, text="a", sampling={"stop": ["de"], "max_new_tokens": 9, "no_stop_trim": True}).json()
    assert answer["text"] == "bcde"


def test_special_tokens_in_the_text(server):
    sampling = {"ignore_eos": True, "max_new_tokens": 3, "skip_special_tokens": False}
    assert generate(server, text="y", sampling=sampling).json()["text"] == "z<eos>a"


def test_prefix_is_reused_and_flushed(server):
    generate(server, text="hello there, general")
    assert generate(server, text="hello there, general").json()["meta_info"]["cached_tokens"] == 16
    salted = generate(server, text="hello there, general", extra_key="salt").json()
    assert salted["meta_info"]["cached_tokens"] == 0
    assert server.http.post("/flush_cache").status_code == 200
    assert generate(server, text="hello there, general").json()["meta_info"]["cached_tokens"] == 0


def test_ids_only(start):
    server = start(skip_tokenizer_init=True)
    answer = generate(server, input_ids=[97]).json()
    assert "text" not in answer
    assert answer["output_ids"] == [98, 99, 100]
    assert "tokenizer" in generate(server, text="a", status=400).json()["message"]
    assert "tokenizer" in generate(server, input_ids=[97], sampling={"stop": "a"}, status=400).json()["message"]
    assert server.http.get("/health_generate").status_code == 200
    chat = server.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
    assert chat.status_code == 400


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "text"),
        ({"text": "a", "input_ids": [1]}, "input_ids"),
        ({"text": 5}, "text"),
        ({"text": []}, "text"),
        ({"text": ""}, "text"),
        ({"text": "a" * 500}, "text"),
        ({"text": ["a", "a" * 500]}, "text"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [[1], []]}, "input_ids"),
        ({"input_ids": ["a"]}, "input_ids"),
        ({"input_ids": [[1], 2]}, "input_ids"),
        ({"input_ids": [1, "a"]}, "input_ids"),
        ({"input_ids": [1, [2]]}, "input_ids"),
        ({"input_ids": [[1], [True]]}, "input_ids"),
        ({"input_ids": [1, 1.0]}, "input_ids"),
        ({"input_ids": [fake_engine.VOCAB]}, "input_ids"),
        ({"input_ids": [-1]}, "input_ids"),
        ({"input_ids": [1] * fake_engine.CONTEXT_LEN}, "input_ids"),
        ({"text": ["a", "b"], "rid": ["x"]}, "rid"),
        ({"text": ["a", "b"], "rid": ["x", "x"]}, "rid"),
        ({"text": "a", "rid": 5}, "rid"),
        ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
        ({"text": "a", "sampling_params": "greedy"}, "sampling_params"),
        ({"text": "a", "return_logprob": "yes"}, "return_logprob"),
        ({"text": "a", "return_logprob": True, "top_logprobs_num": -1}, "top_logprobs_num"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": -2}, "logprob_start_len"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": 2}, "logprob_start_len"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": "0"}, "logprob_start_len"),
        ({"text": "a", "return_logprob": True, "token_ids_logprob": [fake_engine.VOCAB]}, "token_ids_logprob"),
        ({"text": "a", "return_logprob": True, "token_ids_logprob": [1, "a"]}, "token_ids_logprob"),
        ({"text": "a", "token_ids_logprob": [[1, True]]}, "token_ids_logprob"),
        ({"text": ["a", "b"], "return_logprob": True, "token_ids_logprob": [[1]]}, "token_ids_logprob"),
        ({"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]}, "n"),
        ({"text": "a", "image_data": "x"}, "image_data"),
        ({"text": "a", "lora_path": "x"}, "lora_path"),
        ({"text": "a", "input_embeds": [[0.5]]}, "input_embeds"),
        ({"text": "a", "return_hidden_states": True}, "return_hidden_states"),
        *(
            ({"text": "a", "sampling_params": {name: value}}, name)
            for name, value in [
                ("temperature", -1),
                ("temperature", "hot"),
                ("temperature", True),
                ("top_p", 0),
                ("top_p", 1.5),
                ("top_k", 0),
                ("top_k", 1.5),
                ("max_new_tokens", -1),
                ("max_new_tokens", 1.5),
                ("sampling_seed", 2**63),
                ("stop", [1]),
                ("stop", ""),
                ("stop_token_ids", ["a"]),
                ("ignore_eos", 1),
                ("stream_interval", 0),
                ("n", 0),
                ("n", 10**9),
                ("min_p", 1.1),
                ("min_p", "0.1"),
                ("min_new_tokens", -1),
                ("min_new_tokens", 129),
                ("frequency_penalty", 2.5),
                ("presence_penalty", -2.5),
                ("repetition_penalty", 0),
                ("repetition_penalty", 2.1),
                ("logit_bias", {"a": 1}),
                ("logit_bias", {"5": "1"}),
                ("logit_bias", {str(fake_engine.VOCAB): 1}),
                ("logit_bias", [1]),
                ("json_schema", "{}"),
                ("regex", "a"),
                ("ebnf", "a"),
                ("stop_regex", "("),
                ("stop_regex", "a*"),
                ("stop_regex", 5),
                ("temprature", 1),
            ]
        ),
    ],
)
def test_bad_input_names_the_field(server, body, field, stream):
    response = server.http.post("/generate", json={**body, "stream": stream})
    assert response.status_code == 400, response.text
    error = response.json()
    assert error["param"] == error["error"]["param"] == field
    assert error["message"] == error["error"]["message"]
    assert (error["object"], error["code"]) == ("error", 400)


def test_harmless_values_and_unknown_fields_are_let_pass(server, caplog):
    sampling = {"n": 1, "min_p": 0.0, "frequency_penalty": 0, "repetition_penalty": 1.0, "regex": None, "top_p": None}
    body = {"logprob_start_len": -1, "lora_path": None, "parallel_batch": True, "made_up_field": 5}
    generate(server, text="a", sampling=sampling, **body)
    generate(server, text="a", sampling=sampling, **body)
    assert caplog.text.count("'made_up_field' of /generate has no effect") == 1


def test_message_of_a_long_prompt_has_the_numbers(server):
    message = generate(server, text="a" * 500, status=400).json()["message"]
    assert "500 tokens" in message
    assert "199" in message


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'{"text": NaN}', b"\xff"])
def test_a_body_that_is_no_json_object(server, body):
    response = server.http.post("/generate", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_a_failing_step_is_an_error_500_and_the_server_lives(server):
    response = generate(server, input_ids=[fake_engine.FAIL], status=500)
    assert "the device hiccuped" in response.json()["error"]["message"]
    generate(server, input_ids=[fake_engine.FAIL], stream=True, status=500)
    generate(server, input_ids=[[97], [fake_engine.FAIL]], status=500)  # none of a batch is answered then
    assert generate(server, text="a").json()["text"] == "bcd"
