"""The OpenAI API, with the official client."""

import openai
import pytest

pytestmark = pytest.mark.pure


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, text: str = "abc", **fields):
    fields = {"max_tokens": 3, **fields}
    return client.chat.completions.create(model="m", messages=[{"role": "user", "content": text}], **fields)


def test_models(client):
    (card,) = client.models.list().data
    assert (card.id, card.max_model_len) == ("fake", 200)
    assert client.models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("some/other")
    assert caught.value.code == "model_not_found"


def test_completion(client):
    answer = ask(client, seed=5, temperature=0.5, top_p=0.9, user="me", extra_body={"top_k": 3, "rid": "r7"})
    (choice,) = answer.choices
    assert (answer.id, answer.model, answer.object) == ("r7", "m", "chat.completion")
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "def", "length")
    assert choice.logprobs is None
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 3, 6)


def test_without_a_limit_it_ends_at_eos(client):
    answer = ask(client, "x", max_tokens=None)
    assert answer.choices[0].message.content == "yz"
    assert (answer.choices[0].finish_reason, answer.choices[0].matched_stop) == ("stop", 256)
    assert ask(client, "x", max_tokens=None, max_completion_tokens=1).choices[0].message.content == "y"
    assert len(ask(client, "x", max_tokens=30, extra_body={"ignore_eos": True}).choices[0].message.content) == 28


def test_stop_string(client):
    answer = ask(client, "a", max_tokens=50, stop=["nope", "ef"])
    assert answer.choices[0].message.content == "bcd"
    assert (answer.choices[0].finish_reason, answer.choices[0].matched_stop) == ("stop", "ef")
    assert answer.usage.completion_tokens == 5
    kept = ask(client, "a", max_tokens=50, stop="ef", extra_body={"no_stop_trim": True})
    assert kept.choices[0].message.content == "bcdef"


def test_logprobs(client):
    content = ask(client, "a", logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [entry.token for entry in content] == ["b", "c", "d"]
    assert content[0].bytes == [98]
    assert content[0].logprob == -0.5
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [("b", -0.5), ("c", -1.5)]


def test_several_choices(client):
    answer = ask(client, "a", n=2)
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [(0, "bcd"), (1, "bcd")]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1, 6)
    chunks = list(ask(client, "a", n=2, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens == 6
    for index in (0, 1):
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in mine) == "bcd"
        assert mine[-1].finish_reason == "length"


def test_stream(client_of_steps):
    chunks = list(ask(client_of_steps, "a", stream=True, stream_options={"include_usage": True}, logprobs=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.content for chunk in chunks[:4]] == ["", "b", "c", "d"]
    assert [chunk.choices[0].logprobs.content[0].token for chunk in chunks[1:4]] == ["b", "c", "d"]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:5]] == [None, None, None, None, "length"]
    assert chunks[5].choices == []
    assert chunks[5].usage.completion_tokens == 3
    assert len(chunks) == 6


def test_stream_without_usage_and_with_usage_everywhere(client_of_steps):
    assert all(chunk.usage is None for chunk in ask(client_of_steps, "a", stream=True))
    chunks = ask(client_of_steps, "a", stream=True, stream_options={"continuous_usage_stats": True})
    assert [chunk.usage.completion_tokens for chunk in chunks] == [1, 1, 2, 3, 3]


def test_stream_holds_back_the_start_of_a_stop_string(client):
    chunks = list(ask(client, "a", stream=True, max_tokens=20, stop="efg"))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "bcd"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_continued_message(client):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]
    answer = client.chat.completions.create(
        model="m", messages=messages, max_tokens=2, extra_body={"continue_final_message": True}
    )
    assert answer.choices[0].message.content == "de"


def test_text_parts(client):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "k"}]
    assert ask(client, parts).choices[0].message.content == "lmn"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 0.5}, "seed"),
        ({"n": 0}, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"stop_regex": "("}, "stop_regex"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usge": True}}, "include_usge"),
        ({"max_token": 5}, "max_token"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"stop": [""]}, "stop"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_names_the_field(server, fields, field, stream):
    body = {"messages": [{"role": "user", "content": "a"}], "stream": stream, **fields}
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == response.json()["param"] == field


def test_the_official_client_shows_our_message(client):
    with pytest.raises(openai.BadRequestError, match=r"n must be in 1..1024"):
        ask(client, n=0)


def test_content_type(server):
    response = server.http.post("/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert response.status_code == 400
    assert "content-type" in response.json()["message"]


def test_a_failure_after_the_first_chunk_reaches_the_official_client(start):
    server = start(random_seed=5)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = ask(client, "a", max_tokens=150, stream=True, extra_body={"ignore_eos": True})
        assert next(stream).choices[0].delta.role == "assistant"
        server.built.executor.fail_launch = True
        with pytest.raises(openai.APIError, match="no launch today"):
            list(stream)


def test_a_failure_before_the_first_chunk_is_an_http_error(start):
    server = start()
    server.built.executor.fail_launch = True
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError, match="no launch today"):
            ask(client, stream=True)
        assert ask(client).choices[0].message.content == "def"
