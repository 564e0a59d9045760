"""/v1/completions, with the official client."""

import openai
import pytest

pytestmark = pytest.mark.pure


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, prompt="abc", **fields):
    return client.completions.create(model="m", prompt=prompt, **{"max_tokens": 3, **fields})


def test_one_text(client):
    answer = ask(client, extra_body={"rid": "r7"})
    (choice,) = answer.choices
    assert (answer.id, answer.model, answer.object) == ("r7", "m", "text_completion")
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, "def", "length", None)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 3, 6)
    raw = client.completions.with_raw_response.create(model="m", prompt="abc", max_tokens=3)
    assert raw.parse().choices[0].text == "def"
    assert raw.headers["content-type"] == "application/json"


def test_sixteen_tokens_are_the_default(client):
    assert len(client.completions.create(model="m", prompt="a").choices[0].text) == 16


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        (["a", "c"], ["bcd", "def"]),
        ([97, 98], ["cde"]),
        ([[97], [99, 100]], ["bcd", "efg"]),
        ("a", ["bcd"]),
    ],
)
@pytest.mark.parametrize("n", [1, 2])
def test_prompts_of_every_kind(client, prompt, texts, n):
    answer = ask(client, prompt, n=n)
    assert [choice.text for choice in answer.choices] == [text for text in texts for _ in range(n)]
    assert [choice.index for choice in answer.choices] == list(range(n * len(texts)))
    assert answer.usage.completion_tokens == 3 * n * len(texts)
    streamed = [""] * len(answer.choices)
    *chunks, last = ask(client, prompt, n=n, stream=True, stream_options={"include_usage": True})
    for chunk in chunks:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in answer.choices]
    assert (last.choices, last.usage.prompt_tokens) == ([], answer.usage.prompt_tokens)


def test_echo(client, client_of_steps):
    assert ask(client, echo=True).choices[0].text == "abcdef"
    assert ask(client, [97, 98, 99], echo=True).choices[0].text == "abcdef"
    assert ask(client, echo=True, max_tokens=0).choices[0].text == "abc"
    chunks = list(ask(client_of_steps, echo=True, stream=True))
    assert [chunk.choices[0].text for chunk in chunks] == ["abcd", "e", "f"]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "length"]


def test_logprobs(client):
    told = ask(client, logprobs=2).choices[0].logprobs
    assert told.tokens == ["d", "e", "f"]
    assert told.token_logprobs == [-0.5] * 3
    assert told.top_logprobs[0] == {"d": -0.5, "e": -1.5}
    assert told.text_offset == [0, 1, 2]
    assert ask(client, logprobs=0).choices[0].logprobs.top_logprobs[0] == {"d": -0.5}


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_the_prompt(client, stream):
    answer = ask(client, echo=True, logprobs=1, max_tokens=1, stream=stream)
    (answer,) = answer if stream else (answer,)
    told = answer.choices[0].logprobs
    assert told.tokens == ["a", "b", "c", "d"]
    assert told.token_logprobs == [None, -0.5, -0.5, -0.5]
    assert told.top_logprobs == [None, {"b": -0.5}, {"c": -0.5}, {"d": -0.5}]
    assert told.text_offset == [0, 1, 2, 3]


def test_offsets_count_characters(client):
    told = ask(client, "é€", echo=True, logprobs=0, max_tokens=1).choices[0].logprobs
    assert told.text_offset == [0, 0, 1, 1, 1, 2]


def test_usage_everywhere(client_of_steps):
    chunks = ask(client_of_steps, stream=True, stream_options={"continuous_usage_stats": True})
    assert [chunk.usage.completion_tokens for chunk in chunks] == [1, 2, 3]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [999]}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"messages": []}, "messages"),
        ({"stream_options": {"usage": True}}, "usage"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_names_the_field(server, fields, field, stream):
    response = server.http.post("/v1/completions", json={"prompt": "a", "stream": stream, **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == response.json()["param"] == field
