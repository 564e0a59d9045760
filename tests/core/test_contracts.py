"""The values that cross folder borders: checked on construction, frozen, and the same after a trip over the wire."""

import dataclasses
import math

import msgspec
import pytest

from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.errors import BadRequest
from hornbeam.core.plan import Chunk, DraftTree, PageGrant, PageMove, SlotStart, StepPlan, StepResult
from hornbeam.core.request import LogprobOptions, Request, SamplingParams, TokenLogprobs

pytestmark = pytest.mark.pure

PLAN = StepPlan(
    step_id=7,
    starts=(
        SlotStart(
            slot=2,
            num_cached=16,
            sampling=SamplingParams(temperature=0.5, seed=3, logit_bias=((7, 0.5),)),
            seed=3,
            banned_ids=(1, 2),
            banned_until=20,
            prompt_ids=(4, 5),
            logprobs=LogprobOptions(num_top=2, token_ids=(9,), start=0),
        ),
    ),
    grants=(PageGrant(slot=2, group=0, first=1, page_ids=(5, 9)),),
    page_moves=(PageMove(group=0, source=1, target=2),),
    decode=(0, 1),
    decode_lens=(33, 8),
    chunks=(
        Chunk(slot=2, start=16, token_ids=(4, 5, 6), samples=True, scored_ids=(5, 6), first_scored=17),
        Chunk(slot=3, start=0, token_ids=(1, 2), samples=False, embed_spans=((0, 2),)),
    ),
    drafts=(DraftTree(slot=0, token_ids=(1, 2), parents=(-1, 0)),),
    collect=("hidden",),
)
RESULT = StepResult(
    step_id=7,
    token_ids=((1,), (2,), ()),
    logprobs=((TokenLogprobs(chosen=-0.5, top=((1, -0.5), (4, -1.25))),), (TokenLogprobs(chosen=-1.0),), ()),
)


@pytest.mark.parametrize("value", [PLAN, RESULT, StepPlan(step_id=0), StepResult(step_id=1, token_ids=(), error="no")])
def test_plans_and_results_survive_the_wire(value: StepPlan | StepResult) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=type(value)) == value
    assert msgspec.json.decode(msgspec.json.encode(value), type=type(value)) == value


def test_a_plan_counts_its_rows() -> None:
    assert PLAN.num_samples == 3
    assert PLAN.num_tokens == 7


def test_values_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.step_id = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", 0),
        ("top_k", -2),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 2.1),
        ("repetition_penalty", math.nan),
        ("logit_bias", ((1, math.inf),)),
        ("min_new_tokens", -1),
        ("min_new_tokens", 129),
        ("max_new_tokens", -1),
        ("seed", 2**63),
    ],
)
def test_sampling_out_of_range_names_the_field(field: str, value: float) -> None:
    with pytest.raises(BadRequest) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field
    assert caught.value.status == 400


def test_greedy() -> None:
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=0.9, top_k=1).greedy
    assert not SamplingParams().greedy


def test_a_request_survives_the_wire() -> None:
    request = Request(rid="a", prompt_ids=(1, 2), sampling=SamplingParams(stop_token_ids=(3,)), namespace="salt")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=Request) == request


def test_bytes_of_a_cache_group() -> None:
    spec = CacheSpec(kind="full", layers=(0, 1, 2), row_shapes=((4, 64), (4, 64)), dtype="bfloat16")
    assert spec.bytes_per_token(itemsize=2) == 3 * 2 * 4 * 64 * 2
    compressed = dataclasses.replace(spec, kind="compressed", tokens_per_row=4)
    assert compressed.bytes_per_token(itemsize=2) == 3 * 2 * 64 * 2


def test_a_window_needs_its_size() -> None:
    with pytest.raises(AssertionError):
        CacheSpec(kind="window", layers=(0,), row_shapes=((1, 8),), dtype="float32")
