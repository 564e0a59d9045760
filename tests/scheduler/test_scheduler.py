"""What the scheduler decides: order, sharing, limits, ends, failures; and that the tokens never depend on it."""

import pytest
from scheduler.simulation import SPEC, Simulation, check_outputs, make, reference, tokens_of

from hornbeam.config.components import CacheOptions, SchedulerOptions
from hornbeam.core.cache_spec import CacheSpec
from hornbeam.core.errors import BadRequest, ConfigError, Overloaded
from hornbeam.core.request import Finish, Request
from hornbeam.scheduler.planning import GROUP, PATIENCE, OutputEstimate, Pace
from hornbeam.scheduler.scheduler import Scheduler

pytestmark = pytest.mark.pure


def workload() -> list[Request]:
    """Different lengths, shared prefixes at odd borders, ends by length and by stop."""
    base = tokens_of(0, 60)
    requests = [make(f"base{i}", base[: 5 + 9 * i] + tokens_of(i, i), 3 + 5 * i, seed=i) for i in range(6)]
    requests += [make(f"same{i}", base[:37], 25, seed=i, ignore_eos=True) for i in range(4)]
    requests += [make(f"own{i}", tokens_of(100 + i, 1 + 7 * i), 12, seed=i, stop_token_ids=(3, 4)) for i in range(5)]
    requests += [make("zero", base[:41], 0), make("one", base[:16], 1), make("other", base, 9, namespace="salt")]
    return requests


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("radix", [True, False])
@pytest.mark.parametrize(("page_size", "chunk"), [(1, 1), (1, 512), (4, 3), (4, 16), (4, 50), (16, 16), (16, 7)])
def test_same_tokens_however_it_is_scheduled(depth: int, radix: bool, page_size: int, chunk: int) -> None:
    simulation = Simulation(depth=depth, radix=radix, page_size=page_size, chunk=chunk, num_pages=2000 // page_size)
    requests = workload()
    simulation.submit(*requests)
    simulation.run()
    check_outputs(simulation, requests)
    assert all(sum(len(c.token_ids) for c in plan.chunks) <= max(chunk, page_size) for plan in simulation.plans)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("radix", [True, False])
@pytest.mark.parametrize(("page_size", "num_pages"), [(1, 75), (4, 20), (16, 6)])
def test_same_tokens_after_retraction(depth: int, radix: bool, page_size: int, num_pages: int) -> None:
    simulation = Simulation(
        depth=depth, radix=radix, page_size=page_size, num_pages=num_pages, chunk=32, conservativeness=0.0
    )
    requests = workload()
    simulation.submit(*requests)
    simulation.run()
    check_outputs(simulation, requests)
    if page_size < 16:
        assert simulation.scheduler.stats().total_retractions > 0
        assert any(end.num_retractions for end in simulation.ends.values())


@pytest.mark.parametrize("num_pages", [30, 200])
def test_several_groups_and_a_coarse_granularity(num_pages: int) -> None:
    simulation = Simulation(groups=3, granularity=6, num_pages=num_pages, chunk=13)
    requests = workload()
    simulation.submit(*requests)
    simulation.run()
    check_outputs(simulation, requests)
    starts = [start.num_cached for plan in simulation.plans for start in plan.starts]
    assert all(cached % 12 == 0 for cached in starts)
    assert any(starts)


def test_queued_requests_share_a_prefix_that_nobody_has_computed_yet() -> None:
    simulation = Simulation(chunk=512)
    prompt = tokens_of(1, 50)
    simulation.submit(*(make(f"r{i}", prompt, 4, seed=i) for i in range(4)))
    simulation.run()
    assert [len(chunk.token_ids) for chunk in simulation.plans[0].chunks] == [50, 2, 2, 2]
    assert [simulation.ends[f"r{i}"].num_cached for i in range(4)] == [0, 48, 48, 48]


def test_a_prompt_jumps_over_what_another_request_computes_meanwhile() -> None:
    simulation = Simulation(chunk=16, slots=2, page_size=1)
    prompt = tokens_of(1, 40)
    simulation.submit(make("a", prompt[:20], 2), make("b", prompt[:12] + tokens_of(2, 5), 2), make("c", prompt, 2))
    simulation.run()
    computed = sum(len(chunk.token_ids) for plan in simulation.plans for chunk in plan.chunks)
    assert computed == 20 + 5 + 20


def test_generated_tokens_are_reused_in_the_next_turn() -> None:
    simulation = Simulation(page_size=4)
    first = make("first", tokens_of(1, 10), 13, ignore_eos=True)
    simulation.submit(first)
    while simulation.scheduler.has_work:
        simulation.step()
    answer = tuple(simulation.tokens["first"])
    simulation.submit(make("second", first.prompt_ids + answer + (5, 6), 1))
    simulation.run()
    assert simulation.ends["second"].num_cached == 20  # of 22 written rows: the last token has none


def test_a_repeated_prompt_is_computed_from_its_last_token_only() -> None:
    simulation = Simulation(page_size=1)
    simulation.submit(make("a", tokens_of(1, 30), 0))
    simulation.run()
    simulation = Simulation(page_size=1)
    for rid in ("a", "b"):
        simulation.submit(make(rid, tokens_of(1, 30), 0))
        while simulation.scheduler.has_work:
            simulation.step()
    assert simulation.ends["b"].num_cached == 29
    assert simulation.ends["b"].finish == Finish(type="length", length=0)
    assert all(not chunk.samples for plan in simulation.plans for chunk in plan.chunks)


def test_decode_rows_come_before_chunks_and_run_in_every_step() -> None:
    simulation = Simulation(chunk=8)
    simulation.submit(make("a", tokens_of(1, 4), 30, ignore_eos=True))
    simulation.step()
    simulation.submit(make("b", tokens_of(2, 64), 2))
    for _ in range(8):
        simulation.step()
        assert len(simulation.plans[-1].decode) == 1
        assert len(simulation.plans[-1].chunks) == 1


def test_context_end_and_unlimited_generation() -> None:
    simulation = Simulation(context_len=30)
    request = make("a", tokens_of(1, 10), None, ignore_eos=True)
    simulation.submit(request, make("b", tokens_of(1, 29), 50, ignore_eos=True), make("c", tokens_of(1, 30), 0))
    simulation.run()
    assert simulation.ends["a"].finish == Finish(type="length", length=20)
    assert simulation.ends["b"].finish == Finish(type="length", length=1)
    assert tuple(simulation.tokens["a"]) == reference(request, 30)[0]


@pytest.mark.parametrize("depth", [1, 2])
def test_the_last_request_that_cannot_fit_fails_alone_with_numbers(depth: int) -> None:
    simulation = Simulation(num_pages=11, depth=depth)  # 40 tokens
    simulation.submit(*(make(f"r{i}", tokens_of(i, 12), 60, ignore_eos=True) for i in range(2)), make("s", (5,), 5))
    simulation.run()
    for rid in ("r0", "r1"):
        finish = simulation.ends[rid].finish
        assert finish is not None
        assert (finish.type, finish.status) == ("abort", 500)
        assert "41 tokens" in str(finish.message)
        assert "max_total_tokens=40" in str(finish.message)
        assert simulation.ends[rid].num_generated == 29  # 40 rows, and one token that has none
    assert simulation.ends["s"].finish.type in ("length", "stop")


@pytest.mark.parametrize("chunk", [2, 512])
def test_a_retracted_request_that_outgrew_the_pool_on_shared_pages_fails_with_numbers(chunk: int) -> None:
    simulation = Simulation(page_size=1, num_pages=8, chunk=chunk, depth=1)
    short, long = make("short", (1, 2, 3), 3, ignore_eos=True), make("long", (1, 2, 3, 4, 5, 6, 7), 9, ignore_eos=True)
    simulation.submit(short, long)
    simulation.run()
    check_outputs(simulation, [short])
    assert "needs keys and values of 8 tokens" in simulation.ends["long"].finish.message


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_nothing_is_planned_beyond_an_end_that_is_known(depth: int) -> None:
    simulation = Simulation(depth=depth, context_len=14)
    simulation.submit(make("a", (1, 2, 3), 5, ignore_eos=True), make("b", (5,), 1), make("c", tokens_of(1, 10), None))
    simulation.run()
    assert [len(plan.decode) for plan in simulation.plans] == [0, 2, 2, 2, 1]


def test_bad_requests_are_refused_with_reasons() -> None:
    simulation = Simulation(num_pages=11, context_len=100, queue=1, slots=1)
    submit = simulation.scheduler.submit
    for request, words in (
        (make("a", ()), "empty"),
        (make("a", tokens_of(1, 100)), "at most 99"),
        (make("a", tokens_of(1, 41)), "max_total_tokens=40"),
        (make("a", (1,), adapter="x"), "adapters"),
    ):
        with pytest.raises(BadRequest, match=words):
            submit(request)
    submit(make("a", (1,)))
    with pytest.raises(BadRequest, match="unique"):
        submit(make("a", (1,)))
    submit(make("b", (1,)))
    with pytest.raises(Overloaded, match="full"):
        submit(make("c", (1,)))
    simulation.run()


def test_unknown_cache_kinds_and_empty_pools_are_config_errors() -> None:
    options = SchedulerOptions(max_running_requests=1, max_queued_requests=None, chunked_prefill_size=8, seed=1)
    cache = CacheOptions(page_size=4, max_total_tokens=None, memory_fraction=0.5, radix=True)
    state = CacheSpec(kind="state", layers=(0,), row_shapes=((1, 4),), dtype="float32")
    for specs, num_pages in (((state,), (8,)), ((SPEC,), (1,))):
        with pytest.raises(ConfigError):
            Scheduler(options, cache, specs=specs, num_pages=num_pages, context_len=9, eos_ids=frozenset())


@pytest.mark.parametrize("after", range(8))
@pytest.mark.parametrize("depth", [1, 2])
def test_abort_in_every_state(after: int, depth: int) -> None:
    simulation = Simulation(slots=2, chunk=8, depth=depth)
    requests = [make(f"r{i}", tokens_of(i, 21), 20, seed=i, ignore_eos=True) for i in range(3)]
    simulation.submit(*requests)
    for _ in range(after):
        simulation.step()
    for rid in ("r0", "r2", "nobody"):
        simulation.scheduler.abort(rid)
        simulation.scheduler.abort(rid)
    simulation.run()
    for request in (requests[0], requests[2]):
        assert simulation.ends[request.rid].finish == Finish(type="abort", message="Aborted")
        tokens = tuple(simulation.tokens[request.rid])
        assert tokens == reference(request)[0][: len(tokens)]
    check_outputs(simulation, [requests[1]])


def test_a_stop_string_keeps_the_tokens_before_it_and_says_nothing() -> None:
    simulation = Simulation(page_size=1)
    request = make("a", tokens_of(1, 5), 20, ignore_eos=True)
    simulation.submit(request)
    while len(simulation.tokens.get("a", ())) < 6:
        simulation.step()
    simulation.scheduler.abort("a", keep_tokens=4)
    while simulation.scheduler.has_work:
        simulation.step()
    assert "a" not in simulation.ends
    simulation.scheduler.check()
    generated = reference(request)[0]
    simulation.submit(make("next", request.prompt_ids + generated[:6], 1))
    simulation.run()
    assert simulation.ends["next"].num_cached == 5 + 4


@pytest.mark.parametrize("failing", range(12))
@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_failed_step_ends_what_it_touched_and_nothing_else(failing: int, page_size: int, depth: int) -> None:
    simulation = Simulation(chunk=24, slots=5, depth=depth, page_size=page_size)
    requests = workload()
    simulation.submit(*requests)
    for _ in range(failing):
        simulation.step()
    simulation.step(fail=True)
    while simulation.scheduler.has_work:
        simulation.step()
        simulation.scheduler.check()
    broken = [rid for rid, end in simulation.ends.items() if end.finish.type == "abort"]
    assert 1 <= len(broken) < len(requests)
    assert all(simulation.ends[rid].finish.status == 500 for rid in broken)
    check_outputs(simulation, [request for request in requests if request.rid not in broken])
    again = [make("again" + request.rid, request.prompt_ids + reference(request)[0] + (5,), 20) for request in requests]
    simulation.submit(*again)  # whatever the tree still holds must be right
    simulation.run()
    check_outputs(simulation, again)


def test_flush_only_when_idle() -> None:
    simulation = Simulation()
    simulation.submit(make("a", tokens_of(1, 20), 3))
    assert not simulation.scheduler.flush()
    simulation.step()
    assert not simulation.scheduler.flush()
    simulation.run()


def test_unseeded_requests_draw_from_the_engines_seed() -> None:
    seeds = []
    for _ in range(2):
        simulation = Simulation(chunk=512)
        simulation.submit(*(make(f"r{i}", (1, 2, 3), 2, seed=None) for i in range(3)))
        simulation.run()
        seeds.append([start.seed for plan in simulation.plans for start in plan.starts])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 3


def test_admission_looks_at_who_runs_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many start together: hundreds of short prompts are no reason for a pause."""
    looks = []
    known = OutputEstimate.to_come
    monkeypatch.setattr(OutputEstimate, "to_come", lambda self, state: looks.append(state) or known(self, state))
    simulation = Simulation(num_pages=2000, chunk=4000, slots=100)
    simulation.submit(*(make(str(i), tokens_of(i, 9), 4) for i in range(100)))
    simulation.run()
    assert len(simulation.plans[0].chunks) == 100
    assert len(looks) <= 300


@pytest.mark.parametrize("mixes", [True, False])
def test_short_prompts_do_not_wait_for_a_long_one(mixes: bool) -> None:
    """They come while it is computed, and share its steps. Long ones are computed one after the other."""
    simulation = Simulation(num_pages=2000, chunk=64, mixes=mixes)
    requests = [
        make("long", tokens_of(0, 900), 3),
        *(make(str(i), tokens_of(1 + i, 30), 60, ignore_eos=True) for i in range(3)),
    ]
    simulation.submit(requests[0])
    for _ in range(3):
        simulation.step()
    requests.append(make("late", tokens_of(9, 600), 3))
    simulation.submit(*requests[1:])
    simulation.run()
    check_outputs(simulation, requests)
    chunks = [(plan.step_id, chunk) for plan in simulation.plans for chunk in plan.chunks]
    done = {chunk.slot: step_id for step_id, chunk in chunks if chunk.samples}
    assert done[0] > 2 * max(done[slot] for slot in (1, 2, 3))
    assert min(step_id for step_id, chunk in chunks if chunk.slot == 4) >= done[0]
    assert min(len(chunk.token_ids) for _, chunk in chunks if chunk.slot == 0 and not chunk.samples) == 32
    full = [sum(len(chunk.token_ids) for chunk in plan.chunks) for plan in simulation.plans if plan.step_id < done[0]]
    assert all(num_tokens > 64 - 8 for num_tokens in full if num_tokens), "whole pages, else full steps"


@pytest.mark.parametrize(
    ("num_new", "options", "num_waited"),
    [(1, {}, PATIENCE), (2, {}, 0), (1, {"streamed": True}, 0)],
    ids=["one_waits", "a_group_starts", "a_reader_starts"],
)
def test_prompts_start_in_groups_where_nobody_reads_along(num_new: int, options: dict, num_waited: int) -> None:
    simulation = Simulation(slots=2 * GROUP + 4, num_pages=2000, chunk=512)
    simulation.submit(*(make(f"old{i}", tokens_of(i, 8), 100, ignore_eos=True) for i in range(2 * GROUP)))
    simulation.step()
    simulation.submit(*(make(f"new{i}", tokens_of(100 + i, 8), 5, ignore_eos=True, **options) for i in range(num_new)))
    first = len(simulation.plans)
    while not simulation.plans[-1].chunks or len(simulation.plans) == first:
        simulation.step()
    assert len(simulation.plans) - first - 1 == num_waited


def test_who_does_not_read_along_hears_of_the_first_token_and_the_end() -> None:
    simulation = Simulation()
    simulation.submit(make("quiet", tokens_of(0, 8), 9, ignore_eos=True, told_each_step=False))
    told = []
    while simulation.scheduler.has_work:
        before = len(simulation.tokens.get("quiet", ()))
        simulation.step()
        told.append(len(simulation.tokens.get("quiet", ())) - before)
    assert [number for number in told if number] == [1, 8]


def test_a_long_prompt_has_half_of_each_step_whatever_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short prompts that take several steps of a steady pace do not get ahead of it."""
    monkeypatch.setattr(Pace, "max_prompt_tokens", 16)
    simulation = Simulation(num_pages=2000, chunk=64, slots=40)
    stream = make("stream", tokens_of(0, 8), 300, ignore_eos=True, streamed=True)
    requests = [stream, make("long", tokens_of(1, 600), 3)]
    for request in requests:
        simulation.submit(request)
        simulation.step()
    for i in range(30):
        if i % 4 == 0:
            requests.append(make(str(i), tokens_of(2 + i, 30), 40, ignore_eos=True))
            simulation.submit(requests[-1])
        simulation.step()
    shares = [{chunk.slot: len(chunk.token_ids) for chunk in plan.chunks} for plan in simulation.plans[2:]]
    assert all(share[1] >= 8 for share in shares)
    assert sum(len(share) > 1 for share in shares) > 20
    simulation.run()
    check_outputs(simulation, requests)


@pytest.mark.parametrize("priority", [0, 1, 2])
def test_a_long_prompt_shares_with_none_of_lower_priority(priority: int) -> None:
    simulation = Simulation(num_pages=2000, chunk=64, priorities=True)
    simulation.submit(make("long", tokens_of(0, 600), 3, priority=1))
    simulation.step()
    simulation.submit(make("short", tokens_of(1, 30), 3, priority=priority))
    simulation.run()
    done = {chunk.slot: plan.step_id for plan in simulation.plans for chunk in plan.chunks if chunk.samples}
    assert (done[1] < done[0]) == (priority >= 1)
