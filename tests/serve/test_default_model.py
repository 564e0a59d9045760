"""The default model over HTTP, in float32: its tokens, logprobs and chat answers are the reference's."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live_server import free_port, live_server

pytestmark = pytest.mark.cpu

NUM_TOP = 5
TOLERANCE = 1e-4  # of logprobs; the reference was computed with other matrix shapes


@pytest.fixture(scope="module")
def url(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server without --model-path; the fixture it asks for has fetched the model."""
    port = free_port()
    command = [sys.executable, "-m", "hornbeam.launch_server", "--port", str(port), "--dtype", "float32"]
    with live_server(command, port, tmp_path_factory.mktemp("default") / "log") as (_, url):
        yield url


@pytest.fixture(scope="module")
def answers(url: str, smollm2_reference: dict[str, Any]) -> list[dict[str, Any]]:
    """All prompts of the reference in one batch, greedily."""
    body = {
        "input_ids": [case["prompt_ids"] for case in smollm2_reference["prompts"]],
        "sampling_params": {"temperature": 0, "max_new_tokens": 64, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": NUM_TOP,
    }
    response = httpx.post(f"{url}/generate", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def test_greedy_tokens(answers: list[dict[str, Any]], smollm2_reference: dict[str, Any]) -> None:
    for answer, case in zip(answers, smollm2_reference["prompts"], strict=True):
        assert answer["output_ids"] == case["greedy_ids"], case["name"]


def test_top_logprobs(answers: list[dict[str, Any]], smollm2_reference: dict[str, Any]) -> None:
    for answer, case in zip(answers, smollm2_reference["prompts"], strict=True):
        tops = answer["meta_info"]["output_top_logprobs"]
        for top, expected in zip(tops[: len(case["top5_first8"])], case["top5_first8"], strict=True):
            assert [token_id for _, token_id, _ in top] == [token_id for token_id, _ in expected], case["name"]
            assert [logprob for logprob, _, _ in top] == pytest.approx([row[1] for row in expected], abs=TOLERANCE)


@pytest.mark.parametrize("stream", [False, True])
def test_chats_with_the_openai_client(url: str, smollm2_reference: dict[str, Any], stream: bool) -> None:
    """Messages become the reference's prompt, and the text ends where the reference says EOS."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        for case in (case for case in smollm2_reference["prompts"] if case["eos_at"] is not None):
            answer = client.chat.completions.create(
                model="default", messages=case["messages"], temperature=0, max_tokens=64, stream=stream
            )
            if stream:
                text = "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices)
            else:
                assert answer.usage.prompt_tokens == case["n_prompt"]
                assert answer.choices[0].finish_reason == "stop"
                text = answer.choices[0].message.content
            assert case["greedy_text"].startswith(f"{text}<|im_end|>"), case["name"]
