"""Published figures were taken with exactly these draws."""

import hashlib
import json

import pytest

from hornbeam.bench.workloads import KINDS, WORKLOADS, Workload, warm_up

pytestmark = pytest.mark.pure

# requests, tokens in, tokens out, SHA-256 of the JSON of prompts and output lengths
DRAWS = {
    "mix": (256, 142914, 146379, "390598c7cca4c7f9d186e12f6738af0338181e274c77384cdf89f1a8623e19c1"),
    "single": (1, 128, 256, "bf0fd7fea7929cb0fe05a845873b5b28bbc6a2ede00ab9aa345c1c04875c175f"),
    "prefix": (256, 540672, 16384, "1491eafc5b7445cbf49c1b37713585cab2d67c8dc4495858f2720c7c48971606"),
    "prefill": (32, 131072, 32, "f74f352e97a4789ee46e1e7759a29aa5d4b4b2459e3fb20bae071b4534d88c88"),
}
WARM_UPS = [
    (2, 49, 16, "933ca1c3d97a9db503fd5d59ba173337ad4898807cc0d13df0cc361b1178eadc"),
    (32, 6400, 512, "a23f0a3521bd10302124895b43967b20ff61cf06fd645e5c408f3d14a1366333"),
]


def describe(workload: Workload) -> tuple[int, int, int, str]:
    digest = hashlib.sha256(json.dumps([workload.prompts, workload.output_lens]).encode()).hexdigest()
    return len(workload.prompts), sum(map(len, workload.prompts)), sum(workload.output_lens), digest


def test_full_scale():
    assert {name: describe(make(1.0)) for name, make in WORKLOADS.items()} == DRAWS
    assert [describe(workload) for workload in warm_up()] == WARM_UPS


def test_kinds():
    drawn = {name: describe(make(1.0))[:3] for name, make in KINDS.items()}
    assert drawn == {
        "long": (24, 165993, 4800),
        "huge": (3, 90000, 300),
        "tree": (64, 267008, 6400),
        "deep": (64, 308886, 6400),
        "repeats": (128, 192000, 12800),
        "same": (64, 192000, 6400),
        "short": (1000, 20000, 8000),
        "medium": (600, 59966, 24059),
        "many": (768, 467460, 155757),
    }
    deep = KINDS["deep"](1.0).prompts
    assert [len({prompt[:length] for prompt in deep}) for length in (512, 6144)] == [2, 64]
    for make in KINDS.values():
        assert sum(map(len, make(0.01).prompts)) <= 0.011 * sum(map(len, make(1.0).prompts))


def test_only_single_is_greedy():
    assert {name: make(0.01).temperature for name, make in WORKLOADS.items()} == {
        "mix": 0.8,
        "single": 0.0,
        "prefix": 0.8,
        "prefill": 0.8,
    }


@pytest.mark.parametrize("name", WORKLOADS)
def test_scaled_down(name):
    full, small = WORKLOADS[name](1.0), WORKLOADS[name](0.05)
    assert 1 <= len(small.prompts) == len(small.output_lens) <= max(1, 0.1 * len(full.prompts))
    assert max(map(len, small.prompts)) <= 0.06 * max(map(len, full.prompts))
    assert min(small.output_lens) >= 1
