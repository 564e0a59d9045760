"""The benchmarks of the server, in small: two real processes over an engine that only counts."""

import json

import fake_engine
import pytest

from hornbeam.bench.server import BODIES, measure_server
from hornbeam.bench.soak import run_soak

pytestmark = pytest.mark.pure


@pytest.fixture(scope="module")
def user(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text("{}")
    fake_engine.make_tokenizer()._backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<eos>", "chat_template": fake_engine.CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return {"model_path": str(folder), "load_format": "dummy"}


def test_cost_per_token(user):
    cost = measure_server(user, "/generate", 4, 20)
    assert cost.num_tokens == 80
    assert cost.own_us > 0
    assert set(BODIES) == {"/v1/chat/completions", "/v1/completions", "/generate"}


def test_soak(user):
    soak = run_soak(user, 100)
    assert 0 < soak.num_left < 100
    assert [point[0] for point in soak.memory] == list(range(10, 101, 10))
